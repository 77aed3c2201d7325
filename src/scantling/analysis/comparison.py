"""What a study of arms found: each against the baseline at every scale, and its difference in compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from scantling.analysis.ablation import (
    Comparison,
    Gain,
    Trend,
    Unreachable,
    compare,
    compute_equivalent_gain,
    gain_trend,
    holm,
    paired_losses,
    seeds_for_precision,
    seeds_needed,
    t_interval,
)
from scantling.analysis.arms import StudyRuns, mean_of, pairable_runs, rows_where
from scantling.analysis.budgets import grouped
from scantling.analysis.findings import (
    BaselineLawDoubt,
    Extrapolated,
    Finding,
    NoBaselineLaw,
    NothingCompared,
    OffTheLaw,
    OtherLength,
)
from scantling.analysis.forms import saturating
from scantling.analysis.scaling import Fit, estimate, fit

OWN_LAW = 4
"""Scales from which the baseline's own runs give its law."""

SAME_LENGTH = 0.01
"""Share of the baseline's tokens by which an arm may miss them, as runs end with a whole step."""

FAR = 2
"""The baseline's law is a guess beyond this many times the compute of its largest run."""


@dataclass(frozen=True)
class ArmGain:
    """The gain of an arm at a scale where the baseline takes `compute` FLOPs.

    `gain`: or why there is none. `largest`: FLOPs of the largest run that the baseline's law was fitted to.
    """

    scale: str
    arm: str
    compute: float
    gain: Gain | Unreachable
    largest: float

    @property
    def beyond(self) -> float:
        """Compute that the baseline would need, over that of its largest run; NaN where no compute does."""
        if isinstance(self.gain, Unreachable):
            return np.nan
        return self.compute * self.gain.multiplier / self.largest


@dataclass(frozen=True)
class ArmTrend:
    """How an arm's gain changes with scale; p is corrected over the `compared` arms that have a trend.

    None: it has no gain at two scales. `unreachable`: scales at which no compute reaches its loss.
    """

    arm: str
    trend: Trend | None
    compared: int
    unreachable: tuple[str, ...]


@dataclass(frozen=True)
class Ablation:
    """The tables of a comparison.

    `arms`: a row for each arm and scale, the baseline first; `gains`: compute-equivalent gains where there is
    a law; `trends`: how each arm's gain changes with scale.
    """

    study: str
    metric: str
    baseline: str
    level: float
    arms: pd.DataFrame
    gains: tuple[ArmGain, ...]
    trends: tuple[ArmTrend, ...]
    cautions: tuple[Finding, ...]

    @property
    def largest(self) -> str:
        """The scale that speaks for the study."""
        return self.arms["scale"].iloc[-1]

    @property
    def order(self) -> list[str]:
        """The baseline, then the others by their loss at the largest scale, lowest first;
        last those not compared there.
        """
        scales = list(dict.fromkeys(self.arms["scale"]))[::-1]
        return list(
            dict.fromkeys(arm for scale in scales for arm in rows_where(self.arms, scale=scale)["arm"])
        )

    @property
    def gains_table(self) -> pd.DataFrame | None:
        """A row for each gain: gain, low, high, and how far it lies beyond the baseline's runs.

        NaN where no compute reaches the arm's loss.
        """
        return pd.DataFrame([gain_row(each) for each in self.gains]) if self.gains else None


class NothingToCompare(ValueError):
    """No arm has a finished run beside the baseline's; `lost`: those that lost their partner."""

    def __init__(self, lost: Sequence[Finding]) -> None:
        super().__init__("nothing to compare yet: no other arm has a finished run")
        self.lost = lost


def compare_arms(
    study: StudyRuns,
    *,
    baseline: str,
    metric: str,
    precision: float,
    law: Fit | None,
    level: float,
    resamples: int,
    seed: int,
) -> Ablation:
    """Compare every arm with the baseline at every scale.

    `metric`: loss or bpb. `precision`: the half-width that `seeds_for_precision` is asked for, in its unit.
    `law`: the baseline's loss against compute; None: from the study itself, where that has enough scales.

    Raises ValueError, naming runs, for what cannot be compared.
    """
    if baseline not in set(study.runs["arm"]):
        arms = ", ".join(sorted(set(study.runs["arm"])))
        raise ValueError(f"no runs of the baseline {baseline}: arms are {arms}")
    all_runs, lost = pairable_runs(study, baseline)
    scales = [s for s in study.scales if len(set(rows_where(all_runs, scale=s)["arm"])) > 1]
    if not scales:
        raise NothingToCompare(lost)
    cautions: list[Finding] = [*study.cautions, *lost]
    cautions += [NothingCompared(scale) for scale in study.scales if scale not in scales]
    settings = {"resamples": resamples, "level": level, "seed": seed}
    if law is None and metric == "loss":
        law, reason = own_law(rows_where(all_runs, arm=baseline), settings)
        cautions += [] if reason is None else [reason]
    if law is not None:
        cautions += [BaselineLawDoubt(doubt) for doubt in law.warnings]
    lines: list[dict[str, object]] = []
    gains: list[ArmGain] = []
    for scale in scales:
        runs = rows_where(all_runs, scale=scale)
        runs = runs.assign(loss=runs[metric])
        compared = sorted(compare(runs, baseline, **settings), key=lambda c: c.difference)
        lines += [arm_row(scale, baseline, runs, c, precision, len(compared)) for c in (None, *compared)]
        cautions += other_lengths(runs, baseline, scale)
        if law is None:
            continue
        losses = paired_losses(runs, baseline)
        compute = mean_of(rows_where(runs, arm=baseline), "flops")
        cautions += off_the_law(law, compute, losses[baseline].to_numpy(), scale)
        # Seeds of one scale say nothing of those of another: drawn alike they would cancel in the trend.
        drawn = seed + study.scales.index(scale)
        gains += gains_at(scale, law, compute, losses, [c.arm for c in compared], baseline, drawn)
    return Ablation(
        study=study.name,
        metric=metric,
        baseline=baseline,
        level=level,
        arms=pd.DataFrame(lines),
        gains=tuple(gains),
        trends=tuple(trends_of(gains, level)),
        cautions=(*cautions, *extrapolated(gains)),
    )


def own_law(runs: pd.DataFrame, settings: dict) -> tuple[Fit | None, NoBaselineLaw | None]:
    """The baseline's loss against compute by its own runs, or why these give no law: they need enough scales.

    `settings`: those of `fit`.
    """
    if len(set(runs["scale"])) < OWN_LAW:
        return None, None
    try:
        return fit(saturating("C"), {"C": runs["flops"]}, runs["loss"], **settings), None
    except ValueError as error:
        return None, NoBaselineLaw(str(error))


def gains_at(
    scale: str,
    law: Fit,
    compute: float,
    losses: pd.DataFrame,
    arms: Sequence[str],
    baseline: str,
    seed: int,
) -> Iterator[ArmGain]:
    """The gain of each arm at one scale, by its paired `losses`, a column an arm."""
    for arm in arms:
        difference = (losses[arm] - losses[baseline]).to_numpy()
        try:
            gain = compute_equivalent_gain(law, compute, difference, seed=seed)
        except Unreachable as unreachable:
            gain = unreachable
        yield ArmGain(scale, arm, compute, gain, float(max(law.sizes["C"])))


def arm_row(
    scale: str, baseline: str, runs: pd.DataFrame, c: Comparison | None, precision: float, arms: int
) -> dict[str, object]:
    """One line of the table; the baseline's own where `c` is None."""
    arm = baseline if c is None else c.arm
    own, reference = (rows_where(runs, arm=name) for name in (arm, baseline))
    mean = {name: mean_of(own, name) for name in ("loss", "params", "flops")}
    base = {name: mean_of(reference, name) for name in ("params", "flops")}
    row: dict[str, object] = {
        "scale": scale,
        "arm": arm,
        "seeds": len(own),
        "loss": mean["loss"],
        "lr": ", ".join(f"{lr:g}" for lr in sorted(set(own["lr"]))),
        "params": mean["params"],
        "params_off": mean["params"] / base["params"] - 1,
        "flops_off": mean["flops"] / base["flops"] - 1,
    }
    if c is None:
        return row | {"noise": float(own["loss"].to_numpy().std(ddof=1))}
    row |= {"difference": c.difference, "low": c.interval[0], "high": c.interval[1]}
    row |= {"bootstrap_low": c.bootstrap[0], "bootstrap_high": c.bootstrap[1]}
    row |= {"noise": c.noise, "effect": c.effect, "p": c.p, "p_holm": c.p_holm, "verdict": c.verdict}
    if c.spread > 0:
        row["seeds_to_decide"] = seeds_or_nan(
            lambda: seeds_needed(c.spread, c.difference, level=c.level, arms=arms)
        )
        row["seeds_for_precision"] = seeds_or_nan(
            lambda: seeds_for_precision(c.spread, precision, level=c.level)
        )
    return row


def seeds_or_nan(count: Callable[[], int]) -> float:
    """The number of seeds; NaN where it is more than anyone will run."""
    try:
        return float(count())
    except ValueError:
        return np.nan


def other_lengths(runs: pd.DataFrame, baseline: str, scale: str) -> list[Finding]:
    """Arms that do not train on as many tokens as the baseline."""
    tokens = {arm: mean_of(rows_where(runs, arm=arm), "tokens") for arm in dict.fromkeys(runs["arm"])}
    off = {arm: of_arm / tokens[baseline] - 1 for arm, of_arm in tokens.items()}
    return [OtherLength(scale, arm, baseline, by) for arm, by in off.items() if abs(by) > SAME_LENGTH]


def off_the_law(law: Fit, compute: float, losses: np.ndarray, scale: str) -> list[Finding]:
    """Whether the baseline's loss, one a seed, and the law's are apart by more than both intervals."""
    low, high = t_interval(losses, law.level)
    predicted, interval = estimate(law, lambda of: of["E"] + of["B"] / compute ** of["beta"])
    least, most = interval or (predicted, predicted)
    if low <= most and least <= high:
        return []
    return [OffTheLaw(scale, float(losses.mean()), predicted, least, most)]


def extrapolated(gains: Sequence[ArmGain]) -> list[Finding]:
    """Gains for which the baseline's law is read far beyond its runs, the farthest of each arm."""
    far: dict[str, float] = {}
    for each in gains:
        if each.beyond > FAR:
            far[each.arm] = max(each.beyond, far.get(each.arm, 0.0))
    return [Extrapolated(gains[0].largest, tuple(far.items()))] if far else []


def gain_row(each: ArmGain) -> dict[str, object]:
    """The row of the table of gains."""
    row: dict[str, object] = {"scale": each.scale, "arm": each.arm, "FLOPs": each.compute}
    if isinstance(each.gain, Unreachable):
        row |= {"gain": np.nan, "low": np.nan, "high": np.nan}
    else:
        low, high = each.gain.interval
        row |= {"gain": each.gain.multiplier, "low": low, "high": high}
    return row | {"beyond": each.beyond}


def trends_of(gains: Sequence[ArmGain], level: float) -> list[ArmTrend]:
    """The trend of each arm that has gains at two budgets, p corrected by Holm over these arms.

    Then each other arm at several scales that has no trend because no compute reaches its loss.
    """
    known: dict[str, list[Gain]] = {}
    unreachable: dict[str, tuple[str, ...]] = {}
    for each in gains:
        if isinstance(each.gain, Unreachable):
            unreachable[each.arm] = (*unreachable.get(each.arm, ()), each.scale)
        else:
            known.setdefault(each.arm, []).append(each.gain)
    of_arm = {
        arm: gain_trend(of_scales, level=level)
        for arm, of_scales in known.items()
        if len(grouped(np.log([gain.compute for gain in of_scales]))) > 1
    }
    corrected = holm([trend.p for trend in of_arm.values()])
    trends = [
        ArmTrend(arm, replace(trend, p=p), len(of_arm), unreachable.get(arm, ()))
        for (arm, trend), p in zip(of_arm.items(), corrected, strict=True)
    ]
    return trends + [
        ArmTrend(arm, None, len(of_arm), scales)
        for arm, scales in unreachable.items()
        if arm not in of_arm and len(known.get(arm, ())) + len(scales) > 1
    ]
