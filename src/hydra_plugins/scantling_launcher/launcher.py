"""`hydra/launcher=processes`, the one that `-m` takes: each job of a sweep is a process of its own."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console

from scantling.command_line import Failed, Mistake
from scantling.run_directory import RunDirectory, replace_text
from scantling.sweep.devices import Devices, Share, own_cores, visible_gpus
from scantling.sweep.forecast import forecast
from scantling.sweep.jobs import FAILED, Job, labels
from scantling.sweep.processes import Process, answer_of_a_child, fork, run_afresh
from scantling.sweep.scheduler import Limits, Scheduler
from scantling.sweep.screen import Screen, outcome


@dataclass
class ProcessesConf:
    _target_: str = "hydra_plugins.scantling_launcher.launcher.ProcessLauncher"
    n_jobs: int | None = None
    """Jobs at once; None: as many as have a GPU each, or a CPU core for each of their processes."""
    cores: int | None = None
    """That this launcher may use; None: all that this process may."""
    retries: int = 1
    """Of a job that somebody else killed, an out-of-memory killer say; a job that failed by itself is not tried again."""
    timeout_minutes: float | None = None
    """For one attempt at a job; None: no limit."""
    lease_seconds: float = 60
    """After so long without a sign of life a job of another launcher is taken over."""
    stop_seconds: float = 60
    """Between asking a job to stop and killing it."""


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesConf, provider="scantling"
)


class ProcessLauncher(Launcher):
    """Starts each job as a single run, so that the processes that a job starts itself never see the sweep.

    A job of one process is forked from this one, which has imported PyTorch and Lightning but never touched a GPU; one
    of several is `python src/train.py` with its overrides. Finished runs are left alone, interrupted ones go on.
    """

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

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One `JobReturn` a job, in their order; its value is the run's bits per byte.

        Raises Mistake, before any job starts, where one of them cannot run.
        """
        self.check()
        from scantling.sweep.outlook import (
            look_ahead,
        )  # here, so that a mistyped sweep need not wait for PyTorch

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        named = labels(job_overrides)
        looks = answer_of_a_child(
            lambda: look_ahead(self.compose, job_overrides, named, self.cores, self.n_jobs)
        )
        if self.config.dry_run:
            console.print(forecast(named, looks, self.devices(looks)))
            return [ended(overrides, None) for overrides in job_overrides]
        jobs = [
            Job(
                number=initial_job_idx + i,
                overrides=look["overrides"],
                label=label,
                directory=RunDirectory(look["directory"]),
                devices=look["devices"],
                on_gpu=look["on_gpu"],
                steps=look["steps"],
                state="finished before" if look["finished"] else "queued",
            )
            for i, (label, look) in enumerate(zip(named, looks, strict=True))
        ]
        folder = jobs[0].directory.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.claim_study(folder)
        with Screen(jobs, console) as screen:
            scheduler = Scheduler(jobs, self.devices(looks), self.limits, self.start, screen, folder)
            scheduler.run()
        console.print(outcome(jobs))
        if scheduler.asked:
            console.print("interrupted; the same command goes on from there")
            sys.exit(130)
        failed = [job for job in jobs if job.state in FAILED]
        return [ended(job.overrides, job, f"{len(failed)} of {len(jobs)} jobs failed") for job in jobs]

    def check(self) -> None:
        """Raise Mistake for a number that is none."""
        limits = self.limits
        positive = {"n_jobs": self.n_jobs, "cores": self.cores, "timeout_minutes": limits.timeout_seconds}
        positive |= {"lease_seconds": limits.lease_seconds, "stop_seconds": limits.stop_seconds}
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise Mistake(f"hydra.launcher.{name} must be positive")

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """As if the overrides had been typed for a single run."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.mode = RunMode.RUN
        return config

    def devices(self, looks: Sequence[dict[str, Any]]) -> Devices:
        gpus = visible_gpus(max(look["gpus"] for look in looks))
        return Devices(self.cores, gpus, self.n_jobs, jobs=len(looks))

    def claim_study(self, folder: Path) -> None:
        """Note which of `sweeps/` a study's directory belongs to. Raises Mistake where it is another's."""
        sweep = self.config.hydra.runtime.choices["sweeps"]
        if sweep is None:
            return
        note = folder / "study.json"
        if not note.exists():
            replace_text(note, json.dumps({"sweeps": sweep}) + "\n")
        before = json.loads(note.read_text())["sweeps"]
        if before != sweep:
            raise Mistake(
                f"{folder} holds the runs of sweeps={before}: give those of sweeps={sweep} a place with study=NAME"
            )

    def start(self, job: Job, share: Share) -> Process:
        if job.devices > 1:
            task = lambda: run_afresh(job.overrides)  # noqa: E731
        else:
            task = lambda: self.run_here(job, share)  # noqa: E731
        return fork(task, job.log, {**share.environment, "HYDRA_FULL_ERROR": "0"})

    def run_here(self, job: Job, share: Share) -> int:
        """In the child."""
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


class Ended(JobReturn):
    """Of a job that failed: asked for its value it says so, and no more."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def ended(overrides: Sequence[str], job: Job | None, failure: str = "") -> JobReturn:
    if job is not None and job.state in FAILED:
        return Ended(overrides=overrides, status=JobStatus.FAILED, _return_value=Failed(failure))
    score = None if job is None else job.directory.summary["val/bpb"]
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=score)
