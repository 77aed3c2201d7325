"""What this project's launchers share: all jobs are checked before the first starts.

A run's own record says how it ended.
"""

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
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console

from scantling.config.mistakes import Failed, Mistake
from scantling.report.terminal import open_console
from scantling.runs.directory import RunDirectory, replace_text
from scantling.sweep.devices import Devices, visible_gpus
from scantling.sweep.forecast import forecast_table
from scantling.sweep.jobs import FAILED, Job, label_jobs
from scantling.sweep.processes import ask_child
from scantling.sweep.screen import outcome_table, rates_table
from scantling.sweep.tuning import Search, TuningSettings, plan_searches, run_score, stop_reason


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
        """Bring jobs to their ends; returns what to say where a signal stopped it before."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One `JobReturn` a job, in their order; its value is the run's bits per byte.

        Raises Mistake, before any job starts, where one of them cannot run.
        """
        self.check()
        os.environ.pop(
            "SLURM_NTASKS", None
        )  # inside of an allocation: srun did not start the jobs' processes
        self.console = open_console()
        if self.starts_unasked() and initial_job_idx == 0:
            self.console.print(
                f"sweeps={self.sweep} is a sweep, also without -m: "
                f"{len(job_overrides)} jobs; hydra.mode=RUN makes a "
                "single run of its settings",
                soft_wrap=True,
            )
        commands = [list(overrides) for overrides in job_overrides]
        named = label_jobs(commands)
        looks = self.look(commands, named)
        if not self.config.dry_run:
            self.claim_study(Path(looks[0]["directory"]).parent)
        searched: list[Search] = []
        tries: list[tuple[str, dict[str, Any]]] = []
        if self.config.tune is not None:
            settings = TuningSettings(**OmegaConf.to_container(self.config.tune))  # type: ignore[arg-type]
            searched = plan_searches(looks, named, settings)
            tries = self.search(list({id(search): search for search in searched}.values()))
            for i, search in enumerate(searched):
                if not search.failed:
                    commands[i] += search.chosen()
                    named[i] += f" lr={search.best:g}"
            looks = self.look(commands, named)
        if self.config.dry_run:
            self.console.print(forecast_table([*tries, *zip(named, looks, strict=True)], self.devices(looks)))
            return self.ends_here(job_overrides)
        jobs = self.jobs(named, looks, initial_job_idx)
        for job, search in zip(jobs, searched, strict=False):
            if search.failed:
                job.state, job.reason = "failed", "no learning rate: its search failed"
        self.run(jobs, looks)
        self.console.print(outcome_table(jobs))
        failed = [job for job in jobs if job.state in FAILED]
        return [ended(job.overrides, job, f"{len(failed)} of {len(jobs)} jobs failed") for job in jobs]

    def search(self, arms: Sequence[Search]) -> list[tuple[str, dict[str, Any]]]:
        """Try learning rates until every arm has one; for a forecast, look up those that are known.

        Returns the labels and looks.
        """
        tries: list[tuple[str, dict[str, Any]]] = []
        while wanted := [(arm, rate) for arm in arms for rate in arm.wanted()]:
            commands = [arm.command(rate, self.config.study) for arm, rate in wanted]
            named = [f"search: {arm.label} lr={rate:g}" for arm, rate in wanted]
            looks = self.look(commands, named)
            tries += zip(named, looks, strict=True)
            jobs = self.jobs(named, looks, 0)
            for job in jobs:
                if (reason := stop_reason(job.directory)) is not None:
                    job.state, job.reason = "failed", reason
            if not self.config.dry_run:
                self.run(jobs, looks)
            for (arm, rate), job in zip(wanted, jobs, strict=True):
                arm.tried[rate] = run_score(job.directory)
            broken = [job for job in jobs if job.state in FAILED and run_score(job.directory) is None]
            if broken:
                self.console.print(outcome_table(broken))
        if not self.config.dry_run or not any(arm.failed for arm in arms):
            self.console.print(rates_table(arms))
        return tries

    def look(self, commands: Sequence[list[str]], named: Sequence[str]) -> list[dict[str, Any]]:
        """The outlook of each job, found in a child so that this process does not touch a GPU."""
        # Imported here, so that a mistyped sweep need not wait for PyTorch.
        from scantling.sweep.outlook import look_ahead

        return ask_child(
            lambda: look_ahead(
                self.compose, commands, named, self.cores, self.n_jobs, elsewhere=self.elsewhere
            )
        )

    def jobs(self, named: Sequence[str], looks: Sequence[dict[str, Any]], first: int) -> list[Job]:
        """A job for each outlook, numbered from `first`; finished runs are jobs that ended before."""
        return [
            Job(
                number=first + i,
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

    def run(self, jobs: list[Job], looks: Sequence[dict[str, Any]]) -> None:
        """Run until all jobs have ended; a signal ends this process with them."""
        folder = jobs[0].directory.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        interrupted = self.carry_out(jobs, looks, self.console)
        if interrupted is not None:
            self.console.print(outcome_table(jobs))
            self.console.print(interrupted, soft_wrap=True)
            sys.exit(130)

    def ends_here(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """End after a forecast: a sweeper that learns from results has none, and asks no more."""
        if self.config.hydra.runtime.choices["hydra/sweeper"] not in ("study", "basic"):
            self.console.print("[dim]these are the first; which follow depends on their results[/dim]")
            sys.exit(os.EX_OK)
        return [ended(overrides, None) for overrides in job_overrides]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The configuration of a job, as if its overrides had been typed for a single run."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with read_write(config), open_dict(config):
            config.hydra.mode = RunMode.RUN
        return config

    def devices(self, looks: Sequence[dict[str, Any]]) -> Devices:
        """The cores and GPUs that these jobs share."""
        gpus = visible_gpus(max(look["gpus"] for look in looks))
        return Devices(self.cores, gpus, self.n_jobs, jobs=len(looks))

    @property
    def sweep(self) -> str | None:
        """The option of `sweeps=`; None: there is none."""
        return self.config.hydra.runtime.choices["sweeps"]

    def starts_unasked(self) -> bool:
        """Whether only the yaml of a sweep makes this one, and nothing that was typed."""
        return self.sweep is not None and not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(sys.argv)

    def claim_study(self, folder: Path) -> None:
        """Note which of `sweeps/` a study's directory belongs to. Raises Mistake where it is another's."""
        sweep = self.sweep
        if sweep is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "study.json"
        if not note.exists():
            replace_text(note, json.dumps({"sweeps": sweep}) + "\n")
        before = json.loads(note.read_text())["sweeps"]
        if before != sweep:
            raise Mistake(
                f"{folder} holds the runs of sweeps={before}: "
                f"give those of sweeps={sweep} a place with study=NAME"
            )


class Ended(JobReturn):
    """The return of a job that failed: asked for its value it raises why."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def ended(overrides: Sequence[str], job: Job | None, failure: str = "") -> JobReturn:
    """What Hydra gets of a job: its run's bits per byte, None without a job, or that it failed."""
    if job is not None and job.state in FAILED:
        return Ended(overrides=overrides, status=JobStatus.FAILED, _return_value=Failed(failure))
    score = None if job is None else job.directory.summary["val/bpb"]
    return JobReturn(overrides=overrides, status=JobStatus.COMPLETED, _return_value=score)
