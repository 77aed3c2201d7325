"""Compute-optimal sizes without a form for the loss (Hoffmann et al. 2022, sections 3.1 and 3.2).

Approach 2 takes the best size of each budget, approach 1 the envelope of training curves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import Akima1DInterpolator

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, SAME_BUDGET, grouped
from scantling.analysis.findings import FewOptima, Finding, OptimaAtEdge, ParabolaBias, UndecayedCurves
from scantling.analysis.huber import Array
from scantling.analysis.resampling import expanded_percentiles
from scantling.analysis.scaling import FEWEST_BUDGETS, Interval, refit_hoffmann

FEWEST_SIZES = 4
"""Sizes of a budget, for a minimum among them."""

NOTABLE_BIAS = 0.25
"""Bias of the parabolas, in standard deviations of what noise adds to the exponent."""

KNOWN = 10**6
"""Degrees of freedom of a noise that was not estimated from these runs."""

Minimum = Literal["parabola", "akima"]


@dataclass(frozen=True)
class PowerLaw:
    """N_opt = coefficient·C^exponent through the best size of each budget.

    Intervals come from resampling runs or noise.
    """

    exponent: float
    coefficient: float
    exponent_interval: Interval
    budgets: Array
    optima: Array
    exponents_S: Array
    warnings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Valley:
    """Runs of one budget, and the parabola through them, log of loss against log N."""

    compute: float
    rows: Array
    """Which runs."""
    sizes: Array
    """N along the parabola, and `losses` its loss."""
    losses: Array
    lowest: tuple[float, float]
    """N and loss where it is lowest."""


def valleys(N: Array, compute: Array, loss: Array) -> list[Valley]:
    """A valley for each budget, from little compute to much."""
    found = []
    for rows in grouped(np.log(compute)):
        log_n, log_loss = np.log(N[rows]), np.log(loss[rows])
        fine = np.linspace(log_n.min(), log_n.max(), 40)
        low = parabola_minimum(log_n, log_loss[None])
        losses, (least,) = (np.exp(parabola(log_n, log_loss, at)) for at in (fine, low))
        lowest = (float(np.exp(low[0])), float(least))
        found.append(Valley(compute[rows].mean(), rows, np.exp(fine), losses, lowest))
    return found


def parabola(log_n: Array, log_loss: Array, at: Array) -> Array:
    """Log losses at the sizes `at`, by the least-squares parabola through the points."""
    centre = log_n.mean()
    return np.polyval(np.polyfit(log_n - centre, log_loss, 2), at - centre)


def fit_isoflop(
    N: ArrayLike,
    compute: ArrayLike,
    loss: ArrayLike,
    *,
    minimum: Minimum = "parabola",
    resamples: int = 1000,
    noise: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    tolerance: float = SAME_BUDGET,
) -> PowerLaw:
    """Approach 2: the size with the lowest loss in each budget, and a line through them in logarithms.

    `minimum`: of a parabola in log N (Hoffmann et al. 2022), or of Akima's spline (Porian et al. 2024,
    section 3.1), which forces no shape. Runs belong to one budget when their FLOPs differ by at most
    `tolerance`. The bootstrap keeps the grid and draws noise of log loss around each budget's
    parabola: of standard deviation `noise` if that is known (from seeds), else that of what the
    parabolas leave in all budgets.

    Raises ValueError for fewer than two budgets, and for a budget of fewer than four sizes.
    """
    n, c, y = (np.log(np.asarray(x, dtype=float)) for x in (N, compute, loss))
    groups = isoflop_groups(n, c, tolerance)
    budgets = np.array([c[group].mean() for group in groups])
    smooth = np.empty_like(y)
    for g in groups:
        smooth[g] = parabola(n[g], y[g], n[g])
    degrees_of_freedom = max(len(y) - 3 * len(groups), 1)
    if noise is None:
        noise = float(np.sqrt(((y - smooth) ** 2).sum() / degrees_of_freedom))
    else:
        degrees_of_freedom = KNOWN
    optimum = parabola_minimum if minimum == "parabola" else akima_minimum
    optima = best_sizes(n, y[None], groups, optimum)[0]
    exponent, intercept = np.polyfit(budgets, optima, 1)
    draws = smooth + np.random.default_rng(seed).normal(0, noise, (resamples, len(y)))
    drawn_optima, clean_optima = (best_sizes(n, losses, groups, optimum) for losses in (draws, smooth[None]))
    # What noise adds to the estimator on smooth losses: on these losses, noisy already, it would count twice.
    exponents_S = exponent + slopes(budgets, drawn_optima) - slopes(budgets, clean_optima)
    low, high = expanded_percentiles(exponents_S, level=level, degrees_of_freedom=degrees_of_freedom)
    warnings = doubts_of_grid(n, c, groups, optima)
    if minimum == "parabola" and len(y) > 6:
        bias, spread = parabola_bias(n, c, y, groups), float(exponents_S.std())
        if abs(bias) > NOTABLE_BIAS * spread:
            warnings.append(ParabolaBias(bias, spread))
    return of_logs(exponent, intercept, (low, high), budgets, optima, exponents_S, warnings)


def of_logs(
    exponent: float,
    intercept: float,
    interval: tuple[Array, Array],
    budgets: Array,
    optima: Array,
    exponents_S: Array,
    warnings: Iterable[Finding],
) -> PowerLaw:
    """The law whose line was fitted through logs of best sizes over logs of budgets."""
    return PowerLaw(
        exponent=float(exponent),
        coefficient=float(np.exp(intercept)),
        exponent_interval=(float(interval[0]), float(interval[1])),
        budgets=np.exp(budgets),
        optima=np.exp(optima),
        exponents_S=exponents_S,
        warnings=tuple(warnings),
    )


def isoflop_groups(log_n: Array, log_c: Array, tolerance: float) -> list[np.ndarray]:
    """Rows of each budget. Raises ValueError for fewer than two, and for one of fewer than four sizes."""
    groups = grouped(log_c, tolerance)
    if len(groups) < 2:
        raise ValueError(
            "one budget only: no exponent of compute can be seen; two are the least, five are usual"
        )
    for group in groups:
        sizes = len(np.unique(log_n[group]))
        if sizes < FEWEST_SIZES:
            budget = np.exp(log_c[group[0]])
            raise ValueError(f"the budget of {budget:.3g} FLOPs has {sizes} sizes: four are the least")
    return groups


def doubts_of_grid(log_n: Array, log_c: Array, groups: Sequence[np.ndarray], optima: Array) -> list[Finding]:
    """Whether budgets are few, and which have their optimum, log of N, at the end of their sizes."""
    found: list[Finding] = [FewOptima(len(groups))] if len(groups) < FEWEST_BUDGETS else []
    at_edge = [
        float(np.exp(log_c[g[0]]))
        for g, best in zip(groups, optima, strict=True)
        if not log_n[g].min() < best < log_n[g].max()
    ]
    return [*found, OptimaAtEdge(tuple(at_edge))] if at_edge else found


def parabola_minimum(log_n: Array, log_loss_SN: Array) -> Array:
    """Where a parabola through the points is lowest, (S,); the lowest point where it opens downwards."""
    centre = log_n.mean()
    square, slope, _ = np.polyfit(log_n - centre, log_loss_SN.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = np.clip(centre - slope / (2 * square), log_n.min(), log_n.max())
    return np.where(square > 0, lowest, log_n[log_loss_SN.argmin(axis=1)])


def akima_minimum(log_n: Array, log_loss_SN: Array, points: int = 512) -> Array:
    """Where Akima's spline through the mean loss of each size is lowest, (S,).

    Akima 1970, doi:10.1145/321607.321609.
    """
    sizes, which = np.unique(log_n, return_inverse=True)
    means = np.stack([log_loss_SN[:, which == i].mean(axis=1) for i in range(len(sizes))])
    fine = np.linspace(sizes[0], sizes[-1], points)
    return fine[Akima1DInterpolator(sizes, means)(fine).argmin(axis=0)]


def best_sizes(
    log_n: Array,
    log_loss_SN: Array,
    groups: Sequence[np.ndarray],
    minimum: Callable[[Array, Array], Array] = parabola_minimum,
) -> Array:
    """(S, G): log of the size with the lowest loss in each budget."""
    return np.stack([minimum(log_n[g], log_loss_SN[:, g]) for g in groups], axis=1)


def slopes(x: Array, y_SN: Array) -> Array:
    """Slopes of least-squares lines, (S,)."""
    centred = x - x.mean()
    return y_SN @ centred / (centred @ centred)


def parabola_bias(log_n: Array, log_c: Array, log_loss: Array, groups: Sequence[np.ndarray]) -> float:
    """The error of the parabolas' exponent on this grid without noise, if Hoffmann's form
    fitted here were the truth.
    """
    n, d = np.exp(log_n), np.exp(log_c - log_n) / FLOPS_PER_PARAMETER_AND_TOKEN
    law = refit_hoffmann(n, d, np.exp(log_loss))
    clean = np.log(law.predict(N=n, D=d))
    budgets = np.array([log_c[g].mean() for g in groups])
    exponent = slopes(budgets, best_sizes(log_n, clean[None], groups))[0]
    return float(exponent - law.beta / (law.alpha + law.beta))


def fit_envelope(
    run: ArrayLike,
    N: ArrayLike,
    D: ArrayLike,
    loss: ArrayLike,
    *,
    k: float = FLOPS_PER_PARAMETER_AND_TOKEN,
    points: int = 200,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PowerLaw:
    """Approach 1: the run with the lowest loss at each of many budgets, and a line through their sizes.

    A row is one point of a training curve: `run` names the curve. Losses between logged points are
    interpolated in logarithms; a budget counts while at least two curves cross it and the best size is
    neither the smallest nor the largest of them. The bootstrap draws runs. Always warns: points before a
    run's end are taken at a learning rate that has not decayed, which flatters long runs, and the minimum of
    noisy curves is biased.

    Raises ValueError where no budget is crossed by runs of three sizes.
    """
    names, which = np.unique(np.asarray(run), return_inverse=True)
    n, d, y = (np.log(np.asarray(x, dtype=float)) for x in (N, D, loss))
    c = np.log(k) + n + d
    grid = np.linspace(c.min(), c.max(), points)
    rows = [np.flatnonzero(which == i) for i in range(len(names))]
    rows = [of_run[np.argsort(c[of_run])] for of_run in rows]
    curves = np.stack([curve_on_grid(grid, c[of_run], y[of_run]) for of_run in rows])
    sizes = np.array([n[of_run[0]] for of_run in rows])
    slope, intercept, budgets, optima = envelope_line(grid, curves, sizes)
    if not np.isfinite(slope):
        raise ValueError("no budget is crossed by training curves of at least three sizes")
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(names), size=len(names)) for _ in range(resamples))
    exponents_S = np.array([envelope_line(grid, curves[runs], sizes[runs])[0] for runs in drawn])
    low, high = expanded_percentiles(exponents_S, level=level, degrees_of_freedom=len(np.unique(sizes)) - 2)
    return of_logs(slope, intercept, (low, high), budgets, optima, exponents_S, [UndecayedCurves()])


def curve_on_grid(grid: Array, log_c: Array, log_loss: Array) -> Array:
    """A training curve's log loss at the budgets of `grid`, infinite where it has none."""
    curve = np.full(len(grid), np.inf)
    inside = (grid >= log_c[0]) & (grid <= log_c[-1])
    curve[inside] = np.interp(grid[inside], log_c, log_loss)
    return curve


def envelope_line(grid: Array, curves: Array, sizes: Array) -> tuple[float, float, Array, Array]:
    """Slope and intercept of log best size over log budget, and the points that the line goes through.

    NaN where all these have one size. `curves`: log loss [run, budget]; `sizes`: log of N, by run.
    """
    crossed = np.isfinite(curves)
    best = sizes[curves.argmin(axis=0)]
    smallest = np.where(crossed, sizes[:, None], np.inf).min(axis=0)
    largest = np.where(crossed, sizes[:, None], -np.inf).max(axis=0)
    kept = (smallest < best) & (best < largest)
    if len(np.unique(best[kept])) < 2:
        return np.nan, np.nan, grid[kept], best[kept]
    slope, intercept = np.polyfit(grid[kept], best[kept], 1)
    return slope, intercept, grid[kept], best[kept]
