"""Charts of a page about arms: differences with their intervals, gains in compute, loss by length of context."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scantling.report.curve_charts import ARMS
from scantling.report.spec import Axis, Chart, Series
from scantling.study.ablation_report import AblationReport
from scantling.study.arms import rows

UNITS = {"loss": "nats per token", "bpb": "bits per byte"}


def compared(report: AblationReport) -> dict[str, list[dict[str, Any]]]:
    """Rows of the arms' table by arm, without the baseline; those of the first arms, which have the lowest losses."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report.arms.to_dict("records"):
        if row["arm"] != report.baseline:
            found.setdefault(row["arm"], []).append(row)
    return dict(list(found.items())[:ARMS])


def column(table: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in table]


def forest_chart(report: AblationReport) -> Chart:
    """Every arm's difference from the baseline with its paired t interval, at every scale."""
    scales = list(dict.fromkeys(report.arms["scale"]))
    shown = compared(report)
    labels = {
        (row["arm"], row["scale"]): row["arm"] if len(scales) == 1 else f"{row['arm']}, {row['scale']}"
        for of_arm in list(shown.values())[: max(ARMS // len(scales), 1)]
        for row in of_arm
    }
    found = []
    for i, scale in enumerate(scales):
        here = [
            row
            for of_arm in shown.values()
            for row in of_arm
            if row["scale"] == scale and (row["arm"], scale) in labels
        ]
        found.append(
            Series(
                scale or report.metric,
                {
                    "arm": [labels[row["arm"], scale] for row in here],
                    "difference": column(here, "difference"),
                },
                {"difference": column(here, "low")},
                {"difference": column(here, "high")},
                style="points",
                colour=i / (len(scales) - 1) if len(scales) > 1 else 0,
                hover=[f"{r['arm']}: {r['low']:+.4f} to {r['high']:+.4f}, {r['verdict']}" for r in here],
            )
        )
    n_arms = len(set(report.arms["arm"])) - 1
    n_shown = len({arm for arm, _ in labels})
    more = f"The {n_shown} of {n_arms} arms with the lowest losses. " if n_arms > n_shown else ""
    return Chart(
        f"Difference from {report.baseline}",
        tuple(found),
        (Axis("difference", f"{UNITS[report.metric]}, left of zero is better", log=None),),
        (Axis("arm", "arm", words=True, order=tuple(labels.values())),),
        note=f"{more}Points: mean over paired seeds. Bars: {report.level:.0%} paired t intervals, not corrected for the "
        "number of arms; the verdicts are.",
        legend=len(scales) > 1,
        height=max(220, 120 + 34 * len(labels)),
    )


def scale_chart(report: AblationReport, compute: dict[str, float]) -> Chart | None:
    """Differences against compute, where arms were compared at several scales; `compute`: FLOPs of the baseline by scale."""
    if len(compute) < 2:
        return None
    found = [
        Series(
            arm,
            {"C": [compute[row["scale"]] for row in here], "difference": column(here, "difference")},
            {"difference": column(here, "low")},
            {"difference": column(here, "high")},
            colour=i,
        )
        for i, (arm, here) in enumerate(compared(report).items())
    ]
    return Chart(
        f"Difference from {report.baseline} over scale",
        tuple(found),
        (Axis("C", "FLOPs", log=True),),
        (Axis("difference", UNITS[report.metric], log=None),),
        note=f"Bands: {report.level:.0%} paired t intervals. Below zero is better.",
    )


def gain_chart(report: AblationReport) -> Chart | None:
    """Compute-equivalent gains against compute, where a law is at hand."""
    gains = [] if report.gains is None else report.gains.to_dict("records")
    known = [row for row in gains if np.isfinite(row["high"])]
    if not known:
        return None
    found = []
    for i, arm in enumerate(dict.fromkeys(column(known, "arm"))):
        here = [row for row in known if row["arm"] == arm]
        values = {"C": column(here, "FLOPs"), "gain": column(here, "gain")}
        bars = {"gain": column(here, "low")}, {"gain": column(here, "high")}
        found.append(Series(arm, values, *bars, style="points", colour=i))
    return Chart(
        "Compute-equivalent gain",
        tuple(found),
        (Axis("C", "FLOPs", log=True),),
        (Axis("gain", "× compute", log=True),),
        note="What the baseline would need, as a multiple of the compute, to reach the arm's loss: above 1 is better.",
    )


def lengths_chart(records: Sequence[dict[str, Any]]) -> Chart:
    """Loss by length of context, of what `evaluate.py lengths=[…] to=DIR` left; a ring marks the length of training."""
    frame = pd.DataFrame(records)
    frame["arm"] = [re.sub(r" ?seed=\d+", "", name) or name for name in frame["run"]]
    slides = bool(frame["sliding"].any())
    found = []
    for i, arm in enumerate(dict.fromkeys(frame["arm"])):
        for sliding in (False, True) if slides else (False,):
            here = rows(frame, arm=arm, sliding=sliding)
            hover = f"{arm}{', sliding' if sliding else ''}"
            style = "dashed" if slides and not sliding else "line"
            found.append(Series(arm, *by_length(here), style=style, colour=i, hover=hover))
            at = here.iloc[np.flatnonzero(here["length"] == here["trained_at"])]
            if len(at):
                rings = by_length(at)[0]
                found.append(
                    Series(arm, rings, style="rings", colour=i, hover=f"{hover}, length of training")
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
        of_length = [rows(here, length=length)[key].to_numpy(dtype=float) for length in lengths]
        error = [v.std(ddof=1) / np.sqrt(len(v)) if len(v) > 1 else 0.0 for v in of_length]
        mean[key] = [float(v.mean()) for v in of_length]
        low[key], high[key] = ([m + s * e for m, e in zip(mean[key], error, strict=True)] for s in (-2, 2))
    return mean, low, high
