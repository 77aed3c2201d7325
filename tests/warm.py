"""`python src/train.py`, or another entry, in processes that are forked from one which has imported
everything: the same, but for seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, cast

CONTEXT = multiprocessing.get_context("forkserver")

PROCESSOR = "TEST_PROCESSOR"
"""Names in the environment the processor that a run of tests is forced to, `--processor`."""


class Command:
    """The processes of one command, with what tests need of `subprocess.Popen`; signals go to the first.

    Several are ranks of one run, with the variables that torchrun gives them. `torchrun` are options of its
    own: then one process is torchrun, which forks the ranks. `first` is called before anything else.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        place: Path,
        *,
        processes: int = 1,
        torchrun: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        first: Callable[[], object] | None = None,
    ):
        self.files = [Path(tempfile.mkstemp(suffix=f".{name}")[1]) for name in ("out", "err")]
        given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        started = (list(map(str, argv)), list(torchrun), place, *self.files, first)
        shared = torchrun_variables(processes) if processes > 1 else {}
        self.processes = [
            CONTEXT.Process(target=run, args=(*started, {**given, **shared, **of_rank(i, shared)}))
            for i in range(processes)
        ]
        warm_up()
        for process in self.processes:
            process.start()

    @property
    def pid(self) -> int:
        pid = self.processes[0].pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return self.processes[0].exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        """What all of them printed so far, to standard output first."""
        return "".join(file.read_text() for file in self.files)

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """What all of them printed, when they have ended; ends them when the time is over."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        out, err = (file.read_text() for file in self.files)
        for file in self.files:
            file.unlink()
        return out, err


def warm_up() -> None:
    """Start the server, once in a process that runs tests. It has the path and device of the commands."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR")}
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    try:
        CONTEXT.set_forkserver_preload(["everything"])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def torchrun_variables(processes: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "warm",
    }


def of_rank(i: int, shared: dict[str, str]) -> dict[str, str]:
    return {"RANK": str(i), "LOCAL_RANK": str(i)} if shared else {}


def run(
    argv: list[str],
    torchrun: list[str],
    place: Path,
    out: Path,
    err: Path,
    first: Callable[[], object] | None,
    environment: dict[str, str],
) -> None:
    for number, file in enumerate((out, err), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(place)
    os.environ.clear()
    os.environ |= environment
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    if first is not None:
        first()
    if torchrun:
        from torch.distributed import run as torch_run

        torch_run.main([*torchrun, "--start-method=fork", "--run-path", __file__, *argv])
    else:
        entry(argv)


def take_processor() -> None:
    """Put the processor that the environment names in the place of this machine's."""
    from scantling.model import processors

    if (forced := os.environ.get(PROCESSOR)) is not None:
        processors.HERE = forced


def assumed_peak(*_: object) -> tuple[float, str]:
    """In the place of `hardware.peak_flops`, whose product of matrices takes longer than a small run."""
    return 1e12, "assumed"


def entry(argv: list[str]) -> None:
    from lightning.fabric.utilities.rank_zero import _get_rank
    from lightning.pytorch.utilities import rank_zero_only

    from scantling.model import hardware

    take_processor()
    hardware.peak_flops = assumed_peak
    cast(Any, rank_zero_only).rank = _get_rank() or 0  # Lightning reads it when it is imported
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":  # a rank that torchrun forked
    entry(sys.argv[1:])
