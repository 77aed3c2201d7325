"""DeepSeek-V3: latent attention, dense layers first, then routed and shared experts."""

from __future__ import annotations

from typing import ClassVar

from scantling.hub.families.llama import EXPERTS, SIZES, L, Llama
from scantling.hub.family import Family
from scantling.hub.fields import (
    MISSING,
    Config,
    Equal,
    GatedWidth,
    Given,
    Only,
    Same,
    Switch,
    read_setting,
    setting,
    tied_embeddings,
)
from scantling.hub.rope import Rope, yarn_growth
from scantling.hub.weights import Table


class Yarn(Rope):
    """DeepSeek's YaRN: scores grow by the square of `mscale_all_dim`'s factor, too."""

    def overrides(self, hf: Config) -> list[str]:
        parameters = self.parameters(hf)
        words = super().overrides(hf)
        if "pos/scaling=none" not in words and (whole := parameters.get("mscale_all_dim")):
            scale = (hf["qk_nope_head_dim"] + hf["qk_rope_head_dim"]) ** -0.5
            words.append(setting("attn.scale", scale * yarn_growth(parameters["factor"], whole) ** 2))
        return words

    def hf_config(self, decoder: Config) -> Config:
        written = super().hf_config(decoder)
        scale, rotated = read_setting(decoder, "attn.scale"), read_setting(decoder, "attn.d_rotated")
        parameters = written.get("rope_parameters", {})
        if parameters.get("rope_type") == "yarn" and MISSING not in (scale, rotated):
            grown = (scale * (decoder["d_head"] + rotated) ** 0.5) ** 0.5
            growth = yarn_growth(parameters["factor"], 1.0) - 1
            if growth and grown > 1 + 1e-9:
                parameters["mscale_all_dim"] = round((grown - 1) / growth, 9)
                turned = parameters.get("attention_factor", 1 / grown)
                if mscale := round((turned * grown - 1) / growth, 9):  # a 0 is read as not given
                    parameters["mscale"] = mscale
                    del parameters["attention_factor"]
        return written


class DeepseekV3(Family):
    """DeepSeek-AI 2024, arXiv:2412.19437, without the module that predicts a second token."""

    model_type, architecture = "deepseek_v3", "DeepseekV3ForCausalLM"
    # Layers past the last are that module's; the published model has one, its 62nd.
    ignored = r"model\.layers\.61\..*|.*\.rotary_emb\.inv_freq"
    fields = (
        Given("norm=rmsnorm", "attn=mla", "block=pre", "model.bias=false", "model.dropout=0.0"),
        Given("ffn=moe_deepseek_v3"),
        *SIZES,
        Equal("num_key_value_heads", "num_attention_heads", "n_heads"),
        Same("qk_nope_head_dim", "model.d_head"),
        Same("qk_rope_head_dim", "attn.d_rotated"),
        Same("v_head_dim", "attn.d_value"),
        Same("q_lora_rank", "attn.q_rank", absent=1536, nullable=True),
        Same("kv_lora_rank", "attn.kv_rank"),
        Same("attention_bias", "attn.bias", absent=False),
        Same("first_k_dense_replace", "ffn.n_dense", absent=3),
        GatedWidth("intermediate_size", "ffn.d_ff_dense", node="ffn.dense"),
        GatedWidth("moe_intermediate_size", node="ffn.rest.expert"),
        Same("n_routed_experts", "ffn.rest.n_experts"),
        Same("n_shared_experts", "ffn.rest.n_shared"),
        Same("num_experts_per_tok", "ffn.rest.router.n_active"),
        Same("n_group", "ffn.rest.router.n_groups"),
        Same("topk_group", "ffn.rest.router.n_active_groups"),
        Same("routed_scaling_factor", "ffn.rest.router.scale", absent=2.5),
        Same("norm_topk_prob", "ffn.rest.router.renormalised", absent=True),
        Only("hidden_act", "silu"),
        Only("rms_norm_eps", 1e-6),  # `transformers` has this one in latent attention whatever the field says
        Given("norm.eps=1e-6"),
        Yarn(interleaved=True),
        Switch("rope_interleave", "pos.interleaved", {True: (True, [])}, absent=True),
        tied_embeddings(False),
    )
    tensors: ClassVar[Table] = {
        **Llama.tensors,
        **EXPERTS,
        "blocks.{i}.attn.q": f"{L}.self_attn.q_proj",
        "blocks.{i}.attn.q.0": f"{L}.self_attn.q_a_proj",
        "blocks.{i}.attn.q.1": f"{L}.self_attn.q_a_layernorm",
        "blocks.{i}.attn.q.2": f"{L}.self_attn.q_b_proj",
        "blocks.{i}.attn.kv_down": f"{L}.self_attn.kv_a_proj_with_mqa",
        "blocks.{i}.attn.kv_norm": f"{L}.self_attn.kv_a_layernorm",
        "blocks.{i}.attn.kv_up": f"{L}.self_attn.kv_b_proj",
        "blocks.{i}.ffn.router.correction": f"{L}.mlp.gate.e_score_correction_bias",
        "blocks.{i}.ffn.shared.gate": f"{L}.mlp.shared_experts.gate_proj",
        "blocks.{i}.ffn.shared.up": f"{L}.mlp.shared_experts.up_proj",
        "blocks.{i}.ffn.shared.out": f"{L}.mlp.shared_experts.down_proj",
    }
