"""Which runs a bootstrap draws, and the interval that its estimates give."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

from scantling.study.huber import Array


def run_weights(groups_N: ArrayLike, resamples: int, rng: np.random.Generator) -> Array:
    """(S, N): how often each row is drawn when runs are drawn with replacement; rows of one run come together."""
    _, run_of_row = np.unique(np.asarray(groups_N), return_inverse=True)
    n_runs = int(run_of_row.max()) + 1
    counts = rng.multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=resamples)
    return counts[:, run_of_row].astype(float)


def drawn_residuals(residual_N: Array, n_parameters: int, resamples: int, rng: np.random.Generator) -> Array:
    """(S, N): residuals drawn with replacement, centred, smoothed, and scaled up by √(n/(n − p)) for what the fit took up.

    A fit by Huber's function of small δ passes through about p of the runs. Drawn as they are, residuals pile up at zero,
    and intervals come out too narrow; drawn with normal noise of Silverman's bandwidth on top and shrunk back to their
    variance they do not (De Angelis, Hall & Young 1993, J. Am. Stat. Assoc. 88:1310).
    """
    n = len(residual_N)
    centred = residual_N - residual_N.mean()
    spread = centred.std()
    quartiles = np.subtract(*np.quantile(centred, [0.75, 0.25])) / 1.349
    bandwidth = 1.06 * min(spread, quartiles) * n**-0.2
    drawn = rng.choice(centred, size=(resamples, n)) + bandwidth * rng.standard_normal((resamples, n))
    shrinkage = spread / max(float(np.hypot(spread, bandwidth)), np.finfo(float).tiny)
    return drawn * shrinkage * np.sqrt(n / (n - n_parameters))


def expanded_percentiles(
    estimates: Array, *, level: float, degrees_of_freedom: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bounds that hold `level` of the estimates (S, …), widened as Student's t is wider than a normal.

    Plain percentiles of few runs are too narrow (Hesterberg 2015, doi:10.1080/00031305.2015.1089789, section 5.2).
    Estimates that are not finite count at neither end.
    """
    tail = float(norm.cdf(t.ppf((1 - level) / 2, max(degrees_of_freedom, 1))))
    low, high = np.nanquantile(np.where(np.isfinite(estimates), estimates, np.nan), [tail, 1 - tail], axis=0)
    return low, high
