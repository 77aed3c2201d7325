"""Learning-rate schedules: `schedule=`. Each gives the factor of the peak rate at a step of `total`.

They raise ValueError for a negative warm-up, and for a floor or a share of decay that is not from 0 to 1.
"""

from __future__ import annotations

import math

from scantling.model.checks import check_not_negative, check_share


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` in steps, or below 1 as a share of the run."""
    check_not_negative("schedule.warmup", warmup)
    return round(warmup * total) if warmup < 1 else round(warmup)


def rising(step: int, total: int, warmup: float) -> float:
    """(step + 1) / (warm-up + 1), at most 1."""
    return min(1.0, (step + 1) / (warmup_steps(warmup, total) + 1))


def progress(step: int, total: int, warmup: float) -> float:
    """0 at the end of warm-up, 1 at the end of the run."""
    start = warmup_steps(warmup, total)
    return min(1.0, max(0.0, (step - start) / max(1, total - start)))


def down_to(floor: float, share: float) -> float:
    """The factor at `share` of the way from `floor` to 1."""
    check_share("schedule.floor", floor)
    return floor + (1 - floor) * share


def cosine(step: int, total: int, *, warmup: float, floor: float) -> float:
    """From 1 to `floor` on half a cosine. Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5."""
    decay = 0.5 * (1 + math.cos(math.pi * progress(step, total, warmup)))
    return rising(step, total, warmup) * down_to(floor, decay)


def linear(step: int, total: int, *, warmup: float, floor: float) -> float:
    """From 1 to `floor` on a line. To zero it beats cosine in Bergsma et al. 2025, arXiv:2502.15938."""
    return rising(step, total, warmup) * down_to(floor, 1 - progress(step, total, warmup))


def wsd(step: int, total: int, *, warmup: float, floor: float, decay: float) -> float:
    """Warm-up, stable, then over the last `decay` share of the run to `floor` as 1 - √x.

    Hu et al. 2024, arXiv:2404.06395, §4; the shape is Hägele et al. 2024, arXiv:2405.18392, eq. 1.
    """
    check_share("schedule.decay", decay)
    left = max(0.0, (step - (1 - decay) * total) / max(1.0, decay * total))
    return rising(step, total, warmup) * down_to(floor, 1 - math.sqrt(min(1.0, left)))


def constant(step: int, total: int, *, warmup: float) -> float:
    """1 after warm-up."""
    return rising(step, total, warmup)
