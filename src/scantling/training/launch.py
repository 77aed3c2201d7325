"""How many processes a run has, and who starts them: Lightning, torchrun or SLURM."""

from __future__ import annotations

import os

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


def devices_per_node(devices: int | str, device: torch.device) -> int:
    """The number of processes on each machine; `auto` is every GPU, or one process on the CPU.

    Raises ValueError for fewer than 1, or more than there are GPUs.
    """
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if devices == "auto":
        return found
    if not isinstance(devices, int) or devices < 1:
        raise ValueError(f"trainer.devices={devices}: use auto or a positive number")
    if device.type == "cuda" and devices > found:
        raise ValueError(f"trainer.devices={devices}, but there are {found} GPUs here")
    return devices


def check_launch(devices: int, nodes: int) -> None:
    """Raise ValueError unless whoever started the processes, torchrun, SLURM or nobody, fits the settings."""
    wanted = f"trainer.devices={devices} × trainer.nodes={nodes}"
    if TorchElasticEnvironment.detect():
        launcher, started, on_node = "torchrun", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    elif under_srun():
        launcher, started, on_node = "SLURM", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"
    elif nodes > 1 and "NODE_RANK" not in os.environ:
        raise ValueError(
            f"{wanted}, but nothing started this on other hosts: use torchrun or srun, docs/cluster.md"
        )
    else:
        return
    if os.environ[started] != "1" and on_node not in os.environ:  # Lightning asks for it
        raise ValueError(
            f"{launcher} was told how many tasks, but not how many a node: say --ntasks-per-node={devices}"
        )
    total, local = int(os.environ[started]), int(os.environ.get(on_node, 1))
    if (total, local) != (devices * nodes, devices):
        raise ValueError(
            f"{launcher} started {total} process(es), {local} a node, but {wanted} is {devices * nodes}: "
            "let the two agree"
        )


def under_srun() -> bool:
    """Whether Lightning would say that SLURM started this process, asked without its warning."""
    return "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def cluster_environment() -> list[ClusterEnvironment]:
    """SLURM's environment, without Lightning's requeuing, whose checkpoints are of another kind.

    `CleanStop` has its signals.
    """
    return [SLURMEnvironment(auto_requeue=False)] if under_srun() else []
