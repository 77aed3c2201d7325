"""Filters of the next token's distribution against those of `transformers`."""

from typing import Any, cast

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from scantling.inference.sampling import GenerationSettings, seen_tokens

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
NO_IDS = cast(torch.LongTensor, None)
"""Filters look at the scores alone."""
LOGITS = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))


def settings(n_tokens: int, **given) -> GenerationSettings:
    return GenerationSettings(n_tokens=n_tokens, **(PLAIN | given))


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("top_k", [None, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.9])
@pytest.mark.parametrize("min_p", [None, 0.02, 0.5])
@pytest.mark.parametrize("typical_p", [None, 0.2, 0.9])
def test_filters_equal_transformers(temperature, top_k, top_p, min_p, typical_p):
    """In the order in which `transformers` applies them: temperature, top-k, top-p, min-p, typical."""
    scores = TemperatureLogitsWarper(temperature)(NO_IDS, LOGITS)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(NO_IDS, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(NO_IDS, scores)
    if min_p is not None:
        scores = MinPLogitsWarper(min_p)(NO_IDS, scores)
    if typical_p is not None:
        scores = TypicalLogitsWarper(typical_p)(NO_IDS, scores)
    given = settings(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    assert_close(given.probabilities(LOGITS), scores.softmax(-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("penalty", [0.7, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(penalty):
    texts = torch.randint(200, (50, 9), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(cast(torch.LongTensor, texts), LOGITS)
    given = settings(1, repetition_penalty=penalty)
    seen = seen_tokens(texts.tolist(), 200, LOGITS.device)
    assert_close(given.probabilities(LOGITS, seen), expected.softmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": "high"},
        {"min_p": -0.1},
        {"typical_p": 2},
        {"repetition_penalty": 0.0},
        {"beams": 0},
        {"length_penalty": float("inf")},
        {"draft_tokens": 0},
        {"precision": "int4"},
        {"context": 0},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match="cache" if name == "precision" else name):
        settings(1, **wrong)


def test_top_p_by_hand():
    """Holtzman et al. 2020, eq. 2: the smallest set of likeliest tokens that holds at least p."""
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in (
        (0.4, [0, 1, 0, 0]),
        (0.6, [0, 2 / 3, 0, 1 / 3]),
        (0.8, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    ):
        p = settings(1, top_p=top_p).probabilities(logits)
        assert_close(p, torch.tensor([kept], dtype=torch.float32))


def test_temperature_zero_is_the_limit():
    near = settings(1, temperature=1e-4).probabilities(LOGITS)
    assert_close(settings(1, **GREEDY).probabilities(LOGITS), near, rtol=0, atol=1e-3)


@pytest.mark.parametrize("temperature", [1e-38, 1e-300])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_the_tiniest_temperature_is_near_zero_too(temperature, top_p):
    """Logits divided by it are infinite in float32, and it is 0 there itself."""
    near = settings(1, temperature=temperature, top_p=top_p).probabilities(LOGITS)
    assert_close(near, settings(1, **GREEDY).probabilities(LOGITS), rtol=0, atol=0)


def test_bfloat16_logits_make_a_distribution():
    p = settings(1, temperature=0.7, top_p=0.95).probabilities(LOGITS.bfloat16())
    assert_close(p.sum(-1), torch.ones(50))
