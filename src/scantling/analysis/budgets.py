"""Training compute: what a parameter and a token take of it, and which runs have one budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scantling.analysis.huber import Array

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6ND, forward and backward (Kaplan et al. 2020, section 2.1)."""

SAME_BUDGET = 0.05
"""Runs have one budget where their FLOPs, in order, differ by at most this share from one to the next."""

MOST_SIZES = 12
"""Sizes in a figure that has a line for each."""

BEYOND = 100.0
"""How far above the largest run's FLOPs a law is drawn and asked."""


def grouped(logs: Array, tolerance: float = SAME_BUDGET) -> list[np.ndarray]:
    """Rows of each budget, or of each size, in its order, by logarithms."""
    order = np.argsort(logs, kind="stable")
    steps = np.flatnonzero(np.diff(logs[order]) > np.log1p(tolerance)) + 1
    return np.split(order, steps)


def repeated(n: Array) -> list[np.ndarray]:
    """Rows of each size, smallest first; none where sizes are too many, or have too few runs, for curves."""
    of_sizes = grouped(np.log(n))
    return of_sizes if len(of_sizes) <= min(MOST_SIZES, len(n) // 2) else []


def larger(compute: ArrayLike, cutoff: ArrayLike) -> NDArray[np.bool_]:
    """Which runs have a larger budget than one of `cutoff` FLOPs."""
    return np.asarray(compute) > np.asarray(cutoff) * (1 + SAME_BUDGET)


def drawn_budgets(compute: Array, points: int) -> Array:
    """FLOPs at which a law is drawn: from the smallest run's to `BEYOND` the largest's."""
    return np.geomspace(compute.min(), BEYOND * compute.max(), points)
