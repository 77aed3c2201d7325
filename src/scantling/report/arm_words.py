"""What a study of arms found, in words: its answer, trends of gains, the tables that people read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from scantling.analysis.ablation import Gain, Unreachable
from scantling.analysis.arms import rows_where
from scantling.analysis.comparison import Ablation, ArmTrend
from scantling.analysis.observations import listed
from scantling.report.numbers import interval, number_or_blank, some
from scantling.runs.table import UNITS

VERDICTS = ("better", "worse", "undecided")

NAMED = 3
"""Arms better, worse or undecided that the answer names."""

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
"""Titles that people read, by column of `Ablation.arms`."""

FORMS = {
    "loss": ".4f",
    "difference": "+z.4f",
    "effect": "+z.1f",
    "p_holm": ".2g",
    "params": ",.0f",
    "params_off": "+z.1%",
    "flops_off": "+z.1%",
    "seeds_to_decide": ".0f",
    "seeds_for_precision": ".0f",
}


def headline(ablation: Ablation) -> str:
    """What is decided, in one sentence."""
    arms = ablation.arms
    noise = rows_where(arms, scale=ablation.largest, arm=ablation.baseline)["noise"].iloc[0]
    verdicts = [verdict for verdict in arms["verdict"] if isinstance(verdict, str)]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS)
    return (
        f"{ablation.study}: of {some(len(verdicts), 'comparison')} with {ablation.baseline}, {counts} at "
        f"{ablation.level:.0%} (paired seeds, Holm over the arms of a scale; {ablation.metric}, noise "
        f"{noise:.4f} between seeds)"
    )


def answer(ablation: Ablation) -> str:
    """Which arms are better or worse than the baseline at the largest scale, by how much, or undecided.

    It is one sentence.
    """
    scale, baseline = ablation.largest, ablation.baseline
    here = [
        row for row in rows_where(ablation.arms, scale=scale).to_dict("records") if row["arm"] != baseline
    ]
    of_verdict = {verdict: [row for row in here if row["verdict"] == verdict] for verdict in VERDICTS}
    undecided = of_verdict["undecided"]
    alike = [row for row in undecided if row["low"] <= 0 <= row["high"]]
    kinds = {
        f"better than {baseline}": (of_verdict["better"], -1),
        f"worse than {baseline}": (of_verdict["worse"][::-1], 1),
        f"no difference from {baseline} found": (alike, 0),
        f"undecided after correction for {some(len(here), 'comparison')}": (
            [row for row in undecided if row not in alike],
            0,
        ),
    }
    found = "; ".join(
        f"{words}: {arms_with_differences(arms, sign)}" for words, (arms, sign) in kinds.items() if arms
    )
    where = f", at {scale}" if scale else ""
    unit = UNITS[ablation.metric]
    return f"{found[0].upper()}{found[1:]} {unit}{where} ({ablation.level:.0%} intervals over paired seeds)."


def arms_with_differences(arms: list[dict[str, Any]], sign: int) -> str:
    """Arms with their differences and intervals; of many the first.

    `sign`: 1 or -1 where the words before say in which direction; 0: the differences keep their sign.
    """
    texts = []
    for row in arms:
        low, high, difference = row["low"], row["high"], row["difference"]
        least, most = sorted((sign * low, sign * high)) if sign else (low, high)
        by, form = (sign * difference, "z.4f") if sign else (difference, "+z.4f")
        texts.append(f"{row['arm']} by {by:{form}} ({interval(least, most, form)})")
    return listed(texts, NAMED)


def trend_line(found: ArmTrend) -> str:
    """How an arm's gain changes with scale, or why that cannot be said."""
    scales = ", ".join(found.unreachable)
    if found.trend is None:
        return f"{found.arm}: no trend, as no compute reaches its loss at {scales}"
    trend = found.trend
    low, high = (np.exp(end) for end in trend.interval)
    by = f" by Holm over {found.compared} arms" if found.compared > 1 else ""
    without = f"; without {scales}, where no compute reaches its loss" if scales else ""
    return (
        f"{found.arm}: {trend.verdict}, × {np.exp(trend.per_decade):.3g} per decade of compute "
        f"({interval(low, high, '.3g')}), p {trend.p:.2g}{by}{without}"
    )


def gain_words(gain: Gain | Unreachable) -> str:
    """A multiple of the compute, with its interval, or why there is none."""
    if isinstance(gain, Unreachable):
        return str(gain)
    return f"{gain.multiplier:.3g} × compute, {interval(*gain.interval, '.3g')}"


def tables(ablation: Ablation) -> dict[str, pd.DataFrame]:
    """The tables that there are, by title."""
    found = {f"Arms against {ablation.baseline}, {ablation.level:.0%} intervals": arms_table(ablation)}
    if ablation.gains:
        gains = [
            {"scale": each.scale, "arm": each.arm, "FLOPs": each.compute, "gain": gain_words(each.gain)}
            for each in ablation.gains
        ]
        found["Compute-equivalent gain by the baseline's law"] = pd.DataFrame(gains)
    return found


def arms_table(ablation: Ablation) -> pd.DataFrame:
    """The table as people read it: intervals in one column, and no column of scale where all have one."""
    lines = []
    for line in ablation.arms.to_dict("records"):
        for name, low, high in (
            ("interval", "low", "high"),
            ("bootstrap", "bootstrap_low", "bootstrap_high"),
        ):
            line[name] = "" if np.isnan(line[low]) else interval(line[low], line[high], "+z.4f")
        line |= {name: number_or_blank(line.get(name), form) for name, form in FORMS.items()}
        line["verdict"] = line["verdict"] if isinstance(line["verdict"], str) else "baseline"
        lines.append({title: line[name] for name, title in COLUMNS.items()})
    table = pd.DataFrame(lines).rename(columns={"loss": ablation.metric})
    return table if len(set(ablation.arms["scale"])) > 1 else table.drop(columns="scale")
