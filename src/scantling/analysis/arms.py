"""The finished runs of a study by arm, scale and seed, and whether they make a law or a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from scantling.analysis.findings import ConstantSchedule, Finding, NotFinished, PartnerLost, Unreadable
from scantling.analysis.observations import listed
from scantling.config.settings import FOLLOWS_SIZE, SHAPE, TUNED
from scantling.runs.overrides import arms_changes, joined, settings_of, varied_keys, varied_within
from scantling.runs.table import load_runs

LAW_SPAN = 2.0
"""Runs that differ in shape alone make a law when the largest takes more than this many
times the smallest's compute.
"""

MOST_ARMS = 40
"""Arms in a figure or a chart, those of lowest loss: more curves cannot be told apart."""


@dataclass(frozen=True)
class StudyRuns:
    """The runs of a study, sorted.

    `runs`: a row for each finished run under its name, as `load_runs` has it, with `scale`, the settings of
    its size. `recorded`: likewise every run, finished or not. `is_law`: the runs differ only in size and
    length, by much, and in what follows these. `cautions`: what was left out, or makes the study doubtful.
    """

    name: str
    runs: pd.DataFrame
    recorded: pd.DataFrame
    is_law: bool
    cautions: tuple[Finding, ...]

    @property
    def scales(self) -> list[str]:
        """Scales in the order of their compute, the least first."""
        flops = {
            scale: mean_of(rows_where(self.runs, scale=scale), "flops")
            for scale in dict.fromkeys(self.runs["scale"])
        }
        return sorted(flops, key=lambda scale: flops[scale])


def rows_where(frame: pd.DataFrame, **equal: object) -> pd.DataFrame:
    """The rows whose columns hold these values."""
    chosen = np.ones(len(frame), dtype=bool)
    for column, value in equal.items():
        chosen &= (frame[column] == value).to_numpy(dtype=bool)
    return frame.iloc[np.flatnonzero(chosen)]


def mean_of(frame: pd.DataFrame, column: str) -> float:
    """The mean of a column."""
    return float(frame[column].to_numpy(dtype=float).mean())


def study_runs(directory: Path) -> StudyRuns:
    """A study read from its directory. Raises ValueError as `recorded_runs` and `finished_runs` do."""
    return finished_runs(directory, *recorded_runs(directory))


def finished_runs(
    directory: Path,
    frame: pd.DataFrame,
    cautions: Sequence[Finding],
    *,
    same: Sequence[str] = ("corpus", "tokenizer"),
) -> StudyRuns:
    """The finished ones of `recorded_runs`, by arm and scale.

    Raises ValueError where none is finished, and for runs on different text, naming them.
    """
    runs = rows_where(frame, status="finished")
    if not len(runs):
        raise ValueError(
            f"{directory} holds no finished run: the same python src/train.py -m command goes on"
        )
    for name in same:
        values = [str(value) for value in runs[name]]
        most = max(set(values), key=values.count)
        wrong = [str(run) for run, value in zip(runs["run"], values, strict=True) if value != most]
        if wrong:
            raise ValueError(
                f"runs of {directory.name} differ in their {name}, and losses on different {name} are not "
                f"comparable: {listed(wrong)} against the others"
            )
    constant = [ConstantSchedule()] if "constant" in set(runs["choice.schedule"]) else []
    is_law = differ_in_size_alone(runs)
    return StudyRuns(directory.name, runs.copy(), frame, is_law, (*cautions, *constant))


def recorded_runs(directory: Path) -> tuple[pd.DataFrame, list[Finding]]:
    """Every run, as `StudyRuns` has them, and those that are not finished. Raises ValueError for no runs."""
    frame = load_runs(directory)
    cautions: list[Finding] = [Unreadable(name, why) for name, why in frame.attrs["left_out"].items()]
    if not len(frame):
        raise ValueError(f"{directory} holds no run")
    frame = frame.set_index("run", drop=False)
    for status in ("failed", "unfinished"):
        names = rows_where(frame, status=status)["run"]
        if len(names):
            cautions.append(NotFinished(status, tuple(names)))
    return arms_and_scales(frame), cautions


def arms_and_scales(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs with `scale`, the settings of their size, and `arm`: its name, else the other settings.

    Also of unfinished runs: one that goes on with a setting of its own is not a run of a finished arm.
    """
    settings = [settings_of(text) for text in frame["overrides"]]
    varied = varied_keys(settings)
    scale_keys = [key for key in varied if is_size(key)]
    if differ_in_size_alone(rows_where(frame, status="finished")):
        return frame.assign(scale=[joined(setting, scale_keys) for setting in settings])
    changes = arms_changes(settings)
    scale_keys = [key for key in scale_keys if key not in changes]
    rest = [key for key in varied if key not in scale_keys]
    arms = [
        name if "arm" in setting else joined(setting, rest) or "default"
        for name, setting in zip(frame["arm"], settings, strict=True)
    ]
    return frame.assign(scale=[joined(setting, scale_keys) for setting in settings], arm=arms)


def differ_in_size_alone(runs: pd.DataFrame) -> bool:
    """Whether runs make a law: only size varies, with what follows it, and compute varies by much.

    Each size has one value of every setting that is tuned.
    """
    settings = [settings_of(text) for text in runs["overrides"]]
    varied = varied_keys(settings)
    size_keys = [key for key in varied if is_size(key)]
    if not size_keys or not all(key in size_keys or key in FOLLOWS_SIZE for key in varied):
        return False
    if not varied_within([joined(setting, size_keys) for setting in settings], settings).isdisjoint(TUNED):
        return False
    size = runs["params"].to_numpy(dtype=float) * runs["tokens"].to_numpy(dtype=float)
    return bool(size.max() > LAW_SPAN * size.min())


def pairable_runs(study: StudyRuns, baseline: str) -> tuple[pd.DataFrame, list[PartnerLost]]:
    """The finished runs whose partner finished too, and the others with what they lack.

    A run that the baseline lacks takes its seed out of the comparison at that scale; one that another arm
    lacks takes that arm out. The baseline comes first, as an arm loses nothing by a seed that is out already.
    """
    runs, lost_partners = study.runs, []
    lost = study.recorded.iloc[np.flatnonzero(study.recorded["status"] != "finished")]
    lost = lost.iloc[np.argsort(lost["arm"] != baseline, kind="stable")]
    for _, run in lost.iterrows():
        scale, arm, seed = run["scale"], run["arm"], run["seed"]
        partners = rows_where(runs, scale=scale, seed=seed)
        partners = partners.iloc[np.flatnonzero(partners["arm"] != arm)]
        leaves = partners if arm == baseline else rows_where(runs, scale=scale, arm=arm)
        if not len(leaves) or not len(partners) or len(rows_where(runs, scale=scale, arm=arm, seed=seed)):
            continue
        lost_partners.append(PartnerLost(run["status"], scale, arm, seed, baseline))
        runs = runs.drop(leaves.index)
    return runs, lost_partners


def is_size(key: str) -> bool:
    """Whether a setting makes a run larger or longer."""
    group, _, name = key.partition(".")
    return group == "budget" or key == "model" or (group == "model" and name in SHAPE)


def tell_models_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """Runs that are not compared, with the settings in which those of an arm and scale
    differ as part of the scale.

    Seeds aside. So no curve is the mean of different models.
    """
    settings = [settings_of(text) for text in frame["overrides"]]
    groups = list(zip(frame["arm"], frame["scale"], strict=True))
    within = varied_within(groups, settings)
    keys = [key for key in varied_keys(settings) if key in within]
    return frame.assign(
        scale=[f"{scale} {joined(s, keys)}".strip() for (_, scale), s in zip(groups, settings, strict=True)]
    )


def first_arm(sweep: dict | None, arms: Sequence[str]) -> str:
    """The baseline where none is named: the first arm of a yaml of `sweeps/`, else that of the first values.

    Raises ValueError where that cannot be told.
    """
    sweeper = ((sweep or {}).get("hydra") or {}).get("sweeper") or {}
    named = list(sweeper.get("arms") or {})
    if named and named[0] in arms:
        return named[0]
    values = {key: str(value).split(",")[0].strip() for key, value in (sweeper.get("params") or {}).items()}
    first = [
        arm
        for arm in arms
        if arm.split() and all(values.get(s.partition("=")[0]) == s.partition("=")[2] for s in arm.split())
    ]
    if len(first) == 1:
        return first[0]
    raise ValueError(
        f"name the arm that others are compared with: baseline= one of {', '.join(sorted(arms))}"
    )
