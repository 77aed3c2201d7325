"""OLMo and OLMo 2."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import L, Llama
from scantling.hub.fields import Given, Same, but
from scantling.hub.weights import Table


class Olmo(Llama):
    """Groeneveld et al. 2024, arXiv:2402.00838: norms without parameters, bounded queries, keys and values."""

    model_type, architecture = "olmo", "OlmoForCausalLM"
    fields = but(
        Llama.fields,
        Given("norm=layernorm_plain", "norm.eps=1e-5"),
        Same("clip_qkv", "attn.clip_qkv", absent=None, nullable=True),
        without=("rms_norm_eps", "mlp_bias", "head_dim"),
    )


class Olmo2(Llama):
    """OLMo team 2025, arXiv:2501.00656: norms behind the branches, queries and keys normed over all heads."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    fields = but(
        Llama.fields,
        Given("block=reordered", "attn/qk_norm=full_width"),
        Same("rms_norm_eps", "norm.eps", absent=1e-5),
        without=("mlp_bias", "head_dim"),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        "blocks.{i}.attn_norm": f"{L}.post_attention_layernorm",
        "blocks.{i}.ffn_norm": f"{L}.post_feedforward_layernorm",
    }
