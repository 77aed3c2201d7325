"""What was meant by a setting that does not exist."""

import pytest

from scantling.config.options import is_group, options_with
from scantling.config.suggestions import SYNONYMS, known_settings, nearest, nearest_setting


@pytest.fixture(scope="module")
def known():
    return known_settings("train", ["model=nano", "logger=wandb", "optim=adamw"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # the last component first
        ("layers", "model.n_layers"),
        ("n_layers", "model.n_layers"),
        ("warmup", "schedule.warmup"),
        ("schedule.warm_up", "schedule.warmup"),
        ("precision", "trainer.precision"),
        ("heads", "model.n_heads"),
        ("weight_decay", "optim.weight_decay"),
        ("deterministic", "trainer.deterministic"),
        ("n_tokens", "sample.n_tokens"),
        ("model.nlayers", "model.n_layers"),
        ("models.n_layers", "model.n_layers"),
        ("atn", "attn"),
        ("norm.epsilon", "norm.eps"),
        ("batchsize", "batch_size"),
        # what others call it
        ("learning_rate", "lr"),
        ("learning-rate", "lr"),
        ("training.learning_rate", "lr"),
        ("n_layer", "model.n_layers"),
        ("model.n_layer", "model.n_layers"),
        ("n_embd", "model.d_model"),
        ("hidden_size", "model.d_model"),
        ("num_attention_heads", "model.n_heads"),
        ("n_head", "model.n_heads"),
        ("block_size", "model.seq_len"),
        ("context", "model.seq_len"),
        ("max_len", "model.seq_len"),
        ("wd", "optim.weight_decay"),
        ("warmup_steps", "schedule.warmup"),
        ("grad_clip", "clip"),
        ("gradient_accumulation_steps", "micro_batch_size"),
        ("epochs", "budget.tokens"),
        ("max_iters", "budget.steps of budget=steps"),
        ("gpus", "trainer.devices"),
        ("devices", "trainer.devices"),
        ("dtype", "trainer.precision"),
        ("output_dir", "paths.runs"),
        ("out_dir", "paths.runs"),
        ("dataset", "data"),
        ("tokenizer_path", "tokenizer.source of tokenizer=pretrained"),
        ("wandb_project", "logger.project"),
        ("eval_interval", "val_every"),
    ],
)
def test_a_setting_is_found_by_its_name(known, typed, meant):
    """First of what is named; names that are less near may follow."""
    said = nearest_setting(typed, known)
    assert said.replace(" or ", "?").startswith(f": did you mean {meant}?"), said


def test_what_is_like_nothing_gets_no_suggestion(known):
    assert nearest_setting("zzyzx", known) == ""
    assert nearest_setting("zz.yzx", known) == ""


def test_another_entry_has_its_own_settings():
    known = known_settings("sample", [])
    assert nearest_setting("max_new_tokens", known) == ": did you mean n_tokens?"
    assert nearest_setting("num_beams", known) == ": did you mean beams?"
    assert nearest_setting("n_layer", known) == ""


def test_synonyms_are_of_what_exists_and_none_means_two_things(known):
    every = {*known, *known_settings("sample", [])}
    for ours in SYNONYMS:
        assert ours in every or options_with(ours) or is_group(ours), ours
    words = [
        word for ours, theirs in SYNONYMS.items() if ours != "sample.n_tokens" for word in theirs.split()
    ]
    assert len(words) == len(set(words))
    assert not set(words) & {key for key in known if "." not in key}


def test_an_option_is_found_by_its_letters():
    assert nearest("gqq", ["gqa", "mha", "mla"]) == ": did you mean gqa?"
    assert nearest("zzz", ["b", "a"]) == ": use one of a, b"
    assert nearest("zzz", [f"x{i}" for i in range(21)]) == ""
