"""Llama and the families that differ from it in a few settings."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.family import Family
from scantling.hub.fields import (
    MISSING,
    Activation,
    Config,
    Field,
    GatedWidth,
    Given,
    Only,
    Same,
    Window,
    change_fields,
    read_setting,
    setting,
    tied_embeddings,
)
from scantling.hub.rope import Rope
from scantling.hub.weights import Apart, Joined, Table, Together
from scantling.model.checks import check_whole

L = "model.layers.{i}"
QKV_BIAS = ("attn.q_bias", "attn.k_bias", "attn.v_bias")
SIZES = (
    Same("vocab_size", "model.vocab_size"),
    Same("hidden_size", "model.d_model"),
    Same("num_hidden_layers", "model.n_layers"),
    Same("num_attention_heads", "model.n_heads"),
    Same("max_position_embeddings", "model.seq_len"),
)


def kv_heads(absent: object = lambda hf: hf["num_attention_heads"]) -> Same:
    """The number of key heads; `absent` is what the family takes where none is given."""
    return Same("num_key_value_heads", "model.n_kv_heads", leaf="attn.n_kv_heads", absent=absent)


class Llama(Family):
    """Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783."""

    model_type, architecture = "llama", "LlamaForCausalLM"
    fields = (
        Given("norm=rmsnorm", "attn=gqa", "block=pre", "model.bias=false", "model.dropout=0.0"),
        *SIZES,
        kv_heads(),
        Same("head_dim", "model.d_head", absent=lambda hf: hf["hidden_size"] // hf["num_attention_heads"]),
        GatedWidth("intermediate_size"),
        Activation("hidden_act", gated=True, absent="silu"),
        Same("rms_norm_eps", "norm.eps", absent=1e-6),
        Rope(),
        Same("attention_bias", *QKV_BIAS, "attn.out_bias", absent=False),
        Same("mlp_bias", "ffn.bias", absent=False),
        tied_embeddings(False),
    )
    tensors: ClassVar[Table] = {
        "embed.tokens": "model.embed_tokens",
        "blocks.{i}.attn_norm": f"{L}.input_layernorm",
        "blocks.{i}.attn.qkv": Apart(f"{L}.self_attn.{{p}}_proj"),
        "blocks.{i}.attn.q_norm.norm": f"{L}.self_attn.q_norm",
        "blocks.{i}.attn.k_norm.norm": f"{L}.self_attn.k_norm",
        "blocks.{i}.attn.out": f"{L}.self_attn.o_proj",
        "blocks.{i}.ffn_norm": f"{L}.post_attention_layernorm",
        "blocks.{i}.ffn.gate": f"{L}.mlp.gate_proj",
        "blocks.{i}.ffn.up": f"{L}.mlp.up_proj",
        "blocks.{i}.ffn.out": f"{L}.mlp.down_proj",
        "norm": "model.norm",
        "embed.head": "lm_head",
    }


class Mistral(Llama):
    """Jiang et al. 2023, arXiv:2310.06825: a sliding window."""

    model_type, architecture = "mistral", "MistralForCausalLM"
    fields = change_fields(
        Llama.fields,
        kv_heads(8),
        Window("sliding_window", absent=4096),
        without=("attention_bias", "mlp_bias"),
    )


class Qwen2(Llama):
    """Yang et al. 2024, arXiv:2407.10671: biases on queries, keys and values."""

    model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    fields = change_fields(
        Llama.fields,
        kv_heads(32),
        Given(*(f"{bias}=true" for bias in QKV_BIAS)),
        Only("use_sliding_window", False),
        without=("attention_bias", "mlp_bias", "head_dim"),
    )


class Qwen3(Llama):
    """Yang et al. 2025, arXiv:2505.09388: queries and keys normed head by head."""

    model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    fields = change_fields(
        Llama.fields,
        kv_heads(32),
        Same("head_dim", "model.d_head", absent=128),
        Given("attn/qk_norm=per_head"),
        Only("use_sliding_window", False),
        without=("mlp_bias",),
    )


class Mixtral(Llama):
    """Jiang et al. 2024, arXiv:2401.04088: experts."""

    model_type, architecture = "mixtral", "MixtralForCausalLM"
    fields = change_fields(
        Llama.fields,
        kv_heads(8),
        Window("sliding_window", absent=None),
        Given("ffn=moe", "ffn.router.renormalised=true"),
        Only("hidden_act", "silu"),
        GatedWidth("intermediate_size", node="ffn.expert"),
        Same("num_local_experts", "ffn.n_experts", absent=8),
        Same("num_experts_per_tok", "ffn.router.n_active", absent=2),
        Same("rms_norm_eps", "norm.eps", absent=1e-5),
        Rope(theta=1e6),
        without=("attention_bias", "mlp_bias"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        "blocks.{i}.ffn.router.gate": f"{L}.block_sparse_moe.gate",
        "blocks.{i}.ffn.experts.{e}.gate": f"{L}.block_sparse_moe.experts.{{e}}.w1",
        "blocks.{i}.ffn.experts.{e}.up": f"{L}.block_sparse_moe.experts.{{e}}.w3",
        "blocks.{i}.ffn.experts.{e}.out": f"{L}.block_sparse_moe.experts.{{e}}.w2",
    }


EXPERTS = {
    "blocks.{i}.ffn.router.gate": f"{L}.mlp.gate",
    "blocks.{i}.ffn.experts.{e}.gate": f"{L}.mlp.experts.{{e}}.gate_proj",
    "blocks.{i}.ffn.experts.{e}.up": f"{L}.mlp.experts.{{e}}.up_proj",
    "blocks.{i}.ffn.experts.{e}.out": f"{L}.mlp.experts.{{e}}.down_proj",
}


class Qwen3Moe(Qwen3):
    """Yang et al. 2025, arXiv:2505.09388: Qwen 3 with experts."""

    model_type, architecture = "qwen3_moe", "Qwen3MoeForCausalLM"
    fields = change_fields(
        Qwen3.fields,
        kv_heads(4),
        Same("head_dim", "model.d_head", absent=lambda hf: hf["hidden_size"] // hf["num_attention_heads"]),
        Given("ffn=moe"),
        Only("hidden_act", "silu"),
        GatedWidth("moe_intermediate_size", node="ffn.expert"),
        Same("num_local_experts", "ffn.n_experts", aliases=("num_experts",), absent=128),
        Same("num_experts_per_tok", "ffn.router.n_active", absent=8),
        Same("norm_topk_prob", "ffn.router.renormalised", absent=False),
        Only("decoder_sparse_step", 1),
        Only("mlp_only_layers", []),
        without=("intermediate_size",),
    )
    tensors: ClassVar[Table] = {**Llama.tensors, **EXPERTS}


class Phi3(Llama):
    """Abdin et al. 2024, arXiv:2404.14219: queries, keys and values are one matrix, gate and up another."""

    model_type, architecture = "phi3", "Phi3ForCausalLM"
    fields = change_fields(
        Llama.fields,
        Same("rms_norm_eps", "norm.eps", absent=1e-5),
        Window("sliding_window", absent=None),
        Rope(kinds=(), unread=()),
        without=("attention_bias", "mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        "blocks.{i}.attn.qkv": Together(f"{L}.self_attn.qkv_proj"),
        "blocks.{i}.ffn": Joined(f"{L}.mlp.gate_up_proj", ("gate", "up")),
    }


class Granite(Llama):
    """IBM 2024, Granite 3.0: four multipliers."""

    model_type, architecture = "granite", "GraniteForCausalLM"
    fields = change_fields(
        Llama.fields,
        Same("embedding_multiplier", "embed.scale", absent=1.0),
        Same("residual_multiplier", "block.residual_scale", absent=1.0),
        Same("attention_multiplier", "attn.scale", absent=1.0),
        Same("logits_scaling", "head.scale", absent=1.0, read=lambda v: 1 / v, write=lambda v: 1 / v),
        without=("head_dim",),
    )


class NopeLayers(Field):
    """`no_rope_layers`: 0 for a layer without position. Yang et al. 2025, arXiv:2501.18795."""

    rope = Rope(theta=2e6)

    def overrides(self, hf: Config) -> list[str]:
        every, n_layers = hf.get("no_rope_layer_interval", 4), hf["num_hidden_layers"]
        turns = hf.get("no_rope_layers") or self.turns(n_layers, every)
        if 0 in turns:
            every = turns.index(0) + 1
        if turns != self.turns(n_layers, every):
            raise ValueError(
                f"config.json: no_rope_layers={turns} is not supported, only a 0 in every n-th place"
            )
        rope = self.rope.read(self.rope.parameters(hf), "pos.others")
        return ["pos=rope_nope", setting("pos.every", every), *rope]

    @staticmethod
    def turns(n_layers: int, every: int) -> list[int]:
        """[n_layers]: 0 for every `every`-th layer, which has no position, 1 for the others."""
        check_whole("config.json: no_rope_layer_interval", every)
        return [int((i + 1) % every != 0) for i in range(n_layers)]

    def hf_config(self, decoder: Config) -> Config:
        every = read_setting(decoder, "pos.every")
        if every is MISSING:
            return {}
        return {
            "no_rope_layer_interval": every,
            "no_rope_layers": self.turns(decoder["n_layers"], every),
            "rope_parameters": self.rope.written(decoder, "pos.others"),
        }

    @property
    def names(self) -> set[str]:
        return {"no_rope_layers", "no_rope_layer_interval", *self.rope.names}


class SmolLM3(Llama):
    """Hugging Face 2025, SmolLM3: no position in every fourth layer."""

    model_type, architecture = "smollm3", "SmolLM3ForCausalLM"
    fields = change_fields(
        Llama.fields,
        kv_heads(4),
        NopeLayers(),
        Only("use_sliding_window", False),
        tied_embeddings(True),
        without=("head_dim",),
    )
