"""BLOOM, MPT and Falcon: names of their own, and most of them linear biases for positions."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import QKV_BIAS
from scantling.hub.family import Family
from scantling.hub.fields import (
    Activation,
    Config,
    Field,
    Given,
    Only,
    Same,
    Times,
    read_field,
    read_setting,
    setting,
    tied_embeddings,
)
from scantling.hub.rope import Rope
from scantling.hub.weights import Table, Together

H = "transformer.h.{i}"


class Bloom(Family):
    """BigScience 2022, arXiv:2211.05100: a norm behind the embedding, linear biases."""

    model_type, architecture = "bloom", "BloomForCausalLM"
    prefix = "transformer."
    fields = (
        Given("norm=layernorm", "pos=alibi", "attn=mha", "ffn=gelu_tanh", "block=pre", "model.bias=true"),
        Given("model.dropout=0.0", "embed=tied_normed"),
        Same("vocab_size", "model.vocab_size"),
        Same("hidden_size", "model.d_model", aliases=("n_embed",)),
        Times("hidden_size", 4, "model.d_ff", aliases=("n_embed",)),
        Same("n_layer", "model.n_layers", aliases=("num_hidden_layers",)),
        Same("n_head", "model.n_heads", aliases=("num_attention_heads",)),
        Same("seq_length", "model.seq_len", absent=2048),
        Same("layer_norm_epsilon", "norm.eps", absent=1e-5),
        Only("apply_residual_connection_post_layernorm", False),
        Only("tie_word_embeddings", True),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "transformer.word_embeddings",
        "embed.norm": "transformer.word_embeddings_layernorm",
        "blocks.{i}.attn_norm": f"{H}.input_layernorm",
        "blocks.{i}.attn.qkv": Together(f"{H}.self_attention.query_key_value", by_head=True),
        "blocks.{i}.attn.out": f"{H}.self_attention.dense",
        "blocks.{i}.ffn_norm": f"{H}.post_attention_layernorm",
        "blocks.{i}.ffn.up": f"{H}.mlp.dense_h_to_4h",
        "blocks.{i}.ffn.out": f"{H}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "embed.head": "lm_head",
    }


class AttnConfig(Field):
    """The settings of MPT's attention, which stand in an object of their own."""

    fixed = (
        Only("attn_type", "multihead_attention"),
        Only("alibi", True),
        Only("alibi_bias_max", 8),
        Only("prefix_lm", False),
        Only("qk_ln", False),
        Only("attn_uses_sequence_id", False),
    )
    read = (
        Same("clip_qkv", "attn.clip_qkv", absent=None, nullable=True, read=lambda bound: bound or None),
        Same("softmax_scale", "attn.scale", absent=None, nullable=True),
    )

    def overrides(self, hf: Config) -> list[str]:
        inner = hf.get("attn_config") or {}
        return [word for field in (*self.fixed, *self.read) for word in field.overrides(inner)]

    def hf_config(self, decoder: Config) -> Config:
        inner: Config = {}
        for field in (*self.fixed, *self.read):
            inner |= field.hf_config(decoder)
        return {"attn_config": inner}

    @property
    def names(self) -> set[str]:
        return {"attn_config"}


B = "transformer.blocks.{i}"


class MPT(Family):
    """MosaicML 2023: linear biases, no other bias anywhere."""

    model_type, architecture = "mpt", "MptForCausalLM"
    prefix = "transformer."
    fields = (
        Given("norm=layernorm_no_bias", "pos=alibi", "attn=mha", "ffn=gelu", "block=pre", "model.bias=false"),
        Given("model.dropout=0.0"),
        Same("vocab_size", "model.vocab_size"),
        Same("d_model", "model.d_model"),
        Times("d_model", 4, "model.d_ff"),
        Same("n_layers", "model.n_layers"),
        Same("n_heads", "model.n_heads"),
        Same("max_seq_len", "model.seq_len"),
        Same("layer_norm_epsilon", "norm.eps", absent=1e-5),
        AttnConfig(),
        Only("expansion_ratio", 4),
        Only("no_bias", True),
        Only("logit_scale", None),
        Only("embedding_fraction", 1.0),
        tied_embeddings(True),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "transformer.wte",
        "blocks.{i}.attn_norm": f"{B}.norm_1",
        "blocks.{i}.attn.qkv": Together(f"{B}.attn.Wqkv"),
        "blocks.{i}.attn.out": f"{B}.attn.out_proj",
        "blocks.{i}.ffn_norm": f"{B}.norm_2",
        "blocks.{i}.ffn.up": f"{B}.ffn.up_proj",
        "blocks.{i}.ffn.out": f"{B}.ffn.down_proj",
        "norm": "transformer.norm_f",
        "embed.head": "lm_head",
    }


class FalconShape(Field):
    """Key heads and norms, which three switches say together.

    7B has one key head and one norm, 40B several and two.
    """

    def overrides(self, hf: Config) -> list[str]:
        n_heads = read_field(hf, "num_attention_heads", hf.get("n_head"))
        new = read_field(hf, "new_decoder_architecture", False)
        one = not new and read_field(hf, "multi_query", True)
        norms = read_field(hf, "num_ln_in_parallel_attn", 2 if new else 1)
        return [
            setting("model.n_kv_heads", 1 if one else read_field(hf, "num_kv_heads", n_heads)),
            "block=parallel_two_norms" if norms == 2 else "block=parallel",
        ]

    def hf_config(self, decoder: Config) -> Config:
        n_kv, block = read_setting(decoder, "attn.n_kv_heads"), str(read_setting(decoder, "block._target_"))
        two_norms = block.endswith(".ParallelTwoNorms")
        return {
            "num_kv_heads": n_kv,
            "multi_query": n_kv == 1,
            "new_decoder_architecture": two_norms or 1 < n_kv < decoder["n_heads"],
            "num_ln_in_parallel_attn": 2 if two_norms else 1,
        }

    @property
    def names(self) -> set[str]:
        return {
            "num_kv_heads",
            "multi_query",
            "new_decoder_architecture",
            "num_ln_in_parallel_attn",
        }


class Falcon(Family):
    """Almazrouei et al. 2023, arXiv:2311.16867: multi-query, attention and feed-forward side by side."""

    model_type, architecture = "falcon", "FalconForCausalLM"
    prefix = "transformer."
    fields = (
        Given("norm=layernorm", "norm.bias=true", "attn=gqa", "model.bias=false", "model.dropout=0.0"),
        Same("vocab_size", "model.vocab_size"),
        Same("hidden_size", "model.d_model"),
        Same("num_hidden_layers", "model.n_layers", aliases=("n_layer",)),
        Same("num_attention_heads", "model.n_heads", aliases=("n_head",)),
        Same("max_position_embeddings", "model.seq_len", absent=2048),
        Same("ffn_hidden_size", "model.d_ff", absent=lambda hf: 4 * hf["hidden_size"]),
        Same("layer_norm_epsilon", "norm.eps", absent=1e-5),
        Same("bias", *QKV_BIAS, "attn.out_bias", "ffn.bias", absent=False),
        Activation("activation", gated=False, absent="gelu"),
        FalconShape(),
        Only("parallel_attn", True),
        Only("alibi", False),
        Rope(),
        tied_embeddings(True),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "transformer.word_embeddings",
        "blocks.{i}.norm": f"{H}.input_layernorm",
        "blocks.{i}.attn_norm": f"{H}.ln_attn",
        "blocks.{i}.ffn_norm": f"{H}.ln_mlp",
        "blocks.{i}.attn.qkv": Together(f"{H}.self_attention.query_key_value", by_head=True),
        "blocks.{i}.attn.out": f"{H}.self_attention.dense",
        "blocks.{i}.ffn.up": f"{H}.mlp.dense_h_to_4h",
        "blocks.{i}.ffn.out": f"{H}.mlp.dense_4h_to_h",
        "norm": "transformer.ln_f",
        "embed.head": "lm_head",
    }
