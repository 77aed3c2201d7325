"""The directory of a run: `runs/<study>/<run_id>/`, the truth that loggers mirror and analysis reads.

    config.yaml      the resolved configuration, and which option each group took
    env.json         commit, versions, device, corpus fingerprint, the overrides typed
    tokenizer.json
    metrics.jsonl    one object per logged step
    samples.jsonl    a continuation of the prompt at every validation
    checkpoints/     step-N.ckpt, the newest few, each with step-N.ckpt.sha256;
                     last.ckpt and best.ckpt name two of them
    curves.png
    profile/         with profile=true: a trace, and where the time of a step goes
    guards.jsonl     every step that went wrong: the reason, what was done, its samples
    summary.json     final numbers, written last: its presence means finished

A sweep's launcher adds log.txt, what the run printed; lease-N.json while it runs; slurm.json, its job there;
failed.json, why it failed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RunDirectory:
    """Paths and small files of one run. Files are replaced whole, never left half written."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if self.path.name in ("", ".."):  # as of `run=.`: it has a name, and a study above it
            self.path = Path(os.path.abspath(self.path))
        self.config = self.path / "config.yaml"
        self.tokenizer = self.path / "tokenizer.json"
        self.samples = self.path / "samples.jsonl"
        self.guards = self.path / "guards.jsonl"
        self.profile = self.path / "profile"
        self.curves = self.path / "curves.png"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` optimiser steps is kept, whether it is there or not."""
        return self.checkpoints / f"step-{step:08}.ckpt"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """How many optimiser steps a `step-N.ckpt` has behind it."""
        return int(checkpoint.stem.removeprefix("step-"))

    def step_checkpoints(self) -> list[Path]:
        """Every `step-N.ckpt`, newest first."""
        return sorted(self.checkpoints.glob("step-*.ckpt"), key=self.step_of, reverse=True)

    @property
    def name(self) -> str:
        """The run's id, which is the directory's name."""
        return self.path.name

    @property
    def wandb_id(self) -> str:
        """The run's id on Weights & Biases.

        An id is unique there within a project, and takes no step twice. So the same run in several studies
        has several, and a rollback begins another.
        """
        rollbacks = sum(row["action"] == "rollback" for row in self.guarded())
        course = f"{self.path.absolute().parent.name}/{rollbacks}"
        return f"{self.name}-{hashlib.sha256(course.encode()).hexdigest()[:8]}"

    @property
    def is_finished(self) -> bool:
        """Whether `summary.json`, which is written last, is there."""
        return (self.path / "summary.json").exists()

    @property
    def environment(self) -> dict[str, Any]:
        """The content of `env.json`. Raises FileNotFoundError before training has begun."""
        return json.loads((self.path / "env.json").read_text())

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`. Raises FileNotFoundError for a run that is not finished."""
        return json.loads((self.path / "summary.json").read_text())

    @property
    def last_sample(self) -> str:
        """The text of the latest sample."""
        return json.loads(self.samples.read_text().splitlines()[-1])["text"]

    def begin(self, config: str, environment: dict[str, Any]) -> None:
        """Set the directory up; raises ValueError where it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            replace_text(self.config, config)
            replace_text(self.path / "env.json", json.dumps(environment, indent=2) + "\n")
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}): choose another place with paths.runs=DIR"
            ) from error

    def guarded(self) -> list[Row]:
        """Every step that went wrong."""
        return read_rows(self.guards)

    def guard(self, record: Row) -> None:
        """Append `record` to the steps that went wrong."""
        replace_rows(self.guards, [*self.guarded(), record])

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, by which the run is finished."""
        replace_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    @property
    def has_metrics(self) -> bool:
        """Whether training was begun here before."""
        return (self.path / "metrics.jsonl").exists()

    def metrics(self) -> list[Row]:
        """Rows of `metrics.jsonl`; a last line cut short is left out."""
        return read_rows(self.path / "metrics.jsonl")

    def metrics_from(self, step: int) -> MetricsFile:
        """`metrics.jsonl`, open to append rows after `step`.

        Rows and samples beyond `step` are removed: they lie after the last checkpoint.
        """
        for path in (self.samples, self.path / "metrics.jsonl"):
            replace_rows(path, [row for row in read_rows(path) if row["step"] <= step])
        if (
            self.guards.exists()
        ):  # a step that was skipped will be again; a rollback says what the data are from here
            kept = [row for row in self.guarded() if row["step"] <= step or row["action"] != "skip"]
            replace_rows(self.guards, kept)
        return MetricsFile(self.path / "metrics.jsonl")


class MetricsFile:
    """Appends rows, each with one write, so that a killed process loses none it had written."""

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)

    def write(self, row: Row) -> None:
        """Append one row. Raises OSError when the disk is full."""
        line = (json.dumps(row) + "\n").encode()
        if self.file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file.name))

    def close(self) -> None:
        """Close the file; every row is written by then."""
        self.file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file with an object in each line; a last line cut short is left out."""
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def of_whole_training(last: Row) -> Row:
    """The last row, with the speed and MFU of the whole training in place of those since the row before."""
    speed = last["tokens"] / max(last["seconds"], 1e-3)
    mfu = last["mfu"] * speed / max(last["tokens_per_second"], 0.1)
    return {**last, "tokens_per_second": round(speed, 1), "mfu": round(mfu, 4)}


def replace_rows(path: Path, rows: list[Row]) -> None:
    """Write the rows to `path`, an object in each line, in place of what it held."""
    replace_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path`, which at any time holds the old text or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
