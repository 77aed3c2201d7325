"""Scaled frequencies against `transformers` and the papers' formulas."""

import math
import re
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from scantling.model.pos import RoPE, inverse_frequencies
from scantling.model.rope_scaling import linear, llama3, ntk, unscaled, yarn

H, ORIGINAL = 2, 512
YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "attention_factor": None}


def yarn_pair(factor: float, **settings):
    ours = partial(yarn, factor=factor, original_seq_len=ORIGINAL, **YARN | settings)
    return ours, {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": ORIGINAL,
    } | settings


def llama3_pair(factor: float, low: float, high: float):
    ours = partial(
        llama3, factor=factor, original_seq_len=ORIGINAL, low_frequency_factor=low, high_frequency_factor=high
    )
    theirs = {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    return ours, {"rope_type": "llama3", "original_max_position_embeddings": ORIGINAL} | theirs


PAIRS = {
    "linear": (partial(linear, factor=4.0), {"rope_type": "linear", "factor": 4.0}),
    "yarn": yarn_pair(4.0),
    "yarn_16": yarn_pair(16.0, beta_fast=16.0, beta_slow=2.0),
    "yarn_not_truncated": yarn_pair(4.0, truncate=False),
    "yarn_given_factor": yarn_pair(4.0, attention_factor=1.5),
    "yarn_unscaled": yarn_pair(1.0),
    "llama3": llama3_pair(8.0, 1.0, 4.0),
    "llama3_wide": llama3_pair(32.0, 0.5, 20.0),
}


def theirs_of(theta: float, d_head: int, parameters: dict) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=H * d_head,
        num_attention_heads=H,
        head_dim=d_head,
        max_position_embeddings=ORIGINAL * int(parameters["factor"]),
        rope_parameters={"rope_theta": theta, **parameters},
    )


@pytest.mark.parametrize(("ours", "parameters"), PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(("theta", "d_head"), [(10000.0, 128), (500000.0, 64), (10000.0, 16)])
def test_scaling_equals_transformers(ours, parameters, theta, d_head):
    config = theirs_of(theta, d_head, dict(parameters))
    expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    given = inverse_frequencies(d_head, theta, torch.device("cpu"))
    frequencies, factor = ours(given, theta)
    assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert factor == pytest.approx(expected_factor, rel=1e-12)
    assert torch.allclose(frequencies, given, rtol=1e-6, atol=0) is (parameters["factor"] == 1.0)

    x, positions = (
        torch.randn(1, 20, H, d_head, generator=torch.Generator().manual_seed(0)),
        torch.arange(20)[None],
    )
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    turned, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    rope = RoPE(H * d_head, H, d_head, theta=theta, fraction=1.0, interleaved=False, scaling=ours)
    assert_close(rope.rotate(positions)(x), turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("d_head", [128, 16])
def test_ntk_equals_transformers_dynamic_one_at_a_fixed_length(factor, d_head):
    """With their factor 1, theirs at `factor` times the original length is ours."""
    config = theirs_of(10000.0, d_head, {"rope_type": "dynamic", "factor": 1.0})
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=int(factor * ORIGINAL))
    frequencies, one = ntk(inverse_frequencies(d_head, 10000.0, torch.device("cpu")), 10000.0, factor=factor)
    assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert one == 1.0


def test_ntk_by_formula():
    """Peng et al. 2023, §3.1: the base becomes θ·s^(R/(R-2)); the lowest frequency is divided by s, the
    highest stays."""
    R, theta, s = 32, 10000.0, 4.0
    base = theta * s ** (R / (R - 2))
    expected = torch.tensor([base ** (-2 * i / R) for i in range(R // 2)])
    given = inverse_frequencies(R, theta, torch.device("cpu"))
    frequencies, _ = ntk(given, theta, factor=s)
    assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert_close(given / frequencies, torch.logspace(0, math.log10(s), R // 2), rtol=1e-5, atol=0)


def test_unscaled_is_the_frequencies_themselves():
    given = inverse_frequencies(16, 10000.0, torch.device("cpu"))
    assert unscaled(given, 10000.0) == (given, 1.0)


def test_bounds_the_wrong_way_round_are_named():
    ours, _ = yarn_pair(2.0, beta_fast=1.0, beta_slow=32.0)
    with pytest.raises(ValueError, match=re.escape("beta_slow=32.0 is above beta_fast=1.0")):
        ours(inverse_frequencies(16, 10000.0, torch.device("cpu")), 10000.0)
