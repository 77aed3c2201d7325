"""One process of two dies: the other ends too, soon, and what the first died of is read first."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from shop import TRAIN
from warm import Command

pytestmark = pytest.mark.multiprocess

SCHEDULE = '''
import os, signal

def schedule(step, total):
    """Constant, until one process of the run dies of it."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))
    if step == 5 and rank == int(os.environ["WHO"]):
        if os.environ["OF"] == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the matrix is cursed")
    return 1.0
'''
PATIENCE = 300
"""Seconds after which a process is taken to hang."""
TORCHRUN = ("--standalone", "--nproc-per-node=2")


def processes_in(folder: Path) -> list[str]:
    """Command lines of those that work there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (
                os.readlink(path / "cwd") == str(folder)
                and (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            ):
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "torchrun", "sweep", "who", "of"),
    [
        ("ddp", (), (), 1, "ValueError"),
        ("ddp", (), (), 0, "SIGKILL"),
        ("zero2", TORCHRUN, (), 1, "SIGKILL"),
        ("zero2", (), ("-m", "seed=0"), 1, "ValueError"),
    ],
    ids=["ddp-exception", "ddp-first-killed", "zero2-torchrun-killed", "zero2-sweep-exception"],
)
def test_all_processes_end_with_the_first(shop, tmp_path, engine, torchrun, sweep, who, of):
    (tmp_path / "cursed.py").write_text(SCHEDULE)
    (tmp_path / "book.txt").symlink_to(shop.path / "book.txt")
    faulty = (
        "schedule=constant",
        "schedule._target_=cursed.schedule",
        "~schedule.warmup",
        "trainer.devices=2",
    )
    process = Command(
        [str(TRAIN), *shop.options(*sweep, f"trainer={engine}", *faulty)],
        tmp_path,
        torchrun=torchrun,
        environment={"PYTHONPATH": str(tmp_path), "WHO": str(who), "OF": of},
    )
    while not any(
        path.read_text().count("\n") >= 4 for path in tmp_path.glob("runs/default/*/metrics.jsonl")
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    end = time.monotonic() + PATIENCE
    said = "".join(process.communicate())
    while processes_in(tmp_path):
        assert time.monotonic() < end, processes_in(tmp_path)
        time.sleep(0.1)
    assert process.returncode in ((-9,) if who == 0 else (1, -9)), said
    if sweep:
        assert "process 1 of 2: ValueError: the matrix is cursed" in " ".join(said.split())
        (log,) = tmp_path.glob("runs/default/*/log.txt")
        said = log.read_text()
        assert said.count("directory  ") == 1  # a job that failed by itself is not tried again
    if of == "ValueError":
        first = said.index("Traceback (most recent call last)")
        (_, *after) = said[first:].split("error: ")
        assert "schedule\n    raise ValueError" in said[first:].split("error: ")[0]
        assert after[0].startswith("process 1 of 2: ValueError: the matrix is cursed\n")
        assert said.count("Traceback (most recent call last)") == 1
    elif who == 1:
        assert "error: process 0 of 2: another process of this run died" in said
