"""RoPE's frequencies for contexts longer than those of training: `pos/scaling=`.

Each is a function of the frequencies θ^(-2i/R), i = 0 … R/2 - 1, and of θ; it gives other frequencies and a
factor on turned queries and keys. A channel's wavelength is 2π over its frequency.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from scantling.model.checks import check_positive, check_whole

FrequencyScaling = Callable[[Tensor, float], tuple[Tensor, float]]


def unscaled(frequencies_F: Float[Tensor, " F"], theta: float) -> tuple[Float[Tensor, " F"], float]:
    """The frequencies of training."""
    return frequencies_F, 1.0


def linear(
    frequencies_F: Float[Tensor, " F"], theta: float, *, factor: float
) -> tuple[Float[Tensor, " F"], float]:
    """Position interpolation: all frequencies divided by `factor`.

    Chen et al. 2023, arXiv:2306.15595, eq. 4.
    """
    check_positive("factor", factor)
    return frequencies_F / factor, 1.0


def ntk(
    frequencies_F: Float[Tensor, " F"], theta: float, *, factor: float
) -> tuple[Float[Tensor, " F"], float]:
    """NTK-aware: the base becomes θ·factor^(R/(R-2)), so that the lowest frequency is divided by `factor` and
    the highest stays. Peng et al. 2023 (YaRN), arXiv:2309.00071, §3.1, after bloc97.
    """
    check_positive("factor", factor)
    pairs = len(frequencies_F)
    exponents = torch.arange(pairs, device=frequencies_F.device) / max(1, pairs - 1)
    return frequencies_F * factor**-exponents, 1.0


def yarn(
    frequencies_F: Float[Tensor, " F"],
    theta: float,
    *,
    factor: float,
    original_seq_len: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
    attention_factor: float | None,
) -> tuple[Float[Tensor, " F"], float]:
    """YaRN: channels that turn more than `beta_fast` times within the original context stay, those that turn
    less than `beta_slow` times are interpolated, those between are blended. Peng et al. 2023,
    arXiv:2309.00071, §3.2 and §3.4.

    Turned queries and keys grow by `attention_factor`; null is 0.1·ln(factor) + 1.
    """
    for name, value in {"factor": factor, "beta_fast": beta_fast, "beta_slow": beta_slow}.items():
        check_positive(name, value)
    check_whole("original_seq_len", original_seq_len)
    check_positive("attention_factor", attention_factor, or_null=True)
    if beta_slow > beta_fast:
        raise ValueError(f"beta_slow={beta_slow} is above beta_fast={beta_fast}")
    if theta <= 1:
        raise ValueError(f"theta={theta} gives no channel a longer wave than another: YaRN needs more than 1")
    width = 2 * len(frequencies_F)

    def channel(turns: float) -> float:
        """The pair that turns this many times within the original context."""
        return width * math.log(original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = torch.arange(width // 2, device=frequencies_F.device, dtype=torch.float32) - low
    interpolated = (ramp / max(high - low, 0.001)).clamp(0, 1)
    blended = frequencies_F / factor * interpolated + frequencies_F * (1 - interpolated)
    if attention_factor is None:
        attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return blended, attention_factor


def llama3(
    frequencies_F: Float[Tensor, " F"],
    theta: float,
    *,
    factor: float,
    original_seq_len: int,
    low_frequency_factor: float,
    high_frequency_factor: float,
) -> tuple[Float[Tensor, " F"], float]:
    """Llama 3.1: wavelengths above original/low are interpolated, those below original/high
    stay, those between are blended linearly in their number of turns. arXiv:2407.21783, §3.4.2,
    and Meta's reference code.
    """
    check_positive("factor", factor)
    check_whole("original_seq_len", original_seq_len)
    if low_frequency_factor > high_frequency_factor:
        raise ValueError(
            f"low_frequency_factor={low_frequency_factor} "
            f"is above high_frequency_factor={high_frequency_factor}"
        )
    turns = original_seq_len * frequencies_F / (2 * math.pi)
    kept = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    kept = kept.clamp(0, 1)
    return frequencies_F * (kept + (1 - kept) / factor), 1.0
