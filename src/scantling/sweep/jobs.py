"""A job of a sweep: the command of one run, and what has become of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scantling.run_directory import RunDirectory, replace_text

ENDED = ("done", "finished before", "done elsewhere", "failed", "failed elsewhere")
FAILED = ("failed", "failed elsewhere")


@dataclass
class Job:
    """`devices` are the processes it takes, on GPUs or CPUs; `steps` those of its budget."""

    number: int
    overrides: list[str]
    label: str
    directory: RunDirectory
    devices: int
    on_gpu: bool
    steps: int
    state: str = "queued"
    reason: str = ""
    """Why it failed, in one line."""
    attempts: int = 0
    seen: dict = field(default_factory=dict)
    """Its latest row of metrics."""
    log_start: int = 0

    @property
    def log(self) -> Path:
        return self.directory.path / "log.txt"

    @property
    def failure(self) -> Path:
        """Says to the other launchers of a sweep that a job is not to be tried again."""
        return self.directory.path / "failed.json"

    def note_failure(self, reason: str, code: int | None) -> None:
        self.state, self.reason = "failed", reason
        replace_text(self.failure, json.dumps({"reason": reason, "code": code}) + "\n")

    def begin_log(self) -> None:
        """What an earlier attempt wrote stays above."""
        self.log_start = self.log.stat().st_size if self.log.exists() else 0

    def first_line_of_why(self) -> str:
        """Of the log's end: the line that an entry prints for a mistake, else an exception's own."""
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (named or lines or ["it left no word"])[-1]


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """For each job's overrides, those in which the jobs differ."""
    settings = [{o.partition("=")[0]: o.partition("=")[2] for o in overrides} for overrides in jobs]
    varied = [
        key
        for key in dict.fromkeys(k for s in settings for k in s)
        if len({s.get(key) for s in settings}) > 1
    ]
    if (
        "arm" in varied
    ):  # it stands for what it changes: what not every job sets, or what the sweeper puts after it
        changes = {key for s in settings for key in list(s)[list(s).index("arm") + 1 :]}
        grid = {key for key in varied if all(key in s for s in settings) and key not in changes}
        varied = [key for key in varied if key in {"arm", "seed"} | grid]
    return [" ".join(f"{key}={s[key]}" for key in varied if key in s) or "the only job" for s in settings]
