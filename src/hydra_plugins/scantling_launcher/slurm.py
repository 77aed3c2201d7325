"""`hydra/launcher=submitit_slurm`: each job of a sweep is a job of SLURM, on one node or several."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from hydra_plugins.scantling_launcher.sweep import SweepLauncher
from scantling.config.mistakes import Mistake
from scantling.sweep.devices import own_cores
from scantling.sweep.jobs import Job
from scantling.sweep.screen import Screen
from scantling.sweep.slurm import SlurmQueue


class SlurmLauncher(SweepLauncher):
    """Hands jobs to SLURM through submitit and watches them.

    If the launcher ends they run on, and the next command finds them. It takes the place of
    hydra-submitit-launcher, whose jobs call the entry's function and hand its value back in a file: one that
    exits or is killed leaves none, and one that SLURM preempts goes back to its last checkpoint. `sbatch` are
    settings of sbatch by submitit's names.
    """

    elsewhere = True

    def __init__(
        self,
        submitit_folder: str,
        poll_seconds: float,
        gpus_per_node: int | None,
        gres: str | None,
        **sbatch: Any,
    ):
        self.folder, self.poll_seconds = submitit_folder, poll_seconds
        self.gpus_per_node, self.gres = gpus_per_node, gres
        self.sbatch: dict[str, Any] = {
            key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for key, value in sbatch.items()
        }
        self.cores, self.n_jobs = own_cores(), None

    def check(self) -> None:
        for name in ("timeout_min", "signal_delay_s", "array_parallelism"):
            if self.sbatch[name] <= 0:
                raise Mistake(f"hydra.launcher.{name} must be positive")
        if self.poll_seconds <= 0:
            raise Mistake("hydra.launcher.poll_seconds must be positive")

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        config = super().compose(overrides)
        if config.trainer.devices == "auto":
            config.trainer.devices = self.gpus_per_node or 1
        return config

    def carry_out(self, jobs: Sequence[Job], looks: Sequence[dict[str, Any]], console: Console) -> str | None:
        with Screen(jobs, console) as screen:
            queue = SlurmQueue(jobs, self.folder, self.settings, screen, self.poll_seconds)
            try:
                queue.run()
            except KeyboardInterrupt:
                return (
                    "interrupted; the jobs stay with SLURM, and the same command watches them again. "
                    f"To end them: scancel {' '.join(queue.unfinished())}"
                )
        return None

    def settings(self, job: Job) -> dict[str, Any]:
        """What sbatch is told of a job; jobs that are told the same are one array."""
        gpus = self.gpus_per_node
        if gpus is None and job.on_gpu and self.gres is None:
            gpus = job.devices
        return {
            **self.sbatch,
            "nodes": job.nodes,
            "tasks_per_node": job.devices,
            "gpus_per_node": gpus,
            "gres": self.gres,
        }
