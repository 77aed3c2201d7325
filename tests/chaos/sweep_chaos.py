"""Sweeps of `nano` whose launcher is killed at random instants, and started again until all their jobs are
done.

    python tests/chaos/sweep_chaos.py --kills 10 --table results/sweep_chaos.md

In the end every job must have one finished record, with the losses and weights of the sweep that nobody
disturbed, bit for bit. Launchers are forked from this process, which has imported everything, and their jobs
from them.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from child import Child

from scantling.cli import train
from scantling.model.hardware import cpu_name
from scantling.runs.directory import RunDirectory

STEPS = 100
JOBS = 4
SETTINGS = (
    *("-m", "model=nano", "model.dropout=0.1", "data=text", "tokenizer=byte", "logger=none", "log_every=1"),
    *("budget=steps", f"budget.steps={STEPS}", "batch_size=4", "val_every=20", "val_windows=8"),
    *("sample.n_tokens=8", "trainer=cpu", "trainer.precision=fp32", "attn=mha,gqa", "seed=0,1"),
    *("checkpoint.every_minutes=0.002", "hydra.launcher.cores=2"),
)
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_flops")


class Launcher(Child):
    """The command of the sweep, in a session of its own; `before` runs in it first; its jobs inherit that."""

    def __init__(self, place: Path, *more: str, before: Callable[[], object] = lambda: None):
        super().__init__(
            place.with_name(f"{place.name}.txt"),
            *SETTINGS,
            f"data.files={place.parent}/book.txt",
            f"paths.runs={place}/runs",
            f"paths.cache={place.parent}/cache",
            *more,
            before=lambda: (os.setsid(), before()),
        )

    def wait_for_an_instant(self, place: Path, seconds: float, choose: random.Random) -> None:
        """One of its `seconds`, or, as most are spent on starting, half of the time one of a job's steps."""
        until = time.monotonic() + choose.uniform(0, seconds)
        step = choose.randrange(STEPS - 5) if choose.random() < 0.5 else None
        while self.poll() is None:
            if time.monotonic() >= until if step is None else under_way(place) > step:
                return
            time.sleep(0.002)

    def kill_launcher(self, whole_tree: bool) -> None:
        """SIGKILL; the tree is the launcher and every process that it started, in groups of their own."""
        for pid in [self.pid, *(descendants(self.pid) if whole_tree else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


def descendants(pid: int) -> list[int]:
    """Of a process, all that are alive."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, level = [], [pid]
    while level := [child for child, parent in parents.items() if parent in level]:
        found += level
    return found


def directories(place: Path) -> list[RunDirectory]:
    return [RunDirectory(path) for path in sorted(place.glob("runs/default/nano-*"))]


def under_way(place: Path) -> int:
    """The most steps of a run that is not finished."""
    return max((len(run.metrics()) for run in directories(place) if not run.is_finished), default=0)


def records(place: Path) -> dict[str, tuple[dict, list, dict[str, torch.Tensor]]]:
    """Of every finished run by name: its summary and its rows without times, and its last weights."""
    found = {}
    for run in directories(place):
        if run.is_finished:
            summary, *rows = (
                {key: value for key, value in row.items() if key not in TIMES}
                for row in (run.summary, *run.metrics())
            )
            found[run.name] = (summary, rows, torch.load(run.last, weights_only=True)["state_dict"])
    return found


def same(one: dict, other: dict) -> int:
    """How many runs are in both and equal bit for bit."""
    equal = 0
    for name in one.keys() & other.keys():
        (summary, rows, weights), (their_summary, their_rows, theirs) = one[name], other[name]
        equal += (
            summary == their_summary
            and rows == their_rows
            and weights.keys() == theirs.keys()
            and all(torch.equal(weights[key], theirs[key]) for key in weights)
        )
    return equal


def leftovers(place: Path) -> int:
    """Leases that nobody gave back, and directories of runs that are none of the sweep's."""
    return len(list(place.glob("runs/default/*/lease-*"))) + len(directories(place)) - JOBS


def killed(
    place: Path, kills: int, whole_tree: bool, seconds: float, choose: random.Random
) -> tuple[int, int]:
    """The sweep, killed so many times at an instant of its `seconds` and begun again, then left alone.

    How often a job was under way, and the last exit code.
    """
    left, training = kills, 0
    while left:
        launcher = Launcher(place)
        launcher.wait_for_an_instant(place, seconds, choose)
        if launcher.poll() is None:
            training += under_way(place) > 0
            launcher.kill_launcher(whole_tree)
            left -= 1
        else:  # it came to its end before: there must be something left to disturb
            shutil.rmtree(choose.choice(directories(place)).path)
    return training, Launcher(place).wait()


def failing() -> None:
    """One job raises in its first step, another hangs for good."""
    fit = train.fit

    def fated(run, console):
        if (run.config.seed, run.config.choices.attn) == (0, "gqa"):
            raise RuntimeError("the matrix is cursed")
        if (run.config.seed, run.config.choices.attn) == (1, "mha"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        fit(run, console)

    train.fit = fated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep-chaos"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    top = options.directory.resolve()
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir(parents=True)
    (top / "book.txt").write_text(inspect.getsource(argparse))
    choose = random.Random(options.seed)
    began = time.monotonic()
    assert Launcher(top / "undisturbed").wait() == 0, (top / "undisturbed.txt").read_text()
    seconds = time.monotonic() - began
    expected = records(top / "undisturbed")
    assert len(expected) == JOBS
    rows, fine = [], True

    def add(what: str, place: Path, kills: int, jobs: int, exit_codes: str, good: bool) -> None:
        nonlocal fine
        found = records(place)
        equal = same(found, expected)
        good = good and len(found) == equal == jobs and leftovers(place) == 0
        fine = fine and good
        rows.append(f"| {what} | {kills} | {exit_codes} | {len(found)} of {jobs} | {equal} of {jobs} |")
        print(rows[-1], "" if good else "WRONG", flush=True)

    for what, whole_tree in (("launcher and all its processes", True), ("launcher alone", False)):
        place = top / ("tree" if whole_tree else "alone")
        training, code = killed(place, options.kills, whole_tree, seconds, choose)
        what = f"SIGKILL of the {what}; {training} times with a job under way"
        add(what, place, options.kills, JOBS, str(code), code == 0)

    place = top / "failing"
    code = Launcher(
        place,
        "hydra.launcher.timeout_minutes=0.25",
        "hydra.launcher.stop_seconds=0.5",
        before=failing,
    ).wait()
    text = " ".join((top / "failing.txt").read_text().split())
    named = "the matrix is cursed" in text and "ran beyond its limit of 0.25 minutes" in text
    add(
        "one job raises, one hangs beyond its limit; the table names both",
        place,
        0,
        2,
        str(code),
        code == 1 and named,
    )

    place = top / "two"
    two = [Launcher(place, "hydra.launcher.cores=1") for _ in range(2)]
    codes = [launcher.wait() for launcher in two]
    once = all((run.path / "log.txt").read_text().count("directory   ") == 1 for run in directories(place))
    add("two launchers, every job begun once", place, 0, JOBS, "0, 0", codes == [0, 0] and once)

    number = -1
    for number in range(options.kills):
        place = top / f"two-{number}"
        two = [Launcher(place, "hydra.launcher.cores=1") for _ in range(2)]
        two[0].wait_for_an_instant(place, seconds, choose)
        two[0].kill_launcher(whole_tree=choose.random() < 0.5)
        code = two[1].wait()
        found = records(place)
        if code or same(found, expected) != JOBS or len(found) != JOBS or leftovers(place):
            break
        if number + 1 < options.kills:
            shutil.rmtree(place)
    add("two launchers, one killed, in as many sweeps", place, number + 1, JOBS, str(code), code == 0)

    lines = [
        "# Interrupted sweeps",
        "",
        f"`python tests/chaos/sweep_chaos.py --kills {options.kills} --table results/sweep_chaos.md`",
        "",
        f"{cpu_name()}, torch {torch.__version__}. Sweeps of {JOBS} jobs of `nano`, {STEPS} steps, "
        "dropout 0.1, two at a time. A killed sweep is started again by the same command. Equal: summary, "
        "every row of metrics but for times, and the last weights, bit for bit those of the sweep that "
        "nobody disturbed. No lease and no other directory is left.",
        "",
        "| what happened | kills | last exit code | finished records | bitwise equal |",
        "|---|---|---|---|---|",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.table is not None:
        options.table.write_text(text)
    if not fine:
        sys.exit(1)


if __name__ == "__main__":
    main()
