"""Which processors a job gets: GPUs of its own, or CPU cores, of which no more threads run than there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from scantling.sweep.jobs import Job


@dataclass(frozen=True)
class Share:
    """What one job holds: `threads` for each of its processes, `cores` and `gpus` in all."""

    threads: int
    cores: int
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that hold a process to its share."""
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return {"OMP_NUM_THREADS": str(self.threads), **visible}


@dataclass
class Devices:
    """The cores and GPUs of this launcher, handed out in the order of the jobs.

    With `n_jobs` None as many jobs run at once as have a GPU each, or a core for each of their processes. The
    number of threads depends on the sweep alone and not on what is left of it, so that a job taken up again
    computes the same.
    """

    cores: int
    gpus: tuple[str, ...]
    n_jobs: int | None
    jobs: int
    """Jobs of the whole sweep."""
    held: list[Share] = field(default_factory=list)

    def at_once(self, devices: int, on_gpu: bool) -> int:
        """How many jobs of so many processes run side by side."""
        most = max(1, (len(self.gpus) if on_gpu else self.cores) // devices)
        return min(self.n_jobs or min(most, self.jobs), most)

    def threads(self, devices: int, on_gpu: bool) -> int:
        """The number of threads of each process of a job."""
        share = max(1, self.cores // (self.at_once(devices, on_gpu) * devices))
        return min(share, int(os.environ.get("OMP_NUM_THREADS", share)))  # the user's own wish

    def take(self, job: Job) -> Share | None:
        """A share for the job; None while others hold what it needs."""
        if self.n_jobs is not None and len(self.held) >= self.n_jobs:
            return None
        threads = self.threads(job.devices, job.on_gpu)
        gpus = job.devices if job.on_gpu else 0
        cores = 0 if job.on_gpu else min(self.cores, threads * job.devices)
        free = [gpu for gpu in self.gpus if all(gpu not in other.gpus for other in self.held)]
        if gpus > len(free) or cores > self.cores - sum(other.cores for other in self.held):
            return None
        share = Share(threads, cores, tuple(free[:gpus]))
        self.held.append(share)
        return share

    def give_back(self, share: Share) -> None:
        """Free what a job held."""
        self.held.remove(share)


def visible_gpus(found: int) -> tuple[str, ...]:
    """Names for CUDA_VISIBLE_DEVICES, which may itself have been set for this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names: Sequence[object] = visible.split(",") if visible else range(found)
    return tuple(str(name) for name in names)[:found]


def own_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
