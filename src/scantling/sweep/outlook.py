"""Every job of a sweep before the first starts: whether it can be built, where it lives, what it takes."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scantling.config import identity
from scantling.config.composition import with_choices, with_settings
from scantling.config.messages import one_line
from scantling.config.mistakes import Mistake, mistakes
from scantling.config.values import check_values
from scantling.model import hardware
from scantling.runs.directory import RunDirectory
from scantling.sweep.devices import Devices
from scantling.sweep.matching import Matching
from scantling.training import assembly
from scantling.training.launch import devices_per_node

ASSUMED_MFU = 0.1
"""The share of peak that a forecast reckons with where no run has shown one."""


@dataclass
class Outlook:
    """What a job will take. Tokens and FLOPs are those of the whole run, FLOPs by the `exact` convention."""

    overrides: list[str]
    directory: str
    devices: int
    """Processes on each node."""
    nodes: int
    on_gpu: bool
    gpus: int
    """Of this machine."""
    steps: int
    parameters: int
    tokens: int
    flops: float
    finished: bool
    lr: float
    budget: dict[str, float]
    """Amounts of the budget, by currency."""
    seconds: float | None = None
    """A forecast; only where one was asked for."""


SEED = re.compile(r"seed=(\d+)")
"""Jobs that differ in it alone are composed and built once."""

Compose = Callable[[Sequence[str]], DictConfig]
"""The configuration of a job's overrides, with its `hydra` node."""


def look_ahead(
    compose: Compose,
    jobs: Sequence[Sequence[str]],
    labels: Sequence[str],
    cores: int,
    n_jobs: int | None,
    *,
    elsewhere: bool,
) -> list[dict[str, Any]]:
    """An `Outlook` of each job, as a dictionary.

    `elsewhere`: jobs run on other machines, so that this one may have no GPU. Raises Mistake, which
    names the job, for what cannot be composed or built, for arms that cannot be matched, and for
    two jobs that are one run.
    """
    matching, speeds = Matching(), Speeds(Devices(cores, (), n_jobs, jobs=len(jobs)))
    found: list[Outlook] = []
    places: dict[str, int] = {}
    arms: dict[tuple[str, ...], Arm] = {}
    for i, overrides in enumerate(jobs):
        arm = tuple("seed=" if SEED.fullmatch(override) else override for override in overrides)
        try:
            with mistakes():
                if arm not in arms:
                    arms[arm] = build_arm(compose, list(overrides), matching, speeds, elsewhere)
                outlook = arms[arm].outlook_of(overrides)
        except (Mistake, HydraException, OmegaConfBaseException) as error:
            raise Mistake(
                f"job {i + 1} of {len(jobs)}, {labels[i]}: {one_line(error, 'train', overrides)}"
            ) from error
        first = places.setdefault(outlook.directory, i)
        if first != i:
            raise Mistake(
                f"jobs {first + 1} ({labels[first]}) and {i + 1} ({labels[i]}) "
                f"of {len(jobs)} are the same run: "
                "give each setting and seed once"
            )
        found.append(outlook)
    return [asdict(outlook) for outlook in found]


@dataclass(frozen=True)
class Arm:
    """Jobs that differ only in their seed: the outlook that they share, and the configuration of one."""

    shared: Outlook
    config: DictConfig
    more: list[str]
    """Overrides beyond those typed, which match the arm to others."""

    def outlook_of(self, overrides: Sequence[str]) -> Outlook:
        """The outlook of the arm's job with these overrides."""
        config = self.config
        for override in overrides:
            if match := SEED.fullmatch(override):
                config = with_settings(config, {"seed": int(match[1])})
        directory = RunDirectory(identity.path_of(config))
        return replace(
            self.shared,
            overrides=[*overrides, *self.more],
            directory=str(directory.path),
            finished=directory.is_finished,
        )


def build_arm(
    compose: Compose, overrides: list[str], matching: Matching, speeds: Speeds, elsewhere: bool
) -> Arm:
    """The arm of the job with these overrides. Raises Mistake or ValueError for what cannot be built."""
    whole = compose(overrides)
    config, more = with_choices(whole, whole.hydra), []
    if config.resume != "auto":
        raise ValueError(
            f"resume={config.resume} is for single runs: a sweep goes on by itself, "
            "and anew with another study=NAME"
        )
    if config.match is not None:
        d_ff, note = matching.width_of(config, overrides)
        config, more = with_settings(config, {"model.d_ff": d_ff}), [f"model.d_ff={d_ff}", f"matched={note}"]
    check_values(config, "train")
    if config.tune is not None and config.optim.lr != config.lr:
        raise ValueError(
            f"tune=lr finds nothing out: optim.lr={config.optim.lr} "
            f"does not follow lr; optim.lr=\\${{lr}} makes it"
        )
    here = on_this_machine(config) if elsewhere else config
    device, precision, decoder = assembly.check_config(here)
    if device.type == "cuda" and here.trainer.devices == "auto":
        here = with_settings(here, {"trainer.devices": 1})  # a job of a sweep sees the GPUs that it is given
    plan = assembly.plan_of(here, decoder, device, precision)
    path = identity.path_of(config)
    if config.dry_run:  # with the tokenizer's own vocabulary
        plan = assembly.assemble(here, RunDirectory(path)).plan
    shared = Outlook(
        overrides=overrides,
        directory=str(path),
        devices=devices_per_node(here.trainer.devices, device),
        nodes=config.trainer.nodes,
        on_gpu=config.trainer.accelerator == "gpu" if elsewhere else device.type == "cuda",
        gpus=torch.cuda.device_count() if device.type == "cuda" else 0,
        steps=plan.steps,
        parameters=plan.parameters,
        tokens=plan.tokens,
        flops=plan.flops,
        finished=False,
        lr=config.lr,
        budget={key: amount for key, amount in config.budget.items() if key != "convention"},
        seconds=plan.flops / speeds.of(plan.world_size, device, precision, path.parent)
        if config.dry_run
        else None,
    )
    return Arm(shared, config, more)


def on_this_machine(config: DictConfig) -> DictConfig:
    """The configuration of a job for another machine, as it can be built on one without a GPU."""
    settings = {"trainer.accelerator": "cpu"}
    if config.trainer.precision == "fp16":
        settings["trainer.precision"] = "fp32"
    return with_settings(config, settings)


class Speeds:
    """FLOP/s of a job: the peak of its devices, times the share of it that runs reach.

    The share is the median over the study's finished runs; `ASSUMED_MFU` where there are none.
    """

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.peaks: dict[tuple[str, bool, int], float] = {}

    def of(self, processes: int, device: torch.device, precision: str, study: Path) -> float:
        """FLOP/s of a job of `processes` processes; a device is measured once for each number of threads."""
        half, on_gpu = precision != "fp32", device.type == "cuda"
        threads = self.devices.threads(processes, on_gpu)
        if (device.type, half, threads) not in self.peaks:
            torch.set_num_threads(threads)
            self.peaks[device.type, half, threads] = hardware.peak_flops(device, half)[0]
        shares = [RunDirectory(path.parent).summary["mfu"] for path in study.glob("*/summary.json")]
        share = statistics.median(shares) if shares else ASSUMED_MFU
        return processes * self.peaks[device.type, half, threads] * share
