"""Fits of scaling laws: parameters, their intervals, predictions, and what to distrust about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import f

from scantling.analysis.budgets import FLOPS_PER_PARAMETER_AND_TOKEN, grouped
from scantling.analysis.findings import FewBudgets, Finding, FloorLost, NotFalling, WideBootstrap
from scantling.analysis.forms import HOFFMANN, Form, PowerSum, Sizes
from scantling.analysis.huber import Array, Optima, huber, minimise
from scantling.analysis.observations import numbered
from scantling.analysis.resampling import (
    density_degrees_of_freedom,
    drawn_residuals,
    expanded_percentiles,
    run_weights,
)

Interval = tuple[float, float]

HUBER_DELTA = 1e-3
"""Huber's δ of log loss, as in Hoffmann et al. 2022, approach 3."""

SAME_OPTIMUM = 1e-6
"""Objectives that differ by less than this share are one optimum."""

LOST_FLOOR = 0.05
"""An E below this share of the lowest loss is not determined."""

FEWEST_DEGREES = 3
"""Degrees of freedom for intervals: fewer residuals do not say how large the noise is."""

FEWEST_BUDGETS = 4
"""Budgets that an exponent of compute should rest on."""

EXPONENT_BOUND = 3.0
"""Starts that end beyond it fitted a few outliers; no published exponent is above 1.3."""


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    `parameters`: as published. `objective`: sum of Huber's function over runs. `found`: share of starts that
    ended there. `resampled_SP`: θ of every resample, none without a bootstrap; `spread_degrees`: the degrees
    of freedom with which their spread is known, None: those of the residuals. `warnings`: reasons to distrust
    it, which travel with the fit to whatever prints it.
    """

    form: Form
    sizes: Sizes
    loss: Array
    theta_P: Array
    objective: float
    found: float
    delta: float
    resampled_SP: Array | None = None
    spread_degrees: float | None = None
    level: float = 0.95
    warnings: tuple[Finding, ...] = ()
    parameters: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        published = self.form.published(self.theta_P[None])
        object.__setattr__(self, "parameters", {name: float(value[0]) for name, value in published.items()})

    def __getattr__(self, name: str) -> float:
        """`fit.alpha` is `fit.parameters["alpha"]`."""
        if name != "parameters" and name in self.form.parameters:
            return self.parameters[name]
        raise AttributeError(name)

    @property
    def degrees_of_freedom(self) -> int:
        """Runs less parameters."""
        return len(self.loss) - len(self.theta_P)

    @property
    def residuals(self) -> Array:
        """Log of observed over predicted loss, (N,)."""
        return np.log(self.loss) - self.form.predictor(self.sizes)(self.theta_P[None])[0][0]

    @property
    def intervals(self) -> dict[str, Interval]:
        """By parameter, at `level`; raises ValueError where no bootstrap was asked for."""
        return {
            name: self.interval_of(values) for name, values in self.form.published(self.resamples()).items()
        }

    @property
    def standard_errors(self) -> dict[str, float]:
        """Standard deviation of the bootstrap's estimates, by parameter."""
        return {name: float(x.std(ddof=1)) for name, x in self.form.published(self.resamples()).items()}

    def resamples(self) -> Array:
        """θ of every resample, (S, P); raises ValueError where no bootstrap was asked for."""
        if self.resampled_SP is None:
            raise ValueError("this fit has no intervals: fit with resamples=N, 4000 is usual")
        return self.resampled_SP

    def interval_of(self, estimates_S: Array) -> Interval:
        """The interval of any number computed from each resample's parameters."""
        low, high = self.bounds(estimates_S)
        return float(low), float(high)

    def bounds(self, estimates: Array) -> tuple[Array, Array]:
        """The bounds of estimates (S, …) at `level`."""
        degrees = self.degrees_of_freedom if self.spread_degrees is None else self.spread_degrees
        return expanded_percentiles(estimates, level=self.level, degrees_of_freedom=degrees)

    def predict(self, **sizes: ArrayLike) -> Array:
        """Loss at the sizes that the form takes, (N,)."""
        return np.exp(self.form.predictor(vectors(sizes))(self.theta_P[None])[0][0])

    def predict_interval(self, *, seed: int = 0, **sizes: ArrayLike) -> tuple[Array, Array]:
        """Bounds (N,) of a new run's loss: by the law's uncertainty and a run's own noise."""
        rng = np.random.default_rng(seed)
        logs_SN = self.form.predictor(vectors(sizes))(self.resamples())[0]
        noise_SN = drawn_residuals(self.residuals, len(self.theta_P), logs_SN.shape, rng)
        return self.bounds(np.exp(logs_SN + noise_SN))

    def with_warnings(self, *warnings: Finding) -> Fit:
        """A copy with further reasons for doubt."""
        return replace(self, warnings=(*self.warnings, *warnings))


def vectors(sizes: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Each letter's values as an array of floats, (N,)."""
    return {letter: np.atleast_1d(np.asarray(x, dtype=float)) for letter, x in sizes.items()}


def fit(
    form: Form,
    sizes: Mapping[str, ArrayLike],
    loss: ArrayLike,
    *,
    delta: float = HUBER_DELTA,
    starts_SP: Array | None = None,
    resamples: int = 0,
    resampling: Literal["runs", "noise"] = "runs",
    runs: ArrayLike | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Fit:
    """The form's parameters that minimise Σ huber(log predicted − log observed), over all its starts.

    `starts_SP`: where to begin instead, such as `PowerSum.projected_starts`, a hundred times fewer.
    `resamples`: bootstrap estimates for intervals. `resampling`: "runs" draws runs, `runs` naming each
    row's (None: every row is one); "noise" keeps the sizes and draws residuals, for a planned grid
    whose budgets must all stay.

    Raises ValueError for values that are not positive and finite, and for too few rows for
    the parameters or intervals.
    """
    columns, losses = vectors(sizes), np.asarray(loss, dtype=float)
    check_sizes(form, columns, losses)
    if resamples and len(losses) < (fewest := len(form.parameters) + FEWEST_DEGREES):
        raise ValueError(
            f"{len(losses)} runs are too few for intervals of the {len(form.parameters)} parameters of "
            f"{form.formula}: at least {fewest} are needed"
        )
    predictor, target = form.predictor(columns), np.log(losses)
    ends = minimise(predictor, target, form.starts() if starts_SP is None else starts_SP, delta=delta)
    theta_P, found = best(form, ends.theta_SP, ends.objective_S)
    objective = float(huber(predictor(theta_P[None])[0][0] - target, delta).sum())
    fitted = Fit(form, columns, losses, theta_P, objective, found, delta, level=level)
    fitted = fitted.with_warnings(*doubts(fitted))
    if not resamples:
        return fitted
    rng = np.random.default_rng(seed)
    starts_KSP = np.repeat(refit_starts(fitted)[:, None], resamples, axis=1)
    if resampling == "runs":
        groups = np.arange(len(losses)) if runs is None else runs
        weights_SN = run_weights(groups, resamples, rng)
        drawn = minimise_from_each(form, predictor, target, starts_KSP, delta=delta, weights_SN=weights_SN)
        if np.median(np.abs(fitted.residuals)) > delta:
            fitted = fitted.with_warnings(WideBootstrap())
        return replace(fitted, resampled_SP=drawn.theta_SP)
    noise_SN = drawn_residuals(fitted.residuals, len(theta_P), (resamples, len(losses)), rng)
    noisy_SN = target - fitted.residuals + noise_SN
    drawn = minimise_from_each(form, predictor, noisy_SN, starts_KSP, delta=delta)
    degrees = min(density_degrees_of_freedom(len(losses)), fitted.degrees_of_freedom)
    return replace(fitted, resampled_SP=drawn.theta_SP, spread_degrees=degrees)


def fit_hoffmann(N: ArrayLike, D: ArrayLike, loss: ArrayLike, **settings) -> Fit:
    """E, A, B, alpha, beta of L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022, approach 3).

    `settings`: those of `fit`. 4500 starts, as Besiroglu et al. 2024 (arXiv:2404.10102) used to find the
    optimum that Hoffmann et al. missed.
    """
    return fit(HOFFMANN, {"N": N, "D": D}, loss, **settings)


def refit_hoffmann(N: ArrayLike, D: ArrayLike, loss: ArrayLike, **settings) -> Fit:
    """As `fit_hoffmann`, from 25 projected starts: for gates, tables of conventions and
    simulations, which fit often.
    """
    sizes, losses = vectors({"N": N, "D": D}), np.asarray(loss, dtype=float)
    check_sizes(HOFFMANN, sizes, losses)
    return fit(HOFFMANN, sizes, losses, starts_SP=HOFFMANN.projected_starts(sizes, losses), **settings)


def check_sizes(form: Form, sizes: Sizes, loss: Array) -> None:
    """Raise ValueError for sizes that the form lacks, values that cannot be, and too few rows."""
    for letter in form.inputs:
        if letter not in sizes:
            raise ValueError(f"{form.formula} needs {letter}")
    for name, values in {**sizes, "loss": loss}.items():
        if len(values) != len(loss):
            raise ValueError(f"{name} has {len(values)} values and loss {len(loss)}")
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(wrong):
            raise ValueError(f"{name} must be positive and finite: {values[wrong[0]]:g} in {numbered(wrong)}")
    if len(loss) <= len(form.parameters):
        raise ValueError(
            f"{len(loss)} runs cannot determine the {len(form.parameters)} parameters of {form.formula}: "
            f"at least {len(form.parameters) + 1} are needed, {len(form.parameters) + FEWEST_DEGREES} for "
            "intervals"
        )


def best(form: Form, theta_SP: Array, objective_S: Array) -> tuple[Array, float]:
    """θ with the lowest objective, and the share of starts that found it; runaway exponents stand aside."""
    tame = is_tame(form, theta_SP)
    objective_S = np.where(tame | ~tame.any(), objective_S, np.inf)
    lowest = objective_S.min()
    found = float(np.mean(objective_S <= lowest * (1 + SAME_OPTIMUM) + 1e-15))
    return theta_SP[objective_S.argmin()], found


def is_tame(form: Form, theta_SP: Array) -> Array:
    """Whether no exponent has run away, (S,)."""
    exponents = [i for i, name in enumerate(form.parameters) if name.startswith(("alpha", "beta", "eta"))]
    return np.all(np.abs(theta_SP[:, exponents]) < EXPONENT_BOUND, axis=1)


def floor_is_lost(fit: Fit) -> bool:
    """Whether E has run towards 0, where the loss hardly depends on its logarithm."""
    return fit.parameters.get("E", np.inf) < LOST_FLOOR * fit.loss.min()


def refit_starts(fit: Fit) -> Array:
    """Where fits of almost the same losses begin, (K, P): at θ.

    Where the floor of θ is lost no descent leads back, so that projected starts are added.
    """
    own = fit.theta_P[None]
    if not isinstance(fit.form, PowerSum) or not floor_is_lost(fit):
        return own
    return np.concatenate([own, fit.form.projected_starts(fit.sizes, fit.loss, alike=True)])


def minimise_from_each(
    form: Form,
    log_loss: Callable[[Array], tuple[Array, Array]],
    target: Array,
    starts_KSP: Array,
    **settings,
) -> Optima:
    """The lowest end of each of S problems from K starts, by `minimise`; runaway exponents stand aside."""
    ends = [minimise(log_loss, target, starts_SP, **settings) for starts_SP in starts_KSP]
    objective_KS = np.stack([np.where(is_tame(form, e.theta_SP), e.objective_S, np.inf) for e in ends])
    which = objective_KS.argmin(axis=0), np.arange(objective_KS.shape[1])
    return Optima(
        np.stack([e.theta_SP for e in ends])[which],
        np.stack([e.objective_S for e in ends])[which],
        np.stack([e.converged_S for e in ends])[which],
    )


def doubts(fit: Fit) -> list[Finding]:
    """What about a fit's own numbers should make one careful."""
    found: list[Finding] = [
        NotFalling(name, value)
        for name, value in fit.parameters.items()
        if name.startswith(("alpha", "beta", "eta")) and value <= 0
    ]
    if floor_is_lost(fit):
        found.append(FloorLost(fit.E))
    compute = compute_of(fit.sizes)
    if compute is not None and (budgets := len(grouped(np.log(compute)))) < FEWEST_BUDGETS:
        found.append(FewBudgets(budgets))
    return found


def compute_of(sizes: Sizes) -> Array | None:
    """Training FLOPs; C = 6ND where only N and D are known."""
    if "C" in sizes:
        return sizes["C"]
    if "N" not in sizes or "D" not in sizes:
        return None
    return FLOPS_PER_PARAMETER_AND_TOKEN * sizes["N"] * sizes["D"]


def profile_interval(fit: Fit, parameter: str, *, points: int = 64) -> Interval:
    """The values of a parameter whose best fit is not significantly worse than the best of all.

    The level is that of the fit.

    Robust likelihood ratio: the rise of the objective times 2·E[ψ']/E[ψ²] is χ² of one degree of freedom
    (Heritier & Ronchetti 1994, doi:10.1080/01621459.1994.10476822), and F of one and n − p, as the scale is
    estimated from the residuals. Follows the ridge along which A and alpha trade off, which a normal interval
    of A leaves. An end not reached within a factor e^±64 comes back as infinite, or as 0.
    """
    at = fit.form.parameters.index(parameter)
    free = fit.form.predictor(fit.sizes)

    def held(theta_SP: Array) -> tuple[Array, Array]:
        prediction, jacobian = free(theta_SP)
        jacobian[:, at] = 0
        return prediction, jacobian

    allowed = fit.objective + 0.5 * float(f.ppf(fit.level, 1, fit.degrees_of_freedom)) * objective_scale(fit)
    starts_KSP = np.repeat(refit_starts(fit)[:, None], points, axis=1)

    def first_above(offsets: Array) -> tuple[Array, Array] | None:
        """The two offsets from θ between which the objective passes the limit, and their objectives."""
        starts_KSP[:, :, at] = fit.theta_P[at] + offsets
        ends = minimise_from_each(fit.form, held, np.log(fit.loss), starts_KSP, delta=fit.delta)
        above = np.flatnonzero(ends.objective_S > allowed)
        if not len(above):
            return None
        j = max(int(above[0]), 1)
        return offsets[j - 1 : j + 1], ends.objective_S[j - 1 : j + 1]

    def bound(sign: int) -> float:
        reach = 0.01
        while (found := first_above(np.linspace(0, sign * reach, points))) is None:
            if reach > 64:
                return float("inf") if sign > 0 else 0.0
            reach *= 4
        (near, far), _ = found
        offsets, objectives = first_above(np.linspace(near, far, points)) or found
        crossing = fit.theta_P.copy()
        crossing[at] += np.interp(allowed, objectives, offsets)
        return float(fit.form.published(crossing[None])[parameter][0])

    return bound(-1), bound(1)


def objective_scale(fit: Fit) -> float:
    """E[ψ²]/E[ψ'], corrected for the parameters fitted; ψ' by a window wide enough to hold residuals."""
    residual, n = fit.residuals, len(fit.loss)
    spread = 1.4826 * np.median(np.abs(residual))
    window = max(fit.delta, 1.06 * spread * n**-0.2)
    inside = max(np.mean(np.abs(residual) < window), 1 / n) * fit.delta / window
    return float(np.mean(np.clip(residual, -fit.delta, fit.delta) ** 2) / inside * n / fit.degrees_of_freedom)


Statistic = Callable[[dict[str, Array]], Array]


def estimate(fit: Fit, statistic: Statistic) -> tuple[float, Interval | None]:
    """A number computed from the parameters, with its interval where the fit has resamples."""
    value = float(statistic({name: np.array([x]) for name, x in fit.parameters.items()})[0])
    if fit.resampled_SP is None:
        return value, None
    return value, fit.interval_of(statistic(fit.form.published(fit.resampled_SP)))
