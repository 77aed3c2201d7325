"""A job of a sweep: the command of one run, and what has become of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from scantling.runs.directory import RunDirectory, replace_text

ENDED = ("done", "finished before", "done elsewhere", "failed", "failed elsewhere")
FAILED = ("failed", "failed elsewhere")


@dataclass
class Job:
    """A job of a sweep.

    `devices` are the processes it takes on each of its `nodes`, on GPUs or CPUs; `steps` those that its
    budget is forecast to pay for.
    """

    number: int
    overrides: list[str]
    label: str
    directory: RunDirectory
    devices: int
    nodes: int
    on_gpu: bool
    steps: int
    state: str = "queued"
    reason: str = ""
    """Why it failed, in one line."""
    attempts: int = 0
    seen: dict = field(default_factory=dict)
    """Its latest row of metrics."""
    log_start: int = 0

    @cached_property
    def steps_of_run(self) -> int:
        """The steps that the run planned, which knows its tokenizer's vocabulary. Ask once it has begun."""
        return self.directory.environment["steps"]

    @property
    def log(self) -> Path:
        """What the job writes to standard output and error, one attempt below the other."""
        return self.directory.path / "log.txt"

    @property
    def failure(self) -> Path:
        """The file that says to the other launchers of a sweep that a job is not to be tried again."""
        return self.directory.path / "failed.json"

    def note_failure(self, reason: str, code: int | None) -> None:
        """Note that the job has failed for good, in a file that says so to other launchers."""
        self.state, self.reason = "failed", reason
        replace_text(self.failure, json.dumps({"reason": reason, "code": code}) + "\n")

    def failed_since(self, moment: float) -> str | None:
        """The reason, where another launcher has noted one since `moment` and does not try again."""
        try:
            if self.failure.stat().st_mtime >= moment:
                return json.loads(self.failure.read_text())["reason"]
        except FileNotFoundError:
            pass
        return None

    def begin_log(self) -> None:
        """Begin an attempt's part of the log, below what earlier attempts wrote."""
        self.log_start = self.log.stat().st_size if self.log.exists() else 0

    def failure_reason(self) -> str:
        """Why it failed: what the entry or the first failed process says, else the last line of the log."""
        lines = self.log_lines()
        return self.own_reason() or (lines[-1] if lines else "it left no word")

    def own_reason(self) -> str | None:
        """The reason that this attempt itself gave for its failure."""
        named = [line.removeprefix("error: ") for line in self.log_lines() if line.startswith("error: ")]
        return named[0] if named else None

    def log_lines(self) -> list[str]:
        """The lines that this attempt wrote."""
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        return [line.strip() for line in text.splitlines() if line.strip()]


def label_jobs(jobs: Sequence[Sequence[str]]) -> list[str]:
    """For each job the overrides in which jobs differ; a named arm stands for what it changes."""
    settings = [{o.partition("=")[0]: o.partition("=")[2] for o in overrides} for overrides in jobs]
    values: dict[str, dict[str | None, set[str | None]]] = {}
    for key in dict.fromkeys(k for s in settings for k in s):
        for s in settings:
            values.setdefault(key, {}).setdefault(s.get("arm"), set()).add(s.get(key))
    varied = [key for key, of_arm in values.items() if key == "arm" or max(map(len, of_arm.values())) > 1]
    if len({s.get("arm") for s in settings}) == 1 and "arm" in varied:
        varied.remove("arm")
    return [
        " ".join(f"{key}={shorten_number(s[key])}" for key in varied if key in s) or "the only job"
        for s in settings
    ]


def shorten_number(value: str) -> str:
    """A number in its shortest form, 1e+12 for 1000000000000.0; other values as they are."""
    try:
        number = float(value)
    except ValueError:
        return value
    short = f"{number:g}"
    return min(value, short, key=len) if float(short) == number else value
