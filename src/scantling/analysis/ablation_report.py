"""What a study of arms says: each against the baseline at every scale, as tables and in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from scantling.analysis.ablation import (
    Comparison,
    Gain,
    compare,
    compute_equivalent_gain,
    gain_trend,
    holm,
    paired_losses,
    seeds_for_precision,
    seeds_needed,
    t_interval,
)
from scantling.analysis.arms import StudyRuns, mean_of, pairable_runs, rows
from scantling.analysis.budgets import grouped
from scantling.analysis.forms import saturating
from scantling.analysis.observations import some
from scantling.analysis.scaling import Fit, estimate, fit
from scantling.runs.table import UNITS

VERDICTS = ("better", "worse", "undecided")

NAMED = 3
"""Arms of a kind that the answer names."""

OWN_LAW = 4
"""Scales from which the baseline's own runs give its law."""

SAME_LENGTH = 0.01
"""By so much of the baseline's tokens an arm may miss them: runs end with a whole step."""

FAR = 2
"""Times the compute of the baseline's largest run, beyond which its law is a guess."""


@dataclass(frozen=True)
class AblationReport:
    """`arms`: a row an arm and scale, the baseline first; `gains`: compute-equivalent gains where a law is at hand;
    `trends`: a line an arm, of its gain over scale."""

    study: str
    metric: str
    baseline: str
    level: float
    arms: pd.DataFrame
    gains: pd.DataFrame | None
    trends: tuple[str, ...]
    cautions: tuple[str, ...]

    @property
    def largest(self) -> str:
        """The scale that speaks for the study."""
        return self.arms["scale"].iloc[-1]

    @property
    def order(self) -> list[str]:
        """The baseline, and the others from the lowest loss at the largest scale on; at the end those not compared there."""
        scales = list(dict.fromkeys(self.arms["scale"]))[::-1]
        return list(dict.fromkeys(arm for scale in scales for arm in rows(self.arms, scale=scale)["arm"]))


@dataclass(frozen=True)
class ArmGain:
    """Of an arm at a scale, whose baseline takes `compute` FLOPs; `gain`: or why there is none. `largest`: FLOPs of the
    largest run that the baseline's law was fitted to."""

    scale: str
    arm: str
    compute: float
    gain: Gain | str
    largest: float

    @property
    def beyond(self) -> float:
        """Compute that the baseline would need, over that of its largest run: above 1 its law is extrapolated."""
        return np.nan if isinstance(self.gain, str) else self.compute * self.gain.multiplier / self.largest


def report_arms(
    study: StudyRuns,
    *,
    baseline: str,
    metric: str,
    precision: float,
    law: Fit | None,
    level: float,
    resamples: int,
    seed: int,
) -> AblationReport:
    """`metric`: loss or bpb. `precision`: the half-width that `seeds_for_precision` is asked for, in its unit. `law`: the
    baseline's loss against compute; None: from the study itself, where that has enough scales.

    Raises ValueError, naming runs, for what cannot be compared.
    """
    if baseline not in set(study.runs["arm"]):
        arms = ", ".join(sorted(set(study.runs["arm"])))
        raise ValueError(f"no runs of the baseline {baseline}: arms are {arms}")
    all_runs, incomplete = pairable_runs(study, baseline)
    scales = [scale for scale in study.scales if len(set(rows(all_runs, scale=scale)["arm"])) > 1]
    if not scales:
        why = "; ".join(incomplete) or "no other arm has a finished run"
        raise ValueError(f"nothing to compare yet: {why}")
    cautions = [*study.cautions, *incomplete]
    cautions += [f"nothing is compared at {scale}" for scale in study.scales if scale not in scales]
    own = rows(all_runs, arm=baseline)
    if law is None and metric == "loss" and len(set(own["scale"])) >= OWN_LAW:
        settings = {"resamples": resamples, "level": level, "seed": seed}
        try:
            law = fit(saturating("C"), {"C": own["flops"]}, own["loss"], **settings)
        except ValueError as error:
            cautions.append(f"no gains in compute: {error}")
    if law is not None:
        cautions += [f"law of the baseline: {text}" for text in law.warnings]
    lines: list[dict[str, object]] = []
    gains: list[ArmGain] = []
    for scale in scales:
        runs = rows(all_runs, scale=scale)
        runs = runs.assign(loss=runs[metric])
        losses = paired_losses(runs, baseline)
        compared = compare(runs, baseline, level=level, resamples=resamples, seed=seed)
        ordered = sorted(compared, key=lambda c: c.difference)
        lines += [arm_row(scale, baseline, runs, c, precision, len(compared)) for c in (None, *ordered)]
        cautions += other_lengths(runs, baseline, scale)
        if law is None:
            continue
        compute = mean_of(rows(runs, arm=baseline), "flops")
        cautions += off_the_law(law, compute, losses[baseline].to_numpy(), scale)
        largest = float(max(law.sizes["C"]))
        for c in ordered:
            difference = (losses[c.arm] - losses[baseline]).to_numpy()
            # Seeds of one scale say nothing of those of another: drawn alike they would cancel in the trend.
            gain = gain_of(law, compute, difference, seed + study.scales.index(scale))
            gains.append(ArmGain(scale, c.arm, compute, gain, largest))
    cautions += extrapolated(gains)
    return AblationReport(
        study=study.name,
        metric=metric,
        baseline=baseline,
        level=level,
        arms=pd.DataFrame(lines),
        gains=gains_table(gains) if gains else None,
        trends=trends_of(gains, level),
        cautions=tuple(cautions),
    )


def arm_row(
    scale: str, baseline: str, runs: pd.DataFrame, c: Comparison | None, precision: float, arms: int
) -> dict[str, object]:
    """One line of the table; the baseline's own where `c` is None."""
    arm = baseline if c is None else c.arm
    own, reference = (rows(runs, arm=name) for name in (arm, baseline))
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


def other_lengths(runs: pd.DataFrame, baseline: str, scale: str) -> list[str]:
    """What to say of arms that do not train on as many tokens as the baseline."""
    where = f"at {scale} " if scale else ""
    tokens = {arm: mean_of(rows(runs, arm=arm), "tokens") for arm in dict.fromkeys(runs["arm"])}
    off = {arm: of_arm / tokens[baseline] - 1 for arm, of_arm in tokens.items()}
    return [
        f"{where}{arm} trains on {abs(share):.1%} {'more' if share > 0 else 'fewer'} tokens than {baseline}, and its "
        "difference is of these too"
        for arm, share in off.items()
        if abs(share) > SAME_LENGTH
    ]


def seeds_or_nan(count: Callable[[], int]) -> float:
    """NaN where it is more than anyone will run."""
    try:
        return float(count())
    except ValueError:
        return np.nan


def gain_of(law: Fit, compute: float, difference: np.ndarray, seed: int) -> Gain | str:
    try:
        return compute_equivalent_gain(law, compute, difference, seed=seed)
    except ValueError as error:
        return str(error)


def off_the_law(law: Fit, compute: float, losses: np.ndarray, scale: str) -> list[str]:
    """What to say where the baseline's loss, one a seed, and the law's are apart by more than both intervals."""
    low, high = t_interval(losses, law.level)
    said, interval = estimate(law, lambda of: of["E"] + of["B"] / compute ** of["beta"])
    least, most = interval or (said, said)
    if low <= most and least <= high:
        return []
    where = f"at {scale} " if scale else ""
    return [
        f"{where}the baseline comes to {losses.mean():.4f} where the law says {said:.4f} ({least:.4f} to {most:.4f}): a gain "
        "is what a difference as large takes on the law, and from the baseline's own loss on it may take more or less"
    ]


def extrapolated(gains: Sequence[ArmGain]) -> list[str]:
    """What to say of gains for which the baseline's law is read far beyond its runs, the farthest of each arm."""
    far: dict[str, float] = {}
    for each in gains:
        if each.beyond > FAR:
            far[each.arm] = max(each.beyond, far.get(each.arm, 0.0))
    if not far:
        return []
    each_arm = ", ".join(f"{arm} {beyond:.2g} times" for arm, beyond in far.items())
    return [
        f"gains read the baseline's law beyond its largest run, of {gains[0].largest:.2g} FLOPs ({each_arm} as far): there it "
        "is a guess, and intervals hold only if it goes on as fitted"
    ]


def gains_table(gains: Sequence[ArmGain]) -> pd.DataFrame:
    """A row each: gain, low and high, NaN where there is none, all of it in words, and how far beyond the baseline's runs."""
    table = []
    for each in gains:
        row: dict[str, object] = {"scale": each.scale, "arm": each.arm, "FLOPs": each.compute}
        if isinstance(each.gain, str):
            row |= {"gain": np.nan, "low": np.nan, "high": np.nan}
        else:
            low, high = each.gain.interval
            row |= {"gain": each.gain.multiplier, "low": low, "high": high}
        table.append(row | {"": str(each.gain), "beyond": each.beyond})
    return pd.DataFrame(table)


def trends_of(gains: Sequence[ArmGain], level: float) -> tuple[str, ...]:
    """A line an arm that has gains at two budgets, p corrected by Holm over these arms; and one for each arm that has none
    because no compute reaches its loss."""
    known: dict[str, list[Gain]] = {}
    endless: dict[str, list[str]] = {}
    for each in gains:
        if isinstance(each.gain, str):
            endless.setdefault(each.arm, []).append(each.scale)
        else:
            known.setdefault(each.arm, []).append(each.gain)
    of_arm = {
        arm: gain_trend(found, level=level)
        for arm, found in known.items()
        if len(grouped(np.log([gain.compute for gain in found]))) > 1
    }
    corrected = holm([trend.p for trend in of_arm.values()])
    lines = []
    for (arm, trend), p in zip(of_arm.items(), corrected, strict=True):
        low, high = (np.exp(end) for end in trend.interval)
        by = f" by Holm over {len(of_arm)} arms" if len(of_arm) > 1 else ""
        without = (
            f"; without {', '.join(endless[arm])}, where no compute reaches its loss"
            if arm in endless
            else ""
        )
        lines.append(
            f"{arm}: {replace(trend, p=p).verdict}, × {np.exp(trend.per_decade):.3g} per decade of compute ({low:.3g} to "
            f"{high:.3g}), p {p:.2g}{by}{without}"
        )
    for arm in [arm for arm in endless if arm not in of_arm]:
        if len(known.get(arm, ())) + len(endless[arm]) > 1:
            lines.append(f"{arm}: no trend, as no compute reaches its loss at {', '.join(endless[arm])}")
    return tuple(lines)


# --- pages ---

COLUMNS = {
    "scale": "scale",
    "arm": "arm",
    "seeds": "seeds",
    "loss": "loss",
    "difference": "difference",
    "interval": "paired t",
    "bootstrap": "bootstrap",
    "effect": "in noise",
    "p_holm": "Holm p",
    "verdict": "verdict",
    "seeds_to_decide": "seeds to decide",
    "seeds_for_precision": "seeds for precision",
    "lr": "lr",
    "params": "params",
    "params_off": "off",
    "flops_off": "FLOPs off",
}


WRITTEN = {
    "loss": "{:.4f}",
    "difference": "{:+z.4f}",
    "effect": "{:+z.1f}",
    "p_holm": "{:.2g}",
    "params": "{:,.0f}",
    "params_off": "{:+z.1%}",
    "flops_off": "{:+z.1%}",
    "seeds_to_decide": "{:.0f}",
    "seeds_for_precision": "{:.0f}",
}


def arms_table(report: AblationReport) -> pd.DataFrame:
    """As people read it: intervals in one column, and no column of scale where there is one only."""
    lines = []
    for line in report.arms.to_dict("records"):
        for name, low, high in (
            ("interval", "low", "high"),
            ("bootstrap", "bootstrap_low", "bootstrap_high"),
        ):
            line[name] = "" if np.isnan(line[low]) else f"{line[low]:+z.4f} to {line[high]:+z.4f}"
        for name, text in WRITTEN.items():
            line[name] = "" if np.isnan(line.get(name, np.nan)) else text.format(line[name])
        line["verdict"] = line["verdict"] if isinstance(line["verdict"], str) else "baseline"
        lines.append({title: line[name] for name, title in COLUMNS.items()})
    table = pd.DataFrame(lines).rename(columns={"loss": report.metric})
    return table if len(set(report.arms["scale"])) > 1 else table.drop(columns="scale")


def headline(report: AblationReport) -> str:
    """In one sentence, what is decided."""
    noise = rows(report.arms, scale=report.largest, arm=report.baseline)["noise"].iloc[0]
    verdicts = [verdict for verdict in report.arms["verdict"] if isinstance(verdict, str)]
    return (
        f"{report.study}: of {some(len(verdicts), 'comparison')} with {report.baseline}, {verdicts.count('better')} better, "
        f"{verdicts.count('worse')} worse, {verdicts.count('undecided')} undecided at {report.level:.0%} (paired seeds, Holm "
        f"over the arms of a scale; {report.metric}, noise {noise:.4f} between seeds)"
    )


def answer(report: AblationReport) -> str:
    """In one sentence, at the largest scale: which arms are better and worse than the baseline, by how much, and of which
    that cannot be said."""
    scale = report.largest
    here = [row for row in rows(report.arms, scale=scale).to_dict("records") if row["arm"] != report.baseline]
    of_verdict = {verdict: [row for row in here if row["verdict"] == verdict] for verdict in VERDICTS}
    undecided = of_verdict["undecided"]
    kinds = {
        f"better than {report.baseline}": (of_verdict["better"], -1),
        f"worse than {report.baseline}": (of_verdict["worse"][::-1], 1),
        f"no difference from {report.baseline} found": (
            [r for r in undecided if r["low"] <= 0 <= r["high"]],
            0,
        ),
        f"undecided after correction for {some(len(here), 'comparison')}": (
            [r for r in undecided if not r["low"] <= 0 <= r["high"]],
            0,
        ),
    }
    found = "; ".join(f"{words}: {named(arms, sign)}" for words, (arms, sign) in kinds.items() if len(arms))
    where = f", at {scale}" if scale else ""
    return f"{found[0].upper()}{found[1:]} {UNITS[report.metric]}{where} ({report.level:.0%} intervals over paired seeds)."


def named(arms: list[dict[str, Any]], sign: int) -> str:
    """Arms with their differences and intervals, of many the first; `sign`: of the differences where words say it."""
    texts = []
    for row in arms[:NAMED]:
        low, high, difference = row["low"], row["high"], row["difference"]
        ends = sorted((sign * low, sign * high)) if sign else (low, high)
        by, form = (sign * difference, "z.4f") if sign else (difference, "+z.4f")
        texts.append(f"{row['arm']} by {by:{form}} ({ends[0]:{form}} to {ends[1]:{form}})")
    return ", ".join(texts) + (f" and {len(arms) - NAMED} more" if len(arms) > NAMED else "")


def tables(report: AblationReport) -> dict[str, pd.DataFrame]:
    """By title, those that there are."""
    found = {f"Arms against {report.baseline}, {report.level:.0%} intervals": arms_table(report)}
    if report.gains is not None:
        said = report.gains.drop(columns=["gain", "low", "high", "beyond"]).rename(columns={"": "gain"})
        found["Compute-equivalent gain by the baseline's law"] = said
    return found
