"""Arms compared over paired seeds: differences with intervals, seeds needed, compute that a gain is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import nct, t

from scantling.analysis.huber import Array
from scantling.analysis.observations import numbered
from scantling.analysis.scaling import Fit, Interval

COLUMNS = ("arm", "seed", "loss")
"""Columns of a table of runs: the arm's name, the seed that pairs runs across arms, the final loss."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline over paired seeds; a negative difference is a lower loss.

    `noise`: standard deviation of the baseline's loss over seeds. `effect`: difference in units of it. `p`:
    two-sided paired t test; `p_holm`: corrected for all arms compared. `bootstrap`: percentile interval of
    the mean difference.
    """

    arm: str
    pairs: int
    difference: float
    interval: Interval
    bootstrap: Interval
    spread: float
    noise: float
    effect: float
    p: float
    p_holm: float
    level: float

    @property
    def verdict(self) -> str:
        """better, worse, or undecided at `level` after Holm's correction."""
        if self.p_holm > 1 - self.level:
            return "undecided"
        return "better" if self.difference < 0 else "worse"


def paired_losses(runs: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Losses with a row a seed and a column an arm.

    Raises ValueError naming rows for missing columns, losses that are not finite, runs that occur twice, and
    seeds that are not in every arm; nothing is dropped.
    """
    missing = [name for name in COLUMNS if name not in runs]
    if missing:
        raise ValueError(
            f"the table of runs has no column {', '.join(missing)}; it has {', '.join(map(str, runs))}"
        )
    losses = runs["loss"].to_numpy(dtype=float)
    wrong = runs.index[~np.isfinite(losses)]
    if len(wrong):
        raise ValueError(f"loss is not finite in {numbered(wrong)}")
    twice = runs.index[runs.duplicated(["arm", "seed"], keep=False)]
    if len(twice):
        arm, seed = runs.loc[twice[0], ["arm", "seed"]]
        raise ValueError(f"arm {arm} has seed {seed} more than once: {numbered(twice)}")
    table = runs.pivot(index="seed", columns="arm", values="loss")
    if baseline not in table:
        raise ValueError(f"no runs of the baseline {baseline}: arms are {', '.join(map(str, table))}")
    lacking = np.isnan(table.to_numpy(dtype=float))
    if lacking.any():
        i = int(np.flatnonzero(lacking.any(axis=0))[0])
        arm, seeds = table.columns[i], ", ".join(map(str, table.index[np.flatnonzero(lacking[:, i])]))
        alone = runs.index[runs["seed"].isin(table.index[np.flatnonzero(lacking.any(axis=1))]).to_numpy()]
        raise ValueError(
            f"seeds are unpaired: arm {arm} lacks seed {seeds} that other arms have ({numbered(alone)})"
        )
    if len(table) < 2:
        raise ValueError(
            "one seed only: noise between seeds cannot be seen; two are the least, five are usual"
        )
    return table


def compare(
    runs: pd.DataFrame, baseline: str, *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> list[Comparison]:
    """Every other arm against `baseline`; `runs` has the `COLUMNS`. Raises as `paired_losses`."""
    table = paired_losses(runs, baseline)
    arms = [arm for arm in table if arm != baseline]
    differences = {arm: (table[arm] - table[baseline]).to_numpy() for arm in arms}
    p_values = [paired_p(differences[arm]) for arm in arms]
    noise = float(table[baseline].to_numpy().std(ddof=1))
    rng = np.random.default_rng(seed)
    return [
        Comparison(
            arm=str(arm),
            pairs=len(table),
            difference=float(differences[arm].mean()),
            interval=t_interval(differences[arm], level),
            bootstrap=bootstrap_interval(differences[arm], level, resamples, rng),
            spread=float(differences[arm].std(ddof=1)),
            noise=noise,
            effect=float(differences[arm].mean() / noise) if noise > 0 else float("nan"),
            p=p,
            p_holm=p_holm,
            level=level,
        )
        for arm, p, p_holm in zip(arms, p_values, holm(p_values), strict=True)
    ]


def paired_p(difference: Array) -> float:
    """Two-sided p of a mean of zero by Student's paired t test; 1 for arms that are equal in every seed."""
    if np.ptp(difference) == 0:
        return 1.0 if difference[0] == 0 else 0.0
    statistic = difference.mean() / (difference.std(ddof=1) / np.sqrt(len(difference)))
    return float(2 * t.sf(abs(statistic), len(difference) - 1))


def t_interval(difference: Array, level: float) -> Interval:
    """Student's interval, mean ± t·s/√n with t of n - 1 degrees of freedom (Student 1908)."""
    n = len(difference)
    half = t.ppf((1 + level) / 2, n - 1) * difference.std(ddof=1) / np.sqrt(n)
    return float(difference.mean() - half), float(difference.mean() + half)


def bootstrap_interval(difference: Array, level: float, resamples: int, rng: np.random.Generator) -> Interval:
    """Percentiles of the mean over pairs drawn with replacement; with few pairs narrower than Student's."""
    means = rng.choice(difference, size=(resamples, len(difference))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p value corrected for their number, to be compared with one level.

    Holm 1979, Scand. J. Stat. 6:65.
    """
    order = np.argsort(p_values)
    m = len(p_values)
    scaled = np.asarray(p_values)[order] * (m - np.arange(m))
    corrected = np.empty(m)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected.tolist()


def seeds_needed(
    spread: float, difference: float, *, level: float = 0.95, power: float = 0.9, arms: int = 1
) -> int:
    """Pairs at which a paired t test finds a `difference` with probability `power`.

    `spread`: standard deviation of the difference between paired runs; `arms`: comparisons that Holm corrects
    for, at its strictest. Solved with the noncentral t distribution.
    """
    if spread <= 0 or difference == 0:
        raise ValueError("the seeds needed follow from a positive spread and a difference that is not zero")
    alpha = (1 - level) / arms

    def found(n: int) -> bool:
        critical, shift = t.ppf(1 - alpha / 2, n - 1), abs(difference) / spread * np.sqrt(n)
        return bool(nct.sf(critical, n - 1, shift) >= power)

    n = first(found, 100_000)
    if n is None:
        raise ValueError(
            f"a difference of {difference:g} with a spread of {spread:g} needs more than 100,000 seeds"
        )
    return n


def seeds_for_precision(spread: float, half_width: float, *, level: float = 0.95) -> int:
    """Pairs at which the interval of the mean difference is expected to reach ± `half_width`."""
    if spread <= 0 or half_width <= 0:
        raise ValueError("the seeds needed follow from a positive spread and a positive half-width")
    n = first(lambda n: bool(t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n) <= half_width), 1_000_000)
    if n is None:
        raise ValueError(f"±{half_width:g} with a spread of {spread:g} needs more than a million seeds")
    return n


def first(holds: Callable[[int], bool], most: int) -> int | None:
    """The least n from 2 to `most` at which `holds` becomes true, which it then stays; None: at none."""
    low, high = 2, most
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain: the baseline's law takes `multiplier` times the compute to differ as much."""

    compute: float
    multiplier: float
    interval: Interval
    samples_S: Array


class Unreachable(ValueError):
    """A loss that no compute reaches, by a law that ends above it, at E."""

    def __init__(self, loss: float, floor: float) -> None:
        super().__init__(
            f"the law's loss with the difference, {loss:.4g}, is below E = {floor:.4g}: by the baseline's "
            "law no compute reaches it"
        )
        self.loss, self.floor = loss, floor


def compute_equivalent_gain(law: Fit, compute: float, difference: ArrayLike, *, seed: int = 0) -> Gain:
    """What the paired `difference` of losses (one a seed, negative is better) at a budget is worth by the
    baseline's law (Davidson et al. 2023, arXiv:2312.07413).

    `law` is of `saturating("C")`, or a `frontier`: L(C) = E + B/C^beta. The multiplier m solves L(m·C) = L(C)
    + difference: it starts from the law's loss, which is the baseline's own only where that lies on the law.
    The interval combines draws of the mean difference, from Student's t, with the law's resamples.

    Raises Unreachable, a ValueError, for a loss that the law says no compute reaches: one at or below E.
    """
    d = np.asarray(difference, dtype=float)
    if law.form.inputs != ("C",) or law.form.parameters != ("E", "B", "beta"):
        raise ValueError(
            "a compute-equivalent gain needs the baseline's loss against compute, L = E + B/C^beta"
        )
    if len(d) < 2:
        raise ValueError("one seed only: the interval of a gain needs two at least")

    def multiplier(reducible_coefficient: Array | float, beta: Array | float, shift: Array | float) -> Array:
        reducible = reducible_coefficient / compute**beta
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(shift > -reducible, ((reducible + shift) / reducible) ** (-1 / beta), np.inf)

    m = float(multiplier(law.B, law.beta, d.mean()))
    if not np.isfinite(m):
        raise Unreachable(float(law.predict(C=compute)[0] + d.mean()), law.E)
    published, rng = law.form.published(law.resamples()), np.random.default_rng(seed)
    scale = d.std(ddof=1) / np.sqrt(len(d))
    shifts = d.mean() + scale * rng.standard_t(len(d) - 1, size=len(published["B"]))
    samples_S = multiplier(published["B"], published["beta"], shifts)
    tail = (1 - law.level) / 2
    low, high = np.quantile(samples_S, [tail, 1 - tail], method="nearest")
    return Gain(compute, m, (float(low), float(high)), samples_S)


@dataclass(frozen=True)
class Trend:
    """How a gain changes with scale: the log of its multiplier per factor of ten in compute.

    `p`: two-sided, of no trend, to be corrected where several arms are tested.
    """

    per_decade: float
    interval: Interval
    p: float
    level: float

    @property
    def verdict(self) -> str:
        """What can be said at `level`: grows or fades with scale, or no trend seen."""
        if self.p > 1 - self.level:
            return "no trend seen"
        return "grows with scale" if self.per_decade > 0 else "fades with scale"


def gain_trend(gains: Sequence[Gain], *, level: float = 0.95) -> Trend:
    """A line through log multipliers against log₁₀ compute, of gains at two budgets or more.

    The gains share the resamples of the law; their own draws come from different seeds, as their runs differ.
    """
    x = np.log10([gain.compute for gain in gains])
    if len(np.unique(x)) < 2:
        raise ValueError("a trend needs gains at two budgets or more")
    centred = x - x.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        samples = np.log(np.stack([gain.samples_S for gain in gains], axis=1)) @ centred / (centred @ centred)
    slope = float(np.log([gain.multiplier for gain in gains]) @ centred / (centred @ centred))
    low, high = np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    # A gain without end at both ends of the line has a slope that is not known, and counts on either side.
    beyond = min((~(samples > 0)).sum(), (~(samples < 0)).sum())
    return Trend(
        slope, (float(low), float(high)), min(2 * float(beyond + 1) / (len(samples) + 1), 1.0), level
    )
