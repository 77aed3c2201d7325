"""Tiny models of every family, saved as `transformers` saves them."""

from __future__ import annotations

SMALL = {"vocab_size": 257, "pad_token_id": None, "bos_token_id": 256, "eos_token_id": 256}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS_16 = {**LLAMA, "head_dim": 16}  # four of them: wider than the model
GPT2 = {**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MHA = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
DEEPSEEK = {
    **LLAMA,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}

CASES = {
    "llama": {**HEADS_16, "tie_word_embeddings": False},
    "llama tied, biases, odd width": {
        **LLAMA,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "intermediate_size": 57,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
    },
    "gpt2": GPT2,
    "gpt2 n_inner": {**GPT2, "n_inner": 48, "activation_function": "relu"},
    "llama 3": {**LLAMA, "rope_parameters": LLAMA3},
    "llama linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama yarn": {**LLAMA, "rope_parameters": YARN},
    "mistral": {**HEADS_16, "sliding_window": 9},
    "mistral full": {**LLAMA, "head_dim": 8, "sliding_window": None},
    "qwen2": LLAMA,
    "qwen3": HEADS_16,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "gemma": HEADS_16,
    "gemma2": {**HEADS_16, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "gemma2 uncapped": {**HEADS_16, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3_text": {**HEADS_16, "num_hidden_layers": 7, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "olmo": {**LLAMA, "clip_qkv": 0.5},
    "olmo2": LLAMA,
    "phi": LLAMA,
    "stablelm": {**LLAMA, "rope_parameters": PARTIAL, "use_qkv_bias": True},
    "stablelm parallel, normed": {
        **LLAMA,
        "rope_parameters": PARTIAL,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "cohere": {**LLAMA, "logit_scale": 0.8},
    "cohere normed": {**LLAMA, "use_qk_norm": True, "logit_scale": 0.25},
    "nemotron": HEADS_16,
    "starcoder2": {**LLAMA, "sliding_window": 9},
    "granite": {
        **LLAMA,
        "embedding_multiplier": 3.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    },
    "smollm3": {**LLAMA, "num_hidden_layers": 5},
    "gpt_neox": {**MHA, "rope_parameters": PARTIAL},
    "gpt_neox one after the other": {
        **MHA,
        "rope_parameters": PARTIAL,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "gptj": {**GPT2, "rotary_dim": 4},
    "opt": {
        **{key: value for key, value in MHA.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "opt post": {
        **{key: value for key, value in MHA.items() if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "bloom": {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bloom 6 heads": {**SMALL, "hidden_size": 48, "n_layer": 2, "n_head": 6},
    "mpt": {**SMALL, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "mpt clipped": {
        **SMALL,
        "d_model": 48,
        "n_heads": 6,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3},
    },
    "falcon": {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon 40B": {
        **SMALL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_kv_heads": 2,
        "new_decoder_architecture": True,
    },
    "falcon all heads": {
        **SMALL,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "multi_query": False,
        "bias": True,
    },
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 yarn": {
        **DEEPSEEK,
        "q_lora_rank": None,
        "attention_bias": True,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
}
"""What each takes: the model's type is the first word, the rest says what is special."""
