"""Which runs a bootstrap draws, and the interval that its estimates give."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from scantling.analysis.huber import Array


def run_weights(groups_N: ArrayLike, resamples: int, rng: np.random.Generator) -> Array:
    """How often each row is drawn, (S, N), when runs are drawn with replacement.

    Rows of one run are drawn together.
    """
    _, run_of_row = np.unique(np.asarray(groups_N), return_inverse=True)
    n_runs = int(run_of_row.max()) + 1
    counts = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=resamples)
    return counts[:, run_of_row].astype(float)


def drawn_residuals(
    residual_N: Array, n_parameters: int, shape: tuple[int, int], rng: np.random.Generator
) -> Array:
    """Residuals drawn with replacement, without the p smallest, and smoothed.

    A fit by Huber's function of small δ, much like a median, passes through about p of the runs: their
    residuals say nothing of the noise (McKean & Schrader 1987, in Statistical Data Analysis Based on the
    L1-Norm), and left in they make intervals too narrow. The others, n − p, have the variance Σ(r − r̄)²/(n −
    p − 1). Normal noise of Silverman's bandwidth on top, shrunk back to that variance, gives the density at
    zero, on which such a fit's spread rests (De Angelis, Hall & Young 1993, J. Am. Stat. Assoc. 88:1310).
    """
    n = len(residual_N)
    pool = residual_N[np.argsort(np.abs(residual_N))[n_parameters:]]
    pool = (pool - pool.mean()) * np.sqrt(len(pool) / (len(pool) - 1))
    spread = pool.std()
    quartiles = np.subtract(*np.quantile(pool, [0.75, 0.25])) / 1.349
    bandwidth = 1.06 * min(spread, quartiles) * n**-0.2
    drawn = rng.choice(pool, size=shape) + bandwidth * rng.standard_normal(shape)
    return drawn * spread / max(float(np.hypot(spread, bandwidth)), np.finfo(float).tiny)


def density_degrees_of_freedom(n: int) -> float:
    """Degrees of freedom with which the spread of `drawn_residuals`' fits is known: 1/(2·cv²).

    cv² of the density at zero is R(K)/(n·h·f(0)), for a normal kernel of that bandwidth on normal residuals
    (Silverman 1986, Density Estimation, section 3.3): 0.667·n^-0.8.
    """
    return 0.75 * n**0.8


def expanded_percentiles(
    estimates: Array, *, level: float, degrees_of_freedom: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bounds that hold `level` of the estimates (S, …), widened as Student's t is wider than a normal.

    Widened is each bound's distance from the median. Plain percentiles of few runs are too narrow (Hesterberg
    2015, doi:10.1080/00031305.2015.1089789, section 5.2). Where all estimates are positive the lower bound is
    as many times farther in logarithms, and positive too. Estimates that are not finite count at neither end.
    """
    tail = (1 - level) / 2
    wider = t.ppf(tail, max(degrees_of_freedom, 1)) / norm.ppf(tail)
    finite = np.where(np.isfinite(estimates), estimates, np.nan)
    low, median, high = np.nanquantile(finite, [tail, 0.5, 1 - tail], axis=0)
    positive = np.nanmin(finite, axis=0) > 0
    ratio = np.where(positive, low, 1) / np.where(positive, median, 1)
    below = np.where(positive, median * ratio**wider, median + wider * (low - median))
    return below, median + wider * (high - median)
