"""Charts of a page that runs themselves give: loss over training with bands over seeds."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import pandas as pd

from scantling.analysis.arms import MOST_ARMS, rows_where
from scantling.report.spec import Axis, Chart, Series, Style

POINTS = 6000
"""Points of all curves of a chart together, so that a page stays small whatever the number of runs."""

MOST_POINTS = 240
"""Points of one curve."""

LINES = 48
"""Runs up to which each has a line of its own beside its arm's band."""

X = (
    Axis("tokens", "tokens", si=True),
    Axis("flops", "FLOPs"),
    Axis("seconds", "seconds of training", si=True),
)

VALIDATED, TRAINED = ("val/bpb", "val/loss"), "train/loss"

Y = {
    "val/bpb": "bits per byte",
    "val/loss": "nats per token",
    TRAINED: "training, nats per token",
}
"""Titles of the axes that curves are drawn against."""


def curves_chart(
    curves: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    metric: str,
    by_size: bool = False,
    colours: Mapping[str, int] = MappingProxyType({}),
    baseline: str | None = None,
) -> Chart | None:
    """Validation and training loss of `runs` against tokens, FLOPs and time.

    Each arm and scale has its mean over seeds with a band of ± two standard errors; the runs themselves are
    shown where they are few. Runs that are not finished are left out of a mean with finished ones.

    `metric`: the one shown first. `by_size`: colours by parameters, from small to large; else `colours`, by
    arm. `baseline`: an arm that is shown however many there are. None where nothing was recorded.
    """
    if not len(curves) or not {*VALIDATED, TRAINED} & set(curves):
        return None
    of_run = dict(list(curves.groupby("run", sort=False)))
    every = groups_with_curves(runs, of_run)
    groups = lowest_groups(every, baseline)
    if by_size:
        groups.sort(key=lambda g: float(np.nan_to_num(g.runs["params"].mean())))
    n_lines = sum(len(group.runs) for group in groups)
    each = n_lines <= LINES
    points = int(np.clip(POINTS // max(len(groups) + (n_lines if each else 0), 1), 8, MOST_POINTS))
    colours = with_others(colours, [group.arm for group in groups])
    sizes = runs["params"].to_numpy(dtype=float)
    found = []
    for group in groups:
        shade = shade_of_size(group.runs, sizes) if by_size else None
        colour = colours[group.arm] if shade is None else shade
        found += group_curves(group, of_run, colour, points, each=each)
    axes = [
        Axis(key, title, range=focus(found, key))
        for key, title in Y.items()
        if any(key in series.values for series in found)
    ]
    axes.sort(key=lambda axis: axis.key != f"val/{metric}")
    notes = [
        "Bands: ± two standard errors over seeds." if len(runs) > len(every) else "",
        note_of_hidden(len(every), baseline) if len(every) > len(groups) else "",
        "Thin lines: single runs." if each and len(runs) > len(groups) else "",
        "Drag to look closer, double-click for all"
        + ("; click a name to hide it, double-click to see it alone." if len(groups) > 1 else "."),
    ]
    return Chart(
        "Validation and training",
        tuple(found),
        tuple(replace(axis, log=by_size) for axis in X),
        tuple(axes),
        note=" ".join(filter(None, notes)),
        legend=len(groups) > 1,
        recorded=True,
        height=460,
    )


@dataclass(frozen=True)
class Group:
    """Runs of one arm and scale, which have one mean curve."""

    arm: str
    scale: str
    runs: pd.DataFrame

    @property
    def label(self) -> str:
        """The arm, and the scale where the arm's name does not say it."""
        return self.arm if set(self.scale.split()) <= set(self.arm.split()) else f"{self.arm}, {self.scale}"


def groups_with_curves(runs: pd.DataFrame, of_run: Mapping[Hashable, pd.DataFrame]) -> list[Group]:
    """Groups of which at least one run has recorded something."""
    keys = dict.fromkeys(zip(runs["arm"], runs["scale"], strict=True))
    groups = [Group(str(arm), str(scale), rows_where(runs, arm=arm, scale=scale)) for arm, scale in keys]
    return [group for group in groups if any(name in of_run for name in group.runs["run"])]


def lowest_groups(groups: Sequence[Group], baseline: str | None) -> list[Group]:
    """As many groups as a chart can show: those of the baseline, and those with the lowest losses."""
    if len(groups) <= MOST_ARMS:
        return list(groups)
    by_loss = sorted(groups, key=lambda g: float(np.nan_to_num(g.runs["loss"].mean(), nan=np.inf)))
    return sorted(by_loss, key=lambda g: g.arm != baseline)[:MOST_ARMS]


def note_of_hidden(n_groups: int, baseline: str | None) -> str:
    """A note on which of `n_groups` curves are shown."""
    also = "" if baseline is None else f" and those of {baseline}"
    return f"{MOST_ARMS} of {n_groups} curves are shown, those with the lowest losses{also}."


def shade_of_size(runs: pd.DataFrame, sizes: np.ndarray) -> float | None:
    """A shade from 0, the smallest of all `sizes`, to 1, by logarithms; None where all are one size."""
    logs = np.log(sizes)
    if np.ptp(logs[np.isfinite(logs)]) == 0:
        return None
    size = float(np.log(runs["params"].mean()))
    return float((size - np.nanmin(logs)) / (np.nanmax(logs) - np.nanmin(logs)))


def group_curves(
    group: Group,
    of_run: Mapping[Hashable, pd.DataFrame],
    colour: int | float,
    points: int,
    *,
    each: bool,
) -> list[Series]:
    """The mean, of finished runs where there are such, and beside it, with `each`, the runs."""
    finished = rows_where(group.runs, status="finished")
    averaged = finished if len(finished) else group.runs
    tables = [of_run[name] for name in averaged["run"] if name in of_run]
    found = mean_curve(tables, group.arm, group.label, colour, points)
    if each and len(group.runs) > 1:
        for name, seed in zip(group.runs["run"], group.runs["seed"], strict=True):
            if name in of_run:
                label = f"{group.label}, seed {seed}"
                found += mean_curve([of_run[name]], group.arm, label, colour, points, style="thin")
    return found


def with_others(colours: Mapping[str, int], arms: Iterable[str]) -> dict[str, int]:
    """The colour of every arm: those that have none take the next."""
    found = dict(colours)
    for arm in arms:
        found.setdefault(arm, len(found))
    return found


def focus(curves: Sequence[Series], key: str) -> tuple[float, float] | None:
    """The range of an axis that leaves out the first tenth of most curves, where losses are far higher."""
    values = [np.asarray(curve.values[key], dtype=float) for curve in curves if key in curve.values]
    finite = [v[np.isfinite(v)] for v in values]
    later = [v[len(v) // 10 :] for v in finite if len(v)]
    if not later:
        return None
    low, high = min(v.min() for v in later), float(np.quantile([v[0] for v in later], 0.9))
    margin = 0.06 * max(high - low, 0.01 * abs(high))
    return float(low - margin), float(high + margin)


def mean_curve(
    tables: Sequence[pd.DataFrame],
    group: str,
    label: str,
    colour: int | float,
    points: int,
    style: Style = "line",
) -> list[Series]:
    """A series for validation and one for training; steps that not all tables have are left out."""
    found = []
    for columns in (list(VALIDATED), [TRAINED]):
        if not all(set(columns) <= set(table) for table in tables):
            continue
        rows_of = pd.concat(tables).dropna(subset=columns)
        if not len(rows_of):
            continue
        by_step = rows_of.groupby("step")
        counts = by_step.size().to_numpy()
        kept = thinned(np.flatnonzero(counts == counts.max()), points)
        keys = [axis.key for axis in X if axis.key in rows_of] + columns
        mean = pd.DataFrame(by_step[keys].mean()).iloc[kept]
        band: tuple[dict, dict] = ({}, {})
        if counts.max() > 1:
            error = pd.DataFrame(by_step[columns].sem()).iloc[kept]
            for side, sign in zip(band, (-2, 2), strict=True):
                side |= {key: (mean[key] + sign * error[key]).tolist() for key in columns}
        values = {key: mean[key].tolist() for key in keys}
        found.append(Series(group, values, *band, style=style, colour=colour, hover=label))
    return found


def thinned(indices: np.ndarray, points: int) -> np.ndarray:
    """Evenly spaced indices, the first and the last among them; every point shown was recorded."""
    if len(indices) <= points:
        return indices
    return indices[np.unique(np.linspace(0, len(indices) - 1, points).round().astype(int))]


def others_chart(curves: pd.DataFrame) -> Chart | None:
    """Whatever else the rows of one run hold."""
    known = {"run", "step", TRAINED, *VALIDATED, *(axis.key for axis in X)}
    names = [
        name
        for name in curves
        if name not in known and not np.isnan(curves[name].to_numpy(dtype=float)).all()
    ]
    if not names:
        return None
    found = []
    for name in names:
        here = curves.dropna(subset=[name])
        here = here.iloc[thinned(np.arange(len(here)), MOST_POINTS)]
        keys = [axis.key for axis in X if axis.key in here] + [name]
        found.append(Series("run", {key: here[key].tolist() for key in keys}, colour=1))
    axes = tuple(Axis(name, name.replace("_", " ")) for name in names)
    return Chart("Also recorded", tuple(found), X, axes, legend=False, height=320)
