"""Runs the jobs of a sweep to their ends, beside other launchers that do the same over a shared folder."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from scantling.sweep.devices import Devices, Share
from scantling.sweep.jobs import ENDED, Job
from scantling.sweep.leases import Lease, folder_time
from scantling.sweep.processes import Process
from scantling.sweep.screen import Screen

TICK = 0.05
"""Seconds between two looks at the processes."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at files: metrics, and jobs that others hold."""


@dataclass(frozen=True)
class Limits:
    """How long jobs may take, and how often they may be tried."""

    retries: int
    """How often a job is tried again that somebody else killed, or told to stop."""
    timeout_seconds: float | None
    lease_seconds: float
    stop_seconds: float
    """Seconds between asking a job to stop and killing it."""


@dataclass
class RunningJob:
    """A job under way here, and what it holds."""

    job: Job
    process: Process
    share: Share
    lease: Lease
    deadline: float | None
    kill_at: float | None = None
    overdue: bool = False
    lost: bool = False
    beat_at: float = field(default_factory=time.monotonic)


class Scheduler:
    """Runs jobs to their ends.

    `start(job, share)` gives a process; its exit code and the run's own record say how the job ended.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        devices: Devices,
        limits: Limits,
        start: Callable[[Job, Share], Process],
        screen: Screen,
        folder: Path,
    ) -> None:
        self.jobs, self.devices, self.limits, self.start, self.screen = jobs, devices, limits, start, screen
        self.running: list[RunningJob] = []
        self.began = folder_time(folder)
        self.asked = 0
        """How often a signal told this launcher to stop."""
        self.looked = 0.0

    def run(self) -> None:
        """Run until every job has ended, here or elsewhere, or a signal has stopped the running ones."""
        which = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = {s: signal.signal(s, self.ask) for s in which}
        try:
            while self.running or (not self.asked and any(job.state not in ENDED for job in self.jobs)):
                self.reap()
                self.renew()
                self.stop_overdue()
                if not self.asked:
                    self.start_more()
                self.look()
                self.screen.draw()
                time.sleep(TICK)
        finally:
            for running in self.running:
                running.process.kill()
                running.lease.release()
            for s, handler in before.items():
                signal.signal(s, handler)

    def ask(self, which: int, frame: FrameType | None) -> None:
        """The first time jobs are asked to stop, which leaves a checkpoint; a second Ctrl-C kills them."""
        self.asked += 1
        for running in self.running:
            if self.asked > 1 and which == signal.SIGINT:
                running.process.kill()
            else:
                running.process.ask_to_stop()

    # --- starting ---

    def start_more(self) -> None:
        """Start jobs in their order until one does not fit."""
        look_at_others = time.monotonic() - self.looked >= LOOK_AGAIN
        for job in self.jobs:
            if job.state == "queued" or (job.state == "elsewhere" and look_at_others):
                share = self.devices.take(job)
                if share is None:
                    return  # in order, so that a large job is not passed by small ones for ever
                lease = self.claim(job)
                if lease is None:
                    self.devices.give_back(share)
                    continue
                self.launch(job, share, lease)

    def claim(self, job: Job) -> Lease | None:
        """The right to run a job; None, with the job's state, where it has ended or another runs it."""
        lease = Lease.take(job.directory.path, self.limits.lease_seconds)
        if job.directory.is_finished:
            self.change(job, "done elsewhere")
        elif (reason := job.failed_since(self.began)) is not None:
            job.reason = reason
            self.change(job, "failed elsewhere")
        elif lease is None:
            self.change(job, "elsewhere")
        else:
            return lease
        if lease is not None:
            lease.release()
        return None

    def launch(self, job: Job, share: Share, lease: Lease) -> None:
        """Start a job's process under its lease."""
        job.failure.unlink(missing_ok=True)
        job.attempts += 1
        job.begin_log()
        process = self.start(job, share)
        limit = self.limits.timeout_seconds
        deadline = None if limit is None else time.monotonic() + limit
        running = RunningJob(job, process, share, lease, deadline)
        self.running.append(running)
        if not lease.write([os.getpid(), process.pid]):
            self.lose(running)
        if self.asked:  # a signal came between
            process.ask_to_stop()
        self.change(job, "running")

    # --- watching ---

    def renew(self) -> None:
        """Renew leases, four times in their life; a job that another launcher took over is killed."""
        now = time.monotonic()
        for running in self.running:
            if now - running.beat_at >= self.limits.lease_seconds / 4:
                running.beat_at = now
                if not running.lease.beat():
                    self.lose(running)

    def lose(self, running: RunningJob) -> None:
        """Give a job up to another launcher, which has started it anew."""
        running.lost = True
        running.process.kill()

    def stop_overdue(self) -> None:
        """Ask jobs beyond their limit to stop, and kill those that take too long over it."""
        now = time.monotonic()
        for running in self.running:
            if running.deadline is not None and now >= running.deadline and not running.overdue:
                running.overdue = True
                running.process.ask_to_stop()
                running.kill_at = now + self.limits.stop_seconds
            if running.kill_at is not None and now >= running.kill_at:
                running.process.kill()

    def look(self) -> None:
        """Read the newest metrics of running jobs, once in `LOOK_AGAIN` seconds."""
        now = time.monotonic()
        if now - self.looked < LOOK_AGAIN:
            return
        self.looked = now
        for running in self.running:
            if (row := last_row(running.job.directory.path / "metrics.jsonl")) is not None:
                running.job.seen = row

    def reap(self) -> None:
        """Take note of processes that ended, and free what they held."""
        for running in list(self.running):
            code = running.process.poll()
            if code is None:
                continue
            if code < 0:
                running.process.kill()  # ranks that outlive the first
            self.judge(running, code)
            running.lease.release()
            self.running.remove(running)
            self.devices.give_back(running.share)

    def judge(self, running: RunningJob, code: int) -> None:
        """Give a job whose process ended its state: done, failed, queued again, or another launcher's."""
        job = running.job
        if job.directory.is_finished:
            self.change(job, "done")
        elif running.lost:
            self.change(job, "elsewhere")
        elif running.overdue:
            assert self.limits.timeout_seconds is not None
            self.fail(job, f"ran beyond its limit of {self.limits.timeout_seconds / 60:g} minutes", code)
        elif self.asked:
            self.change(job, "interrupted")
        elif (code < 0 or code == 130) and job.own_reason() is None:
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else "interrupted by a signal"
            if job.attempts <= self.limits.retries:
                self.change(job, "queued", f"again, {reason}")
            else:
                self.fail(job, f"{reason}, {job.attempts} times", code)
        else:
            self.fail(job, job.failure_reason(), code)

    def fail(self, job: Job, reason: str, code: int) -> None:
        """Note that a job has failed for good."""
        job.note_failure(reason, code)
        self.screen.tell(job)

    def change(self, job: Job, state: str, reason: str | None = None) -> None:
        """Give a job a state and, unless None, a reason; a new state is shown."""
        if reason is not None or state in ("running", "done"):
            job.reason = reason or ""
        if state != job.state:
            job.state = state
            self.screen.tell(job)


def last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file that grows; None where there is none yet."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        whole = file.read().split(b"\n")[:-1]
    return json.loads(whole[-1]) if whole and whole[-1].startswith(b"{") else None
