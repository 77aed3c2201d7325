"""Jobs of a sweep as jobs of SLURM: handed in through submitit, watched through squeue."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scantling.config.mistakes import Mistake
from scantling.config.options import ROOT
from scantling.runs.directory import replace_text
from scantling.sweep.jobs import ENDED, Job
from scantling.sweep.leases import Lease
from scantling.sweep.processes import redirect_output, run_afresh
from scantling.sweep.scheduler import last_row
from scantling.sweep.screen import Screen

OVER = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
)
"""SLURM's words for a job that will not run again."""
FORGOTTEN = "no more"
"""The state of a job some minutes after its end, and at once of one cancelled before it began."""

# A run that was told to stop says 130 once its checkpoint is written. `scancel` ends this shell too.
GO_ON = ["code=$?", '[ $code -eq 130 ] && scontrol requeue "$SLURM_JOB_ID"', "exit $code"]

LEASE_SECONDS = 60
"""Time within which a job is handed in."""


@contextlib.contextmanager
def defer_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back to the end.

    The number of a job that SLURM has taken must be noted, or the job would be handed in again.
    """
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda which, _: asked.append(which))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if asked:
            raise KeyboardInterrupt


class SlurmQueue:
    """The jobs of a sweep that SLURM has, and those that it is yet to get.

    A run's directory holds the number of its job, `slurm.json`: whoever comes later finds it in SLURM's queue
    and watches it instead of handing it in again. `settings(job)` are for submitit's executor.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: str,
        settings: Callable[[Job], dict[str, Any]],
        screen: Screen,
        poll_seconds: float,
    ) -> None:
        self.jobs, self.folder, self.settings = jobs, folder, settings
        self.screen, self.poll_seconds = screen, poll_seconds
        self.numbers: dict[int, str] = {}
        """SLURM's number of each job that it has."""

    def run(self) -> None:
        """Run until every job has ended. Raises Mistake where SLURM does not take them."""
        answered = False
        while True:
            try:
                states = queue_states()
                answered = True
                self.look(states)
                self.hand_in(states)
            except Unanswered as error:  # later it may be a controller that is started anew
                if not answered:
                    raise Mistake(f"SLURM does not answer: {error}") from error
            self.screen.draw()
            if all(job.state in ENDED for job in self.jobs):
                return
            time.sleep(self.poll_seconds)

    def unfinished(self) -> list[str]:
        """SLURM's numbers of the jobs that have not ended."""
        return [
            self.numbers[job.number]
            for job in self.jobs
            if job.state not in ENDED and job.number in self.numbers
        ]

    # --- handing in ---

    def hand_in(self, states: dict[str, str]) -> None:
        """Hand in what nobody has handed in, as one array for each kind of job."""
        leases: dict[int, Lease] = {}
        kinds: dict[str, list[Job]] = {}
        try:
            for job in self.jobs:
                if (
                    job.state not in ENDED
                    and job.number not in self.numbers
                    and (lease := self.claim(job, states))
                ):
                    leases[job.number] = lease
                    kinds.setdefault(json.dumps(self.settings(job), sort_keys=True), []).append(job)
            for alike in kinds.values():
                with defer_interrupt():
                    for job, number in zip(alike, self.submit(alike), strict=True):
                        self.numbers[job.number] = number
                        replace_text(note_file(job), json.dumps({"job": number}) + "\n")
                        self.change(job, "queued", f"SLURM's job {number}")
        finally:
            for lease in leases.values():
                lease.release()

    def claim(self, job: Job, states: dict[str, str]) -> Lease | None:
        """The right to hand a job in; None where another launcher has it, or SLURM has."""
        lease = Lease.take(job.directory.path, LEASE_SECONDS)
        if lease is None:
            self.change(job, "elsewhere")
            return None
        before = json.loads(note_file(job).read_text())["job"] if note_file(job).exists() else None
        if job.directory.is_finished:
            self.change(job, "done elsewhere")
        elif before is not None and states.get(before, FORGOTTEN) not in (*OVER, FORGOTTEN):
            self.numbers[job.number] = before
        else:
            return lease
        lease.release()
        return None

    def submit(self, jobs: Sequence[Job]) -> list[str]:
        """Hand jobs in; returns SLURM's number of each."""
        import submitit
        from submitit.core.utils import FailedJobError

        settings = self.settings(jobs[0])
        settings |= {
            # Python on the nodes finds this project as the one here does.
            "setup": [f'export PYTHONPATH="{ROOT / "src"}:$PYTHONPATH"', *settings["setup"]],
            "teardown": GO_ON,
            "srun_args": ["--kill-on-bad-exit=1", *task_arguments(settings["cpus_per_task"])],
            "additional_parameters": {
                "signal": f"USR1@{settings['signal_delay_s']}",
                "requeue": True,
                **settings["additional_parameters"],
            },
        }
        try:
            executor = submitit.AutoExecutor(self.folder, cluster="slurm", slurm_max_num_timeout=0)
            executor.update_parameters(**{f"slurm_{name}": value for name, value in settings.items()})
            for job in jobs:
                job.directory.path.mkdir(parents=True, exist_ok=True)
                job.failure.unlink(missing_ok=True)
                job.log.touch()
                job.begin_log()
            logs = [str(job.log.absolute()) for job in jobs]
            commands = [[*job.overrides, f"trainer.devices={job.devices}"] for job in jobs]
            with contextlib.redirect_stderr(None):  # where submitit repeats what the exception says
                return [submitted.job_id for submitted in executor.map_array(become_a_run, logs, commands)]
        except (RuntimeError, ValueError, FailedJobError) as error:
            said = [line for line in str(error).splitlines() if line.strip()]
            raise Mistake(
                f"SLURM does not take the jobs: {said[-1] if said else type(error).__name__}"
            ) from error

    # --- watching ---

    def look(self, states: dict[str, str]) -> None:
        """Give each job that SLURM has its state and newest metrics."""
        for job in self.jobs:
            if job.state in ENDED or job.number not in self.numbers:
                continue
            number = self.numbers[job.number]
            state = states.get(number, FORGOTTEN)
            if (row := last_row(job.directory.path / "metrics.jsonl")) is not None:
                job.seen = row
            if state in (*OVER, FORGOTTEN):
                self.judge(job, state)
            else:
                waits = state == "PENDING"
                self.change(job, "queued" if waits else "running", f"SLURM's job {number}")

    def judge(self, job: Job, state: str) -> None:
        """Say how a job ended that SLURM no longer runs: the run's own record decides."""
        os.listdir(job.directory.path)  # a network's file system then looks for what was written elsewhere
        if job.directory.is_finished:
            self.change(job, "done", "")
        else:
            by_itself = state in ("COMPLETED", "FAILED", FORGOTTEN) and job.log_lines()
            job.note_failure(job.failure_reason() if by_itself else f"SLURM's job is {state}", None)
            self.screen.tell(job)

    def change(self, job: Job, state: str, reason: str = "") -> None:
        """Give a job a state and a reason; what is new is shown."""
        if (state, reason) != (job.state, job.reason):
            job.state, job.reason = state, reason
            self.screen.tell(job)


def note_file(job: Job) -> Path:
    """Where a run's directory holds SLURM's number of its job."""
    return job.directory.path / "slurm.json"


def task_arguments(cpus: int | None) -> list[str]:
    """Arguments of srun for each task."""
    return [] if cpus is None else [f"--cpus-per-task={cpus}"]  # srun does not ask sbatch


class Unanswered(Exception):
    """SLURM's controller does not answer; the message is what squeue says instead."""


def queue_states() -> dict[str, str]:
    """SLURM's word for each of this user's jobs, by number, ARRAY_INDEX in arrays. Raises Unanswered."""
    command = ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i %T"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise Mistake(
            "hydra/launcher=submitit_slurm needs SLURM's commands, and there is no squeue here"
        ) from None
    except subprocess.TimeoutExpired as error:
        raise Unanswered(str(error)) from error
    if asked.returncode:
        raise Unanswered(" ".join(asked.stderr.split()))
    return dict(line.split() for line in asked.stdout.splitlines())


def become_a_run(log: str, overrides: Sequence[str]) -> None:
    """Become `python src/train.py`, in each task of a job.

    The run writes its own record and minds SLURM's signals itself.
    """
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    redirect_output(Path(log))
    run_afresh(overrides)
