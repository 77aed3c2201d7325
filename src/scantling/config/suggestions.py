"""What was meant by a name that does not exist."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from scantling.config.composition import compose_config, unresolved_settings
from scantling.config.options import CONF, options_with

SYNONYMS = {
    "model.n_layers": "n_layer num_layers num_hidden_layers layers depth",
    "model.n_heads": "n_head num_heads num_attention_heads heads",
    "model.n_kv_heads": "n_kv_head num_kv_heads num_key_value_heads n_query_groups kv_heads",
    "model.d_head": "head_dim head_size",
    "model.d_model": "hidden_size n_embd n_embed embed_dim dim width",
    "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size n_inner mlp_dim",
    "model.seq_len": "block_size context context_length ctx_len max_len max_length max_seq_len "
    "max_seq_length max_position_embeddings n_positions n_ctx sequence_length",
    "model.vocab_size": "vocab padded_vocab_size n_vocab",
    "model.window": "sliding_window window_size",
    "pos.theta": "rope_theta rope_base",
    "embed": "tie_word_embeddings tie_embeddings",
    "ffn": "activation hidden_act mlp",
    "attn": "attention",
    "lr": "learning_rate max_lr peak_lr",
    "optim": "optimizer optimiser",
    "optim.weight_decay": "wd decay",
    "optim.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optim.eps": "adam_epsilon adam_eps",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule decay_lr",
    "schedule.warmup": "warmup_steps warmup_iters warmup_ratio warmup_fraction lr_warmup_steps",
    "schedule.floor": "min_lr",
    "clip": "grad_clip gradient_clip gradient_clip_val max_grad_norm max_norm",
    "batch_size": "bs global_batch_size train_batch_size",
    "micro_batch_size": "accumulate accumulate_grad_batches grad_accum gradient_accumulation "
    "gradient_accumulation_steps device_batch_size per_device_train_batch_size",
    "budget.tokens": "tokens epochs num_epochs num_train_epochs max_tokens train_tokens",
    "budget.steps": "steps iters max_iters max_steps num_steps num_iterations total_steps",
    "budget.flops": "flops",
    "val_every": "eval_interval eval_every eval_steps val_check_interval",
    "val_windows": "eval_iters eval_batches limit_val_batches",
    "log_every": "log_interval logging_steps log_every_n_steps",
    "checkpoint.keep": "save_total_limit save_top_k",
    "checkpoint.every_minutes": "save_every save_interval save_steps",
    "ema.decay": "ema_decay",
    "trainer": "strategy",
    "trainer.devices": "gpus devices n_gpus num_gpus num_devices nproc_per_node",
    "trainer.nodes": "num_nodes nnodes",
    "trainer.accelerator": "device",
    "trainer.precision": "dtype bf16 fp16",
    "trainer.checkpoint_activations": "activation_checkpointing gradient_checkpointing",
    "seed": "random_seed",
    "data": "dataset dataset_name",
    "data.files": "train_data train_file data_dir data_path",
    "tokenizer": "tokenizer_name",
    "tokenizer.source": "tokenizer_path tokenizer_dir tokenizer_name_or_path",
    "paths.runs": "out_dir output_dir log_dir",
    "paths.cache": "cache_dir",
    "logger": "report_to",
    "logger.project": "wandb_project",
    "arm": "run_name wandb_run_name",
    "resume": "resume_from_checkpoint",
    "n_tokens": "max_new_tokens",
    "sample.n_tokens": "max_new_tokens",
    "beams": "num_beams",
    "temperature": "do_sample",
    "prompt": "start",
    "run": "checkpoint_dir",
}
"""A setting or a group of this project, and its names elsewhere: nanoGPT, transformers, litgpt, Lightning."""


def nearest(wrong: str, options: Sequence[str]) -> str:
    """The end of a message: ': did you mean …?' for near names, else the whole list when it is short."""
    if close := near(wrong, options):
        return did_you_mean(close)
    return f": use one of {', '.join(sorted(options))}" if 0 < len(options) <= 20 else ""


def nearest_setting(key: str, known: Sequence[str]) -> str:
    """The end of a message about a dotted key: ': did you mean …?', a short list, or nothing.

    First what other projects call so; else what is near in its group; else what has its last component, or
    one near it; else what is near as a whole.
    """
    group, _, name = key.rpartition(".")
    for ours in called_by_others(name.lower().replace("-", "_"), known):
        owners = [] if ours in known or ours == key else options_with(ours)
        if ours in known or owners:
            chosen = f" of {ours.partition('.')[0]}={' or '.join(owners)}" if owners else ""
            return did_you_mean([ours + chosen])
    in_group = [setting for setting in known if group and setting.startswith(f"{group}.")]
    last_of: dict[str, str] = {}
    for setting in sorted(known, key=lambda setting: setting.startswith("decoder.")):  # it repeats others
        last_of.setdefault(re.split(r"[./]", setting)[-1], setting)
    found = [f"{group}.{last}" for last in near(name, [setting.rpartition(".")[2] for setting in in_group])]
    found = found or near(key, in_group)
    found = found or [last_of[last] for last in ([name] if name in last_of else near(name, list(last_of)))]
    found = found or near(key, known)
    return did_you_mean(found) if found else nearest(key, known)


def called_by_others(name: str, known: Sequence[str]) -> list[str]:
    """Settings of this project, in groups of the entry, that others call so."""
    found = [ours for ours, theirs in SYNONYMS.items() if name in theirs.split()]
    return [ours for ours in found if ours in known or ours.partition(".")[0] in known]


def near(wrong: str, options: Sequence[str]) -> list[str]:
    """At most three options spelled much like `wrong` (difflib, a ratio of 0.6), the nearest first."""
    return difflib.get_close_matches(wrong, options, n=3, cutoff=0.6)


def did_you_mean(names: Sequence[str]) -> str:
    """The end of a message that offers these names."""
    return f": did you mean {' or '.join(names)}?"


def known_settings(entry: str, typed: Sequence[str]) -> list[str]:
    """Every dotted key under the options that were typed, and every group where options are chosen.

    Hydra's own keys, such as `_target_`, are left out.
    """
    chosen = [o for o in typed if (CONF / (o.replace("=", "/", 1) + ".yaml")).exists()]
    config = compose_config(entry, chosen)
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()] if "model" in config else []
    return sorted({*groups, *(key for key in unresolved_settings(config) if not key.endswith("_"))})
