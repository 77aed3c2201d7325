"""Charts of a page about arms: differences with intervals, gains in compute, loss by length of context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import pandas as pd

from scantling.analysis.ablation import Gain, Unreachable
from scantling.analysis.arms import MOST_ARMS, rows_where
from scantling.analysis.comparison import Ablation, ArmGain
from scantling.analysis.observations import listed
from scantling.report.curve_charts import with_others
from scantling.report.lengths import arm_of
from scantling.report.numbers import interval
from scantling.report.sentences import at
from scantling.report.spec import Axis, Chart, Series
from scantling.runs.table import UNITS

NAMED = 10
"""Gains without an end that a note names."""


def rows_by_arm(ablation: Ablation) -> dict[str, list[dict[str, Any]]]:
    """Rows of each arm but the baseline; of many arms those with the lowest losses at the largest scale."""
    others = [arm for arm in ablation.order if arm != ablation.baseline]
    return {arm: rows_where(ablation.arms, arm=arm).to_dict("records") for arm in others[:MOST_ARMS]}


def column(table: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """One column of rows that are dictionaries."""
    return [row[name] for row in table]


def forest_chart(ablation: Ablation, colours: Mapping[str, int]) -> Chart:
    """Every arm's difference from the baseline with its paired t interval, at every scale.

    Of several scales each has a colour.
    """
    scales = list(dict.fromkeys(ablation.arms["scale"]))
    shown = rows_by_arm(ablation)
    labels = {
        (row["arm"], row["scale"]): row["arm"] if len(scales) == 1 else f"{row['arm']}, {row['scale']}"
        for of_arm in list(shown.values())[: max(MOST_ARMS // len(scales), 1)]
        for row in of_arm
    }
    kept = [row for of_arm in shown.values() for row in of_arm if (row["arm"], row["scale"]) in labels]
    if len(scales) == 1:
        groups = {row["arm"]: (colours[row["arm"]], [row]) for row in kept}
    else:
        groups = {
            scale: (i / (len(scales) - 1), [row for row in kept if row["scale"] == scale])
            for i, scale in enumerate(scales)
        }
    found = [
        Series(
            group,
            {
                "arm": [labels[row["arm"], row["scale"]] for row in here],
                "difference": column(here, "difference"),
            },
            {"difference": column(here, "low")},
            {"difference": column(here, "high")},
            style="points",
            colour=colour,
            hover=[f"{r['arm']}: {interval(r['low'], r['high'], '+z.4f')}, {r['verdict']}" for r in here],
        )
        for group, (colour, here) in groups.items()
    ]
    n_arms = len(set(ablation.arms["arm"])) - 1
    n_shown = len({arm for arm, _ in labels})
    more = (
        f"The {n_shown} of {n_arms} arms with the lowest losses{at(ablation.largest)}. "
        if n_arms > n_shown
        else ""
    )
    return Chart(
        f"Difference from {ablation.baseline}",
        tuple(found),
        (Axis("difference", f"{UNITS[ablation.metric]}, left of zero is better", log=None),),
        (Axis("arm", "arm", words=True, order=tuple(labels.values())),),
        note=f"{more}Points: mean over paired seeds. Bars: {ablation.level:.0%} paired t intervals, not "
        "corrected for the number of arms; the verdicts are.",
        legend=len(scales) > 1,
        height=max(220, 120 + 34 * len(labels)),
    )


def scale_chart(ablation: Ablation, compute: Mapping[str, float], colours: Mapping[str, int]) -> Chart | None:
    """Differences against compute, where arms were compared at several scales.

    `compute`: FLOPs of the baseline by scale.
    """
    if len(compute) < 2:
        return None
    found = [
        Series(
            arm,
            {"C": [compute[row["scale"]] for row in here], "difference": column(here, "difference")},
            {"difference": column(here, "low")},
            {"difference": column(here, "high")},
            colour=colours[arm],
        )
        for arm, here in rows_by_arm(ablation).items()
    ]
    return Chart(
        f"Difference from {ablation.baseline} over scale",
        tuple(found),
        (Axis("C", "FLOPs", log=True),),
        (Axis("difference", UNITS[ablation.metric], log=None),),
        note=f"Bands: {ablation.level:.0%} paired t intervals. Below zero is better.",
    )


def gain_chart(ablation: Ablation, colours: Mapping[str, int]) -> Chart | None:
    """Compute-equivalent gains against compute, where there is a law.

    Gains whose interval has no end are named in its note.
    """
    known: dict[str, list[tuple[float, Gain]]] = {}
    for each in ablation.gains:
        if has_ends(each.gain):
            known.setdefault(each.arm, []).append((each.compute, each.gain))
    if not known:
        return None
    found = []
    for arm, gains in known.items():
        values = {"C": [c for c, _ in gains], "gain": [gain.multiplier for _, gain in gains]}
        low, high = ({"gain": [gain.interval[end] for _, gain in gains]} for end in (0, 1))
        found.append(Series(arm, values, low, high, style="points", colour=colours[arm]))
    return Chart(
        "Compute-equivalent gain",
        tuple(found),
        (Axis("C", "FLOPs", log=True),),
        (Axis("gain", "× compute", log=True),),
        note="How many times the compute a difference as large takes on the baseline's law: above 1 is "
        "better." + not_drawn([each for each in ablation.gains if not has_ends(each.gain)]),
    )


def has_ends(gain: Gain | Unreachable) -> TypeGuard[Gain]:
    """Whether its interval can be drawn."""
    return not isinstance(gain, Unreachable) and bool(np.isfinite(gain.interval[1]))


def not_drawn(gains: Sequence[ArmGain]) -> str:
    """Gains whose interval has no end, in words; of many the first."""
    texts = []
    for each in gains:
        unreachable = isinstance(each.gain, Unreachable)
        why = "no compute reaches its loss" if unreachable else "its interval has no upper end"
        texts.append(f"{each.arm}{at(each.scale)} ({why})")
    return f" Not drawn: {listed(texts, NAMED)}." if texts else ""


def lengths_chart(
    records: Sequence[dict[str, Any]], arms: Mapping[str, str], colours: Mapping[str, int]
) -> Chart:
    """Loss by length of context, as `evaluate.py lengths=[…] to=DIR` left it.

    A ring marks the length of training. `arms`: the arm of each of the study's runs, by the run's name.
    """
    frame = pd.DataFrame(records)
    frame["arm"] = [arms.get(record["directory"], arm_of(record["run"])) for record in records]
    colours = with_others(colours, frame["arm"])
    slides = bool(frame["sliding"].any())
    found = []
    for arm in dict.fromkeys(frame["arm"]):
        for sliding in (False, True) if slides else (False,):
            here = rows_where(frame, arm=arm, sliding=sliding)
            hover = f"{arm}{', sliding' if sliding else ''}"
            style = "dashed" if slides and not sliding else "line"
            found.append(Series(arm, *by_length(here), style=style, colour=colours[arm], hover=hover))
            trained_at = here.iloc[np.flatnonzero(here["length"] == here["trained_at"])]
            if len(trained_at):
                rings = by_length(trained_at)[0]
                found.append(
                    Series(
                        arm, rings, style="rings", colour=colours[arm], hover=f"{hover}, length of training"
                    )
                )
    return Chart(
        "Loss by length of context",
        tuple(found),
        (Axis("length", "context, tokens", log=True, si=True),),
        (Axis("bpb", "bits per byte"), Axis("loss", "nats per token")),
        note="Rings: the length of training. Bands: ± two standard errors over seeds."
        + (" Solid: windows slide; dashed: side by side." if slides else ""),
    )


def by_length(
    here: pd.DataFrame,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, list[float]]]:
    """Means over seeds, and the ends of ± two standard errors."""
    lengths = sorted(set(here["length"]))
    mean, low, high = {"length": lengths}, {}, {}
    for key in ("loss", "bpb"):
        of_length = [rows_where(here, length=length)[key].to_numpy(dtype=float) for length in lengths]
        error = [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0.0 for v in of_length]
        mean[key] = [float(v.mean()) for v in of_length]
        low[key], high[key] = ([m + s * e for m, e in zip(mean[key], error, strict=True)] for s in (-2, 2))
    return mean, low, high
