"""OLMo, OLMo 2, OLMo 3 and OLMoE."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import EXPERTS, L, Llama
from scantling.hub.fields import GatedWidth, Given, LayerTypes, Only, Same, change_fields
from scantling.hub.rope import RopeLocalGlobal
from scantling.hub.weights import Table


class Olmo(Llama):
    """Groeneveld et al. 2024, arXiv:2402.00838: norms without parameters, bounded queries, keys, values."""

    model_type, architecture = "olmo", "OlmoForCausalLM"
    fields = change_fields(
        Llama.fields,
        Given("norm=layernorm_plain", "norm.eps=1e-5"),
        Same("clip_qkv", "attn.clip_qkv", absent=None, nullable=True),
        without=("rms_norm_eps", "mlp_bias", "head_dim"),
    )


class Olmo2(Llama):
    """OLMo team 2025, arXiv:2501.00656: norms behind the branches, queries and keys normed over all heads."""

    model_type, architecture = "olmo2", "Olmo2ForCausalLM"
    fields = change_fields(
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


class Olmo3(Olmo2):
    """OLMo team 2025, OLMo 3: windows in three layers of four."""

    model_type, architecture = "olmo3", "Olmo3ForCausalLM"
    fields = change_fields(
        Olmo2.fields,
        LayerTypes(every=4, window=4096, also=["pos.every"]),
        RopeLocalGlobal(local=5e5, whole=5e5, old_local="rope_theta"),
    )


class Olmoe(Olmo):
    """Muennighoff et al. 2024, arXiv:2409.02060: experts; queries and keys normed over all heads."""

    model_type, architecture = "olmoe", "OlmoeForCausalLM"
    fields = change_fields(
        Olmo.fields,
        Given("norm=rmsnorm", "attn/qk_norm=full_width", "ffn=moe"),
        Same("rms_norm_eps", "norm.eps", absent=1e-5),
        Only("clip_qkv", None),  # its code bounds behind the norms, ours before
        Only("hidden_act", "silu"),
        GatedWidth("intermediate_size", node="ffn.expert"),
        Same("num_experts", "ffn.n_experts", aliases=("num_local_experts",), absent=64),
        Same("num_experts_per_tok", "ffn.router.n_active", absent=8),
        Same("norm_topk_prob", "ffn.router.renormalised", absent=False),
    )
    tensors: ClassVar[Table] = {**Llama.tensors, **EXPERTS}
