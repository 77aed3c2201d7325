"""Runs of this project that Weights & Biases holds, brought back into the store.

Offline they come from the `.wandb` files beside the runs, online from a project on the server. What
W&B holds is the configuration, the environment and the rows of `metrics.jsonl`, and from these a
run's directory is written: enough for tables, curves, laws and comparisons. Checkpoints, samples and
the tokenizer are not there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from scantling.runs.directory import Row, RunDirectory, of_whole_training
from scantling.runs.wandb_file import records

WANTED = ("choices", "environment", "seed", "model")
"""What a configuration must have to be that of a run of this project."""

BESIDE = ("environment", "parameters")
"""What the logger adds to the configuration that config.yaml holds."""


@dataclass(frozen=True)
class Mirrored:
    """A run as W&B has it."""

    name: str
    study: str
    config: dict[str, Any]
    rows: list[Row]
    finished: bool
    source: str


def mirrored_runs(source: str) -> list[Callable[[], Mirrored]]:
    """What reads each run, one after another, and raises ValueError where it cannot be read.

    `source`: a `.wandb` file, a directory with such files somewhere below it, or ENTITY/PROJECT on the
    server. Raises ValueError for anything else.
    """
    path = Path(source).expanduser()
    if path.exists():
        return [partial(offline_run, segments) for segments in segments_of(path)]
    if not re.fullmatch(r"[\w-]+/[\w .-]+", source):
        raise ValueError(f"source={source} is no file or directory, and no ENTITY/PROJECT of W&B")
    with w_and_b_asked(source):
        import wandb  # here: files need not wait for it

        return [partial(online_run, run, source) for run in wandb.Api().runs(source)]


def import_run(run: Mirrored, runs: Path) -> str:
    """Write the run's directory below `runs`; one line that says what was done.

    A directory that training made is left alone; one that an import made is renewed. Raises ValueError
    for runs of other projects.
    """
    lacking = [key for key in WANTED if key not in run.config]
    if lacking:
        raise ValueError(
            f"{run.source} is no run of this project: its configuration has no {', '.join(lacking)}"
        )
    if not run.rows:
        raise ValueError(f"{run.source} has no metrics")
    for name in (run.study, run.name):
        if not name or name != Path(name).name or name.startswith("."):
            raise ValueError(f"{run.source}: {name!r} is no name of a directory")
    directory = RunDirectory(runs / run.study / run.name)
    if directory.config.exists() and "imported" not in directory.environment:
        return f"{directory.path} was trained here, and stays"
    config = {key: value for key, value in run.config.items() if key not in BESIDE}
    environment = run.config["environment"] | {"imported": run.source, "parameters": parameters(run)}
    directory.begin(yaml.safe_dump(config, sort_keys=False), environment)
    metrics = directory.metrics_from(-1)
    for row in run.rows:
        metrics.write(row)
    metrics.close()
    if run.finished:
        directory.finish(summary(run))
    return f"{directory.path}: {len(run.rows):,} rows{'' if run.finished else ', not finished'}"


def summary(run: Mirrored) -> dict[str, Any]:
    """The content of `summary.json` as training writes it, less what W&B was not told."""
    validated = [row for row in run.rows if "val/loss" in row]
    best = min(validated, key=lambda row: row["val/loss"], default={})
    return {
        **of_whole_training(run.rows[-1]),
        "best": {key: best[key] for key in ("step", "tokens", "val/loss", "val/bpb") if key in best},
        "parameters": parameters(run),
        "corpus": run.config["environment"]["corpus"]["fingerprint"],
    }


def parameters(run: Mirrored) -> dict[str, int]:
    """Parameters by group; none where W&B was not told."""
    return run.config.get("parameters", {})


def as_row(item: dict[str, Any]) -> Row:
    """A row of `metrics.jsonl`: the numbers of an item, without W&B's own columns."""
    return {
        key: value
        for key, value in item.items()
        if isinstance(value, int | float) and not key.startswith(("_", "trainer/", "sample"))
    }


def by_step(rows: list[Row]) -> list[Row]:
    """One row a step, the latest, in order."""
    return [row for _, row in sorted({row["step"]: row for row in rows if "step" in row}.items())]


# --- offline ---


def segments_of(path: Path) -> list[list[Path]]:
    """The files of each run, oldest first: a run that was resumed offline has several.

    Raises ValueError where there are none.
    """
    files = [path] if path.is_file() else sorted(path.rglob("run-*.wandb"))
    if not files:
        raise ValueError(f"{path} has no .wandb files in it")
    found: dict[tuple[Path, str], list[Path]] = {}
    for file in files:  # `wandb/offline-run-TIME-ID/run-ID.wandb`
        found.setdefault((file.parent.parent, file.name), []).append(file)
    return list(found.values())


def offline_run(files: list[Path]) -> Mirrored:
    """The run that these files hold, in the order in which they were written.

    It is finished where the last file ends with exit code 0.
    """
    name, study, config, rows, finished = files[0].stem.removeprefix("run-"), "", {}, [], False
    for file in files:
        finished = False
        for record in records(file):
            content = record[record["type"]]
            if record["type"] == "run":
                name, study = content["display_name"], content.get("run_group", "")
            elif record["type"] == "config":
                config |= content["update"]
            elif record["type"] == "history":
                rows.append(as_row(content["item"]))
            elif record["type"] == "exit":
                finished = content["exit_code"] == 0
    return Mirrored(name, study, config, by_step(rows), finished, str(files[-1]))


# --- online ---


def online_run(run: Any, project: str) -> Mirrored:
    """A run of the server's `project`. Raises ValueError for what W&B refuses or cannot give."""
    source = f"{project}/{run.id}"
    with w_and_b_asked(source):
        rows = [as_row(item) for item in run.scan_history()]
        return Mirrored(
            run.name, run.group or "", dict(run.config), by_step(rows), run.state == "finished", source
        )


@contextlib.contextmanager
def w_and_b_asked(source: str) -> Iterator[None]:
    """Turn what W&B refuses or cannot give into a ValueError."""
    import wandb

    try:
        yield
    except (wandb.Error, ValueError, OSError) as error:
        raise ValueError(f"source={source}: W&B says: {' '.join(str(error).split())}") from error
