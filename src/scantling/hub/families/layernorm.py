"""Families with Llama's names and LayerNorm: Phi, StableLM, Cohere, Nemotron, Starcoder 2."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import QKV_BIAS, L, Llama, kv_heads
from scantling.hub.fields import (
    Activation,
    Config,
    Field,
    Given,
    Same,
    Switch,
    Window,
    change_fields,
    read_field,
    read_setting,
    setting,
    tied_embeddings,
)
from scantling.hub.rope import Rope
from scantling.hub.weights import Folded, Table

BLOCK = "scantling.model.block."
WITH_BIAS = Given("norm=layernorm", "norm.bias=true")
ONE_NORM = {"blocks.{i}.norm": f"{L}.input_layernorm"}


class Phi(Llama):
    """Li et al. 2023, arXiv:2309.05463: attention and feed-forward side by side, biases everywhere."""

    model_type, architecture = "phi", "PhiForCausalLM"
    fields = change_fields(
        Llama.fields,
        WITH_BIAS,
        Given("block=parallel", "model.bias=true"),
        Same("layer_norm_eps", "norm.eps", absent=1e-5),
        Same("intermediate_size", "model.d_ff"),
        Activation("hidden_act", gated=False, absent="gelu_new"),
        Rope(fraction=0.5, unread=()),
        Switch(
            "qk_layernorm",
            "attn.qk_norm._target_",
            {False: ("scantling.model.attn.NoQKNorm", [])},
            absent=False,
        ),
        tied_embeddings(False, "embed.bias=true"),
        without=("rms_norm_eps", "attention_bias", "mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        **ONE_NORM,
        "blocks.{i}.attn.out": f"{L}.self_attn.dense",
        "blocks.{i}.ffn.up": f"{L}.mlp.fc1",
        "blocks.{i}.ffn.out": f"{L}.mlp.fc2",
        "norm": "model.final_layernorm",
    }


class PerHeadLayerNorm(Field):
    """StableLM's `qk_layernorm`: no bias, where the other norms have one, and their eps."""

    def overrides(self, hf: Config) -> list[str]:
        if not read_field(hf, "qk_layernorm", False):
            return ["attn/qk_norm=none"]
        return [
            "attn/qk_norm=each_head_layernorm",
            setting("attn.qk_norm.norm.eps", read_field(hf, "layer_norm_eps", 1e-5)),
        ]

    def hf_config(self, decoder: Config) -> Config:
        return {"qk_layernorm": str(read_setting(decoder, "attn.qk_norm._target_")).endswith(".EachHeadNorm")}

    @property
    def names(self) -> set[str]:
        return {"qk_layernorm"}


class StableLm(Llama):
    """Stability AI 2024, arXiv:2402.17834: LayerNorm, a quarter of each head turned."""

    model_type, architecture = "stablelm", "StableLmForCausalLM"
    fields = change_fields(
        Llama.fields,
        WITH_BIAS,
        Same("layer_norm_eps", "norm.eps", absent=1e-5),
        Same("use_qkv_bias", *QKV_BIAS, absent=False),
        Rope(fraction=0.25, unread=()),
        Switch(
            "use_parallel_residual",
            "block._target_",
            {False: (f"{BLOCK}PreNorm", ["block=pre"]), True: (f"{BLOCK}Parallel", ["block=parallel"])},
            absent=False,
        ),
        PerHeadLayerNorm(),
        kv_heads(32),
        without=("rms_norm_eps", "attention_bias", "mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        **ONE_NORM,
        "blocks.{i}.attn.q_norm.norms.{h}": f"{L}.self_attn.q_layernorm.norms.{{h}}",
        "blocks.{i}.attn.k_norm.norms.{h}": f"{L}.self_attn.k_layernorm.norms.{{h}}",
    }


class Cohere(Llama):
    """Cohere 2024, Command R.

    Attention and feed-forward side by side behind one LayerNorm without bias, scaled logits.
    """

    model_type, architecture = "cohere", "CohereForCausalLM"
    fields = change_fields(
        Llama.fields,
        Given("norm=layernorm_no_bias", "block=parallel"),
        Same("layer_norm_eps", "norm.eps", absent=1e-5),
        Rope(theta=500000.0, interleaved=True),
        Same("logit_scale", "head.scale", absent=0.0625),
        Switch(
            "use_qk_norm",
            "attn.qk_norm._target_",
            {
                False: ("scantling.model.attn.NoQKNorm", ["attn/qk_norm=none"]),
                True: ("scantling.model.attn.EachHeadNorm", ["attn/qk_norm=each_head"]),
            },
            absent=False,
        ),
        tied_embeddings(True),
        without=("rms_norm_eps", "mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        **ONE_NORM,
        "blocks.{i}.attn.q_norm.norms": Folded(f"{L}.self_attn.q_norm"),
        "blocks.{i}.attn.k_norm.norms": Folded(f"{L}.self_attn.k_norm"),
    }


class Nemotron(Llama):
    """Parmar et al. 2024, arXiv:2402.16819: LayerNorm times 1 + w, squared ReLU."""

    model_type, architecture = "nemotron", "NemotronForCausalLM"
    fields = change_fields(
        Llama.fields,
        Given("norm=layernorm_1p"),
        Same("norm_eps", "norm.eps", absent=1e-5),
        Same("intermediate_size", "model.d_ff"),
        Activation("hidden_act", gated=False, absent="relu2"),
        Rope(fraction=0.5, unread=()),
        without=("rms_norm_eps",),
    )


class Starcoder2(Llama):
    """Lozhkov et al. 2024, arXiv:2402.19173: LayerNorm, GELU, biases, a sliding window."""

    model_type, architecture = "starcoder2", "Starcoder2ForCausalLM"
    fields = change_fields(
        Llama.fields,
        WITH_BIAS,
        kv_heads(2),
        Same("norm_epsilon", "norm.eps", absent=1e-5),
        Same("intermediate_size", "model.d_ff"),
        Activation("hidden_act", gated=False, absent="gelu_pytorch_tanh"),
        Same("use_bias", *QKV_BIAS, "attn.out_bias", "ffn.bias", absent=True),
        Window("sliding_window", absent=None),
        tied_embeddings(True),
        without=("rms_norm_eps", "attention_bias", "mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        "blocks.{i}.ffn.up": f"{L}.mlp.c_fc",
        "blocks.{i}.ffn.out": f"{L}.mlp.c_proj",
    }
