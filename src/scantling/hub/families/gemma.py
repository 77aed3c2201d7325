"""Gemma, Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import L, Llama, kv_heads
from scantling.hub.fields import (
    Activation,
    Given,
    LayerTypes,
    Only,
    Same,
    change_fields,
    tied_embeddings,
)
from scantling.hub.rope import RopeLocalGlobal
from scantling.hub.weights import Table


class Gemma(Llama):
    """Gemma team 2024, arXiv:2403.08295: norms times 1 + w, embeddings times √d_model, GeGLU."""

    model_type, architecture = "gemma", "GemmaForCausalLM"
    fields = change_fields(
        Llama.fields,
        Given("norm=rmsnorm_1p"),
        kv_heads(16),
        Same("head_dim", "model.d_head", absent=256),
        Activation("hidden_act", gated=True, absent="gelu_pytorch_tanh"),
        Only("use_bidirectional_attention", None),
        tied_embeddings(True),
        Given("embed.width_exponent=0.5"),
        without=("mlp_bias",),
    )


class Gemma2(Gemma):
    """Gemma team 2024, arXiv:2408.00118.

    Windows in every other layer, norms on both sides, capped scores and logits.
    """

    model_type, architecture = "gemma2", "Gemma2ForCausalLM"
    fields = change_fields(
        Gemma.fields,
        Given("block=sandwich"),
        kv_heads(4),
        LayerTypes(every=2, window=4096),
        Activation("hidden_activation", gated=True, absent="gelu_pytorch_tanh"),
        Same(
            "query_pre_attn_scalar",
            "attn.scale",
            absent=256,
            read=lambda v: v**-0.5,
            write=lambda v: round(v**-2),
        ),
        Same("attn_logit_softcapping", "attn.softcap", absent=50.0, nullable=True),
        Same("final_logit_softcapping", "head.softcap", absent=30.0, nullable=True),
        without=("hidden_act",),
    )
    tensors: ClassVar[Table] = {
        **Gemma.tensors,
        "blocks.{i}.attn_post_norm": f"{L}.post_attention_layernorm",
        "blocks.{i}.ffn_norm": f"{L}.pre_feedforward_layernorm",
        "blocks.{i}.ffn_post_norm": f"{L}.post_feedforward_layernorm",
    }


class Gemma3(Gemma2):
    """Gemma team 2025, arXiv:2503.19786.

    Five windows to one whole layer, each with its rotary base; normed queries and keys.
    """

    model_type, architecture = "gemma3_text", "Gemma3ForCausalLM"
    fields = change_fields(
        Gemma2.fields,
        Given("attn/qk_norm=per_head"),
        LayerTypes(every=6, window=4096, also=["pos.every"]),
        RopeLocalGlobal(local=1e4, whole=1e6, old_local="rope_local_base_freq"),
        Only("attn_logit_softcapping", None),  # a field that its code does not read
        Same("final_logit_softcapping", "head.softcap", absent=None, nullable=True),
    )
