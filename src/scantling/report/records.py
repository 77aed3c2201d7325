"""What runs recorded beside their losses: settings that differ, samples, where and with what they ran."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from scantling.analysis.arms import rows_where
from scantling.config.differences import leaves, varying_leaves
from scantling.config.settings import NOT_TRAINED, NOTES
from scantling.report.numbers import hours, number_or_blank, some
from scantling.report.spec import Link, Samples
from scantling.runs.directory import RunDirectory, read_rows
from scantling.runs.overrides import arms_changes, settings_of
from scantling.runs.table import Loader

SHOWN = ("trainer", "guard")
"""Settings whose difference a reader should see: they change a loss by rounding, or by a step left out."""

NO_SETTING = {"seed", *NOT_TRAINED} - {*SHOWN}
"""Nodes of a configuration that are not settings which runs of an arm have in common."""

SAMPLES = 12
"""Runs whose samples stand side by side."""

COMPARED = 24
"""Runs whose settings stand side by side."""

MACHINE = {
    "device": "devices",
    "precision": "precisions",
    "world_size": "numbers of processes",
    "torch": "versions of PyTorch",
    "commit": "commits",
    "scantling": "versions of Scantling",
}
"""Columns in which the runs of a study should be alike, each with the noun for several values."""


def of_each_arm(runs: pd.DataFrame) -> pd.DataFrame:
    """The first run of every arm, in the order of arms in `runs`."""
    return runs.drop_duplicates("arm")


def differing_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting that is not alike in all of `runs`, a column for each run under its arm or name.

    What follows from another setting, as the decoder's from the model's, is left out.
    """
    configurations = {}
    label = "arm" if runs["arm"].is_unique else "run"
    for run in runs.iloc[:COMPARED].to_dict("records"):
        found = leaves(yaml.load(RunDirectory(run["path"]).config.read_text(), Loader))
        configurations[run[label]] = {
            key: setting_text(value) for key, value in found.items() if is_setting(key)
        }
    keys = varying_leaves([*configurations.values()])
    table = [
        {
            "setting": key.removeprefix("choices."),
            **{arm: found.get(key, "") for arm, found in configurations.items()},
        }
        for key in sorted(keys, key=lambda key: not key.startswith("choices."))
    ]
    return pd.DataFrame(table, columns=["setting", *configurations])


def is_setting(key: str) -> bool:
    """Whether a leaf is a setting, and not the class that an option builds: that is told by its choice."""
    return key.partition(".")[0] not in NO_SETTING and not key.endswith(
        ("_target_", "_partial_", "choices.sweeps")
    )


def setting_text(value: Any) -> str:
    """A value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def settings_of_run(run: dict[str, Any]) -> pd.DataFrame:
    """Every setting of one run that the decoder's do not repeat."""
    found = leaves(yaml.load(RunDirectory(run["path"]).config.read_text(), Loader))
    shown = {key: setting_text(value) for key, value in found.items() if not key.startswith("decoder.")}
    return pd.DataFrame({"setting": list(shown), "value": list(shown.values())})


def last_samples(runs: pd.DataFrame) -> Samples | None:
    """What each of `runs` wrote last."""
    texts = []
    for run in runs.iloc[:SAMPLES].to_dict("records"):
        written_so_far = read_rows(RunDirectory(run["path"]).samples)
        if written_so_far:
            last = written_so_far[-1]
            texts.append((f"{run['arm']}, seed {run['seed']}, step {last['step']:,}", last["text"]))
    return Samples(tuple(texts)) if texts else None


def samples_over_training(run: dict[str, Any]) -> Samples | None:
    """The first sample of a run, its last, and some between."""
    found = read_rows(RunDirectory(run["path"]).samples)
    every = max(-(-len(found) // SAMPLES), 1)
    kept = [*found[:-1:every], *found[-1:]]
    return Samples(tuple((f"step {row['step']:,}", row["text"]) for row in kept)) if kept else None


def runs_table(runs: pd.DataFrame, directory: Path) -> pd.DataFrame:
    """A row a run, with a link to its directory from a page in `directory`."""
    table = []
    for run in runs.to_dict("records"):
        table.append(
            {
                "run": Link(run["run"], os.path.relpath(run["path"], directory)),
                "arm": run["arm"],
                "scale": run["scale"],
                "seed": run["seed"],
                "status": run["status"],
                "bits per byte": number_or_blank(run["bpb"], ".4f"),
                "nats per token": number_or_blank(run["loss"], ".4f"),
                "lr": number_or_blank(run["lr"], ".3g"),
                "params": number_or_blank(run["params"], ",.0f"),
                "tokens": number_or_blank(run["tokens"], ",.0f"),
                "FLOPs": number_or_blank(run["flops"], ".3g"),
                "seconds": number_or_blank(run["seconds"], ",.0f"),
            }
        )
    frame = pd.DataFrame(table)
    return frame.drop(columns=[name for name in ("scale", "arm") if not any(frame[name])])


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """How and where the runs were made; of several values each with its number of runs."""
    names = {
        "commit": "commit",
        "scantling": "Scantling",
        "torch": "PyTorch",
        "device": "device",
        "precision": "precision",
        "world_size": "processes",
        "corpus": "text, fingerprint",
        "tokenizer": "tokenizer, fingerprint",
    }
    table = []
    for column, title in names.items():
        counts = counted_values(runs, column)
        for value, count in counts.items():
            table.append(
                {"": title, "value": f"{value} ({some(count, 'run')})" if len(counts) > 1 else value}
            )
    environment = RunDirectory(runs["path"].iloc[0]).environment
    extra = {
        "Python": environment.get("python"),
        "Lightning": environment.get("lightning"),
        "text": environment["corpus"].get("description"),
    }
    table += [{"": title, "value": value} for title, value in extra.items() if value]
    flops, seconds = (float(np.nansum(runs[name].to_numpy(dtype=float))) for name in ("flops", "seconds"))
    tuned = "" if all(pd.isna(note) for note in runs["tuned"].tolist()) else ", the tries of tune=lr apart"
    table.append({"": "cost", "value": f"{flops:.3g} FLOPs, {hours(seconds)} of training{tuned}"})
    return pd.DataFrame(table)


def counted_values(runs: pd.DataFrame, column: str) -> Counter[str]:
    """How many runs have each value that was recorded, the most frequent first."""
    values = [value for value in runs[column].tolist() if value is not None and not pd.isna(value)]
    counts = Counter(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return Counter(dict(counts.most_common()))


def mixed(runs: pd.DataFrame) -> list[str]:
    """What makes runs of one study less comparable: several devices, versions, commits."""
    found = []
    for column, name in MACHINE.items():
        counts = counted_values(runs, column)
        if len(counts) > 1:
            listed = ", ".join(
                f"{shortened(value)} ({some(count, 'run')})" for value, count in counts.items()
            )
            found.append(f"mixed {name}: {listed}")
    return found


def shortened(value: str) -> str:
    """A hash by its first ten digits."""
    return re.sub(r"\b([0-9a-f]{10})[0-9a-f]{20,}", r"\1", value)


def failures(runs: pd.DataFrame) -> list[str]:
    """Why runs failed, a line each; of many the first ten."""
    failed = rows_where(runs, status="failed")
    lines = []
    for run in failed.iloc[:10].to_dict("records"):
        note = Path(run["path"]) / "failed.json"
        reason = json.loads(note.read_text() or "{}").get("reason", "")
        lines.append(f"{run['run']} ({run['arm']}, seed {run['seed']}) failed: {reason}")
    return lines


NOTED = ("matched", "tuned", "sweeps")
"""Overrides that the launcher adds."""

TYPED = 8
"""Runs up to which each has its own command, where no grid makes them."""


def train_command(runs: pd.DataFrame, sweep: dict[str, Any] | None) -> str:
    """What makes these runs again, from their overrides: a grid, or else each run's own command.

    `sweep`: their yaml of `sweeps/`, whose own arms and parameters need not be typed.
    """
    settings = [settings_of(text) for text in runs["overrides"]]
    noted = {*NOTED, *(key for note, key in NOTES.items() if any(note in setting for setting in settings))}
    grid_settings = [{key: setting[key] for key in setting if key not in noted} for setting in settings]
    names = {setting.get("sweeps") for setting in settings}
    sweeper = ((sweep or {}).get("hydra") or {}).get("sweeper") or {}
    arms = dict.fromkeys(sweeper.get("arms") or [None])
    run_arms = {setting.get("arm") for setting in settings}
    if len(settings) > 1 and sweep is not None and len(names) == 1 and run_arms <= set(arms):
        grid = grid_of(grid_settings, without={"arm", *arms_changes(settings)})
        if run_arms != set(arms):
            grid["arm"] = ",".join(str(arm) for arm in arms if arm in run_arms)
        for key, value in (sweeper.get("params") or {}).items():
            if set(grid.get(key, "").split(",")) == set(str(value).replace(" ", "").split(",")):
                del grid[key]
        return typed(f"python src/train.py -m sweeps={names.pop()}", grid)
    if len(settings) > 1 and names == {None} and is_product(grid_settings):
        return typed("python src/train.py -m", grid_of(grid_settings))
    if len(settings) > TYPED:
        return f"# {len(settings)} runs, no grid: env.json of each has what was typed for it"
    one = {"hydra.mode": "RUN"}  # a yaml of sweeps/ asks for the whole sweep
    return "\n".join(
        typed("python src/train.py", setting | (one if "sweeps" in setting else {})) for setting in settings
    )


def grid_of(settings: list[dict[str, str]], without: Collection[str] = ()) -> dict[str, str]:
    """Every setting with its values, as they are typed."""
    keys = dict.fromkeys(key for setting in settings for key in setting if key not in without)
    values = {key: dict.fromkeys(s[key] for s in settings if key in s) for key in keys}
    return {key: ",".join(sorted(of, key=in_number) if len(of) > 1 else of) for key, of in values.items()}


def is_product(settings: list[dict[str, str]]) -> bool:
    """Whether these are a grid: every combination of their values, and each with every key."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    n_values = [len({setting.get(key) for setting in settings}) for key in keys]
    alike = all(setting.keys() == keys.keys() for setting in settings)
    return alike and math.prod(n_values) == len({tuple(sorted(s.items())) for s in settings})


def in_number(value: str) -> tuple[float, str]:
    """A key that sorts numbers by size, and words behind them."""
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def typed(command: str, settings: dict[str, str]) -> str:
    """A command with its settings, quoted for a shell."""
    taken_away = {key for key in settings if key.startswith("~") and settings[key] in ("", "null")}
    words = [key if key in taken_away else f"{key}={value}" for key, value in settings.items()]
    return " ".join([command, *map(shlex.quote, words)])
