"""Training compute: what a parameter and a token take of it, and which runs have one budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scantling.study.huber import Array

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6ND, forward and backward (Kaplan et al. 2020, section 2.1)."""

SAME_BUDGET = 0.05
"""Runs have one budget where their FLOPs, in order, differ by at most this share from one to the next."""

BEYOND = 100.0
"""How far above the largest run's FLOPs a law is drawn and asked."""


def grouped(log_compute: Array, tolerance: float = SAME_BUDGET) -> list[np.ndarray]:
    """Rows of each budget, in order of budgets."""
    order = np.argsort(log_compute, kind="stable")
    steps = np.flatnonzero(np.diff(log_compute[order]) > np.log1p(tolerance)) + 1
    return np.split(order, steps)


def larger(compute: ArrayLike, cutoff: ArrayLike) -> NDArray[np.bool_]:
    """Which runs have a larger budget than one of `cutoff` FLOPs."""
    return np.asarray(compute) > np.asarray(cutoff) * (1 + SAME_BUDGET)


def drawn_budgets(compute: Array, points: int) -> Array:
    """FLOPs at which a law is drawn: from the smallest run's to `BEYOND` the largest's."""
    return np.geomspace(compute.min(), BEYOND * compute.max(), points)
