"""Engines, `trainer=`: how several processes train one model. Lightning's strategies, made to run on CPUs too and to
write one kind of checkpoint: a single file with whole tensors, which any engine and any number of processes takes up.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy


class Replicated(DDPStrategy):
    """A whole model in each process; gradients are averaged. Li et al. 2020, arXiv:2006.15704; torch's DDP."""

    def __init__(self, device: torch.device, precision: str, *, find_unused_parameters: bool):
        super().__init__(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)


# --- how many processes ---


def devices_per_node(devices: int | str, device: torch.device) -> int:
    """`auto` is every GPU, or one process on the CPU. Raises ValueError for more GPUs than there are, or none."""
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if devices == "auto":
        return found
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices}: use auto or a positive number")
    if device.type == "cuda" and devices > found:
        raise ValueError(f"trainer.devices={devices}, but there are {found} GPUs here")
    return devices


def check_launch(devices: int, nodes: int) -> None:
    """Raise ValueError where torchrun or SLURM started another number of processes than the run is for."""
    if nodes < 1:
        raise ValueError(f"trainer.nodes={nodes} must be positive")
    for launcher, environment, variable in (
        ("torchrun", TorchElasticEnvironment, "WORLD_SIZE"),
        ("SLURM", SLURMEnvironment, "SLURM_NTASKS"),
    ):
        if environment.detect():
            started = int(os.environ[variable])
            if started != devices * nodes:
                raise ValueError(
                    f"{launcher} started {started} process(es), but trainer.devices={devices} × trainer.nodes={nodes} "
                    f"is {devices * nodes}: let the two agree"
                )
            return


class AnyRank:
    """`any_rank(flag)`: whether the flag is set in any process; every process calls it.

    The hosts ask each other over gloo, so that no GPU is waited for.
    """

    def __init__(self, world_size: int):
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None

    def __call__(self, flag: bool) -> bool:
        if self.group is None:
            return flag
        anyone = torch.tensor(int(flag))
        dist.all_reduce(anyone, dist.ReduceOp.MAX, group=self.group)
        return bool(anyone)
