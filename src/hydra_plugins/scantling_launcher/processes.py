"""`hydra/launcher=processes`, the one that `-m` takes: each job of a sweep is a process of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobStatus, run_job
from rich.console import Console

from hydra_plugins.scantling_launcher.sweep import SweepLauncher
from scantling.config.mistakes import Mistake
from scantling.sweep.devices import Share, own_cores
from scantling.sweep.jobs import Job
from scantling.sweep.processes import Process, fork_job, run_afresh
from scantling.sweep.scheduler import Limits, Scheduler
from scantling.sweep.screen import Screen


@dataclass
class ProcessesConf:
    """The settings of `hydra/launcher=processes` and their defaults."""

    _target_: str = "hydra_plugins.scantling_launcher.processes.ProcessLauncher"
    n_jobs: int | None = None
    """Jobs at once; None: as many as have a GPU each, or a CPU core for each of their processes."""
    cores: int | None = None
    """Cores that this launcher may use; None: all that this process may."""
    retries: int = 1
    """How often a job is tried again that somebody else killed, an out-of-memory killer say.

    A job that failed by itself is not tried again.
    """
    timeout_minutes: float | None = None
    """Limit of one attempt at a job; None: no limit."""
    lease_seconds: float = 60
    """Time without a sign of life after which a job of another launcher is taken over."""
    stop_seconds: float = 60
    """Time between asking a job to stop and killing it."""


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesConf, provider="scantling"
)


class ProcessLauncher(SweepLauncher):
    """Starts each job as a single run, so that the processes that a job starts itself never see the sweep.

    A job of one process is forked from this one, which has imported PyTorch and Lightning but never
    touched a GPU; one of several is `python src/train.py` with its overrides. Finished runs are left
    alone, interrupted ones go on.
    """

    elsewhere = False

    def __init__(
        self,
        n_jobs: int | None,
        cores: int | None,
        retries: int,
        timeout_minutes: float | None,
        lease_seconds: float,
        stop_seconds: float,
    ):
        self.n_jobs, self.cores = n_jobs, own_cores() if cores is None else cores
        self.limits = Limits(
            retries, None if timeout_minutes is None else 60 * timeout_minutes, lease_seconds, stop_seconds
        )

    def check(self) -> None:
        limits = self.limits
        positive = {"n_jobs": self.n_jobs, "cores": self.cores, "timeout_minutes": limits.timeout_seconds}
        positive |= {"lease_seconds": limits.lease_seconds, "stop_seconds": limits.stop_seconds}
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise Mistake(f"hydra.launcher.{name} must be positive")

    def carry_out(self, jobs: Sequence[Job], looks: Sequence[dict[str, Any]], console: Console) -> str | None:
        for job in jobs:
            if job.nodes > 1:
                raise Mistake(
                    f"{job.label}: trainer.nodes={job.nodes}, "
                    "but this launcher starts jobs on its own machine alone: "
                    "hydra/launcher=submitit_slurm starts them on several"
                )
        with Screen(jobs, console) as screen:
            folder = jobs[0].directory.path.parent
            scheduler = Scheduler(jobs, self.devices(looks), self.limits, self.start, screen, folder)
            scheduler.run()
        return "interrupted; the same command goes on from there" if scheduler.asked else None

    def start(self, job: Job, share: Share) -> Process:
        """Start a job in a child: forked where the run has one process, else by its command."""
        if job.devices > 1:
            task = lambda: run_afresh(job.overrides)  # noqa: E731
        else:
            task = lambda: self.run_here(job, share)  # noqa: E731
        return fork_job(task, job.log, {**share.environment, "HYDRA_FULL_ERROR": "0"})

    def run_here(self, job: Job, share: Share) -> int:
        """Train in the child; returns its exit code."""
        import torch

        torch.set_num_threads(share.threads)
        returned = run_job(
            task_function=self.task_function,
            config=self.compose(job.overrides),
            job_dir_key="hydra.run.dir",
            job_subdir_key=None,
            hydra_context=self.hydra_context,
            configure_logging=False,
        )
        if returned.status is JobStatus.FAILED:
            raise returned._return_value
        return os.EX_OK
