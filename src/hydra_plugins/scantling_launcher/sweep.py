"""What the launchers of this project share: every job is looked at first, and a run's own record says how it ended."""

import json
import os
import sys
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, open_dict, read_write
from rich.console import Console

from scantling.command_line import Failed, Mistake
from scantling.run_directory import RunDirectory, replace_text
from scantling.sweep.devices import Devices, visible_gpus
from scantling.sweep.forecast import forecast
from scantling.sweep.jobs import FAILED, Job, labels
from scantling.sweep.processes import answer_of_a_child
from scantling.sweep.screen import outcome


class SweepLauncher(Launcher):
    """Looks at all jobs, has `carry_out` bring each to its end, and reports what became of them."""

    cores: int
    n_jobs: int | None
    elsewhere: bool
    """Whether jobs run on other machines, of which this one knows nothing."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    @abstractmethod
    def check(self) -> None:
        """Raise Mistake for settings that cannot be."""

    @abstractmethod
    def carry_out(self, jobs: Sequence[Job], looks: Sequence[dict[str, Any]], console: Console) -> str | None:
        """Bring jobs to their ends; what to say where a signal put an end to it before."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One `JobReturn` a job, in their order; its value is the run's bits per byte.

        Raises Mistake, before any job starts, where one of them cannot run.
        """
        self.check()
        os.environ.pop(
            "SLURM_NTASKS", None
        )  # inside of an allocation: srun did not start the jobs' processes
        # Imported here, so that a mistyped sweep need not wait for PyTorch.
        from scantling.sweep.outlook import look_ahead

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
        named = labels(job_overrides)
        looks = answer_of_a_child(
            lambda: look_ahead(
                self.compose, job_overrides, named, self.cores, self.n_jobs, elsewhere=self.elsewhere
            )
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
                nodes=look["nodes"],
                on_gpu=look["on_gpu"],
                steps=look["steps"],
                state="finished before" if look["finished"] else "queued",
            )
            for i, (label, look) in enumerate(zip(named, looks, strict=True))
        ]
        folder = jobs[0].directory.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self.claim_study(folder)
        interrupted = self.carry_out(jobs, looks, console)
        console.print(outcome(jobs))
        if interrupted is not None:
            console.print(interrupted, soft_wrap=True)
            sys.exit(130)
        failed = [job for job in jobs if job.state in FAILED]
        return [ended(job.overrides, job, f"{len(failed)} of {len(jobs)} jobs failed") for job in jobs]

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
