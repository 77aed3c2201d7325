"""GPT-2 and what came after it without Llama's names: GPT-J, GPT-NeoX, OPT."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import QKV_BIAS, SIZES
from scantling.hub.family import Family
from scantling.hub.fields import (
    MISSING,
    Activation,
    Config,
    Equal,
    Field,
    Given,
    Only,
    Same,
    Switch,
    read_field,
    read_setting,
    setting,
    tied_embeddings,
)
from scantling.hub.rope import Rope
from scantling.hub.weights import Apart, Named, Table, Together

BLOCK = "scantling.model.block."
H = "transformer.h.{i}"
GPT2_SIZES = (
    Same("vocab_size", "model.vocab_size"),
    Same("n_positions", "model.seq_len"),
    Same("n_embd", "model.d_model"),
    Same("n_layer", "model.n_layers"),
    Same("n_head", "model.n_heads"),
    Same("n_inner", "model.d_ff", absent=lambda hf: 4 * hf["n_embd"]),
    Activation("activation_function", gated=False, absent="gelu_new"),
    Same("layer_norm_epsilon", "norm.eps", absent=1e-5),
)


def dropouts(absent: float) -> tuple[Same, ...]:
    """The three rates of dropout; `absent` is what the family takes where none is given."""
    return (
        Same("embd_pdrop", "decoder.dropout", absent=absent),
        Same("attn_pdrop", "attn.dropout", absent=absent),
        Same("resid_pdrop", "block.dropout", absent=absent),
    )


class GPT2(Family):
    """Radford et al. 2019: learned positions, GELU, biases everywhere."""

    model_type, architecture = "gpt2", "GPT2LMHeadModel"
    prefix, ignored = "transformer.", r".*\.attn\.(bias|masked_bias)"
    fields = (
        Given(
            "norm=layernorm", "pos=learned", "attn=mha", "block=pre", "model.bias=true", "model.dropout=0.0"
        ),
        *GPT2_SIZES,
        *dropouts(0.1),
        Only("scale_attn_weights", True),
        Only("scale_attn_by_inverse_layer_idx", False),
        Only("add_cross_attention", False),
        tied_embeddings(True),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "transformer.wte",
        "pos": "transformer.wpe",
        "blocks.{i}.attn_norm": f"{H}.ln_1",
        "blocks.{i}.attn.qkv": Together(f"{H}.attn.c_attn", transposed=True),
        "blocks.{i}.attn.out": Named(f"{H}.attn.c_proj", transposed=True),
        "blocks.{i}.ffn_norm": f"{H}.ln_2",
        "blocks.{i}.ffn.up": Named(f"{H}.mlp.c_fc", transposed=True),
        "blocks.{i}.ffn.out": Named(f"{H}.mlp.c_proj", transposed=True),
        "norm": "transformer.ln_f",
        "embed.head": "lm_head",
    }


class RotaryDim(Field):
    """GPT-J counts the channels that turn; its base is always 10000."""

    def overrides(self, hf: Config) -> list[str]:
        width = hf["n_embd"] // hf["n_head"]
        fraction = read_field(hf, "rotary_dim", 64) / width
        return [
            "pos=rope_interleaved",
            setting("pos.fraction", fraction),
            "pos.theta=10000.0",
            "pos/scaling=none",
        ]

    def hf_config(self, decoder: Config) -> Config:
        fraction = read_setting(decoder, "pos.fraction")
        return {} if fraction is MISSING else {"rotary_dim": round(fraction * decoder["d_head"])}

    @property
    def names(self) -> set[str]:
        return {"rotary_dim"}


class GPTJ(Family):
    """Wang & Komatsuzaki 2021.

    Attention and feed-forward side by side, rotary positions on pairs of neighbours.
    """

    model_type, architecture = "gptj", "GPTJForCausalLM"
    prefix, ignored = "transformer.", r".*\.attn\.(bias|masked_bias)"
    fields = (
        Given("norm=layernorm", "norm.bias=true", "attn=mha", "block=parallel", "model.bias=false"),
        Given("model.dropout=0.0", "ffn.bias=true"),
        *GPT2_SIZES,
        *dropouts(0.0),
        RotaryDim(),
        tied_embeddings(False, "embed.bias=true"),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "transformer.wte",
        "blocks.{i}.norm": f"{H}.ln_1",
        "blocks.{i}.attn.qkv": Apart(f"{H}.attn.{{p}}_proj"),
        "blocks.{i}.attn.out": f"{H}.attn.out_proj",
        "blocks.{i}.ffn.up": f"{H}.mlp.fc_in",
        "blocks.{i}.ffn.out": f"{H}.mlp.fc_out",
        "norm": "transformer.ln_f",
        "embed.head": "lm_head",
    }


N = "gpt_neox.layers.{i}"


class GPTNeoX(Family):
    """Black et al. 2022, arXiv:2204.06745, and Pythia, arXiv:2304.01373.

    Attention and feed-forward side by side, two norms.
    """

    model_type, architecture = "gpt_neox", "GPTNeoXForCausalLM"
    prefix, ignored = "gpt_neox.", r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    fields = (
        Given("norm=layernorm", "attn=mha", "model.bias=true", "model.dropout=0.0"),
        *SIZES,
        Same("intermediate_size", "model.d_ff"),
        Activation("hidden_act", gated=False, absent="gelu"),
        Same("layer_norm_eps", "norm.eps", absent=1e-5),
        Rope(fraction=0.25, unread=(), old_theta="rotary_emb_base", old_fraction="rotary_pct"),
        Same("attention_bias", *QKV_BIAS, "attn.out_bias", absent=True),
        Switch(
            "use_parallel_residual",
            "block._target_",
            {
                True: (f"{BLOCK}ParallelTwoNorms", ["block=parallel_two_norms"]),
                False: (f"{BLOCK}PreNorm", ["block=pre"]),
            },
            absent=True,
        ),
        tied_embeddings(False),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "gpt_neox.embed_in",
        "blocks.{i}.attn_norm": f"{N}.input_layernorm",
        "blocks.{i}.attn.qkv": Together(f"{N}.attention.query_key_value", by_head=True),
        "blocks.{i}.attn.out": f"{N}.attention.dense",
        "blocks.{i}.ffn_norm": f"{N}.post_attention_layernorm",
        "blocks.{i}.ffn.up": f"{N}.mlp.dense_h_to_4h",
        "blocks.{i}.ffn.out": f"{N}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "embed.head": "embed_out",
    }


D = "model.decoder.layers.{i}"


class OPT(Family):
    """Zhang et al. 2022, arXiv:2205.01068: its table of positions begins with two rows for padding."""

    model_type, architecture = "opt", "OPTForCausalLM"
    fields = (
        Given("norm=layernorm", "norm.eps=1e-5", "pos=learned", "attn=mha", "model.dropout=0.0"),
        *SIZES,
        Same("ffn_dim", "model.d_ff"),
        Equal("word_embed_proj_dim", "hidden_size", "d_model"),  # not so in OPT 350M alone
        Activation("activation_function", gated=False, absent="relu"),
        Same("enable_bias", *QKV_BIAS, "attn.out_bias", "ffn.bias", absent=True),
        Same("layer_norm_elementwise_affine", "norm.weight", "norm.bias", absent=True),
        Same("dropout", "block.dropout", absent=0.1),
        Same("attention_dropout", "attn.dropout", absent=0.0),
        Switch(
            "do_layer_norm_before",
            "block._target_",
            {True: (f"{BLOCK}PreNorm", ["block=pre"]), False: (f"{BLOCK}PostNorm", ["block=post"])},
            absent=True,
        ),
        Only("_remove_final_layer_norm", False),
        tied_embeddings(True),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "model.decoder.embed_tokens",
        "pos": Named("model.decoder.embed_positions", skipped=2),
        "blocks.{i}.attn_norm": f"{D}.self_attn_layer_norm",
        "blocks.{i}.attn.qkv": Apart(f"{D}.self_attn.{{p}}_proj"),
        "blocks.{i}.attn.out": f"{D}.self_attn.out_proj",
        "blocks.{i}.ffn_norm": f"{D}.final_layer_norm",
        "blocks.{i}.ffn.up": f"{D}.fc1",
        "blocks.{i}.ffn.out": f"{D}.fc2",
        "norm": "model.decoder.final_layer_norm",
        "embed.head": "lm_head",
    }
