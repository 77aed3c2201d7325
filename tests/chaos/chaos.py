"""Runs of `nano` cut short at random instants, and taken up again until they are done.

    python tests/chaos/chaos.py --runs 50 --table results/chaos.md

Each run must end with the losses and weights of the run that nobody disturbed, bit for bit, and no whole
checkpoint may be lost on the way. Jobs are forked from this process, which has imported everything. Results
stand in `DIRECTORY/results.jsonl`; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from child import Child

from scantling.model.hardware import cpu_name
from scantling.runs.directory import RunDirectory
from scantling.training.checkpoints import damage_of

STEPS = 60
SETTINGS = (
    *("model=nano", "model.dropout=0.1", "data=text", "tokenizer=byte", "logger=none", "log_every=1"),
    *("budget=steps", f"budget.steps={STEPS}", "batch_size=4", "micro_batch_size=2", "val_every=20"),
    *("val_windows=8", "sample.n_tokens=8", "trainer=cpu", "checkpoint.every_minutes=0.0005"),
)
TIMES = ("seconds", "tokens_per_second", "mfu")
KINDS = ("SIGKILL", "SIGTERM", "full disk", "truncated checkpoint")
FILE_LIMIT = 100_000
"""Bytes, below those of a checkpoint: a limit in place of a full disk where nothing may be mounted."""


class Job(Child):
    """One process of a run; `limit`: of a file's bytes."""

    def __init__(self, place: Path, precision: str, limit: int | None = None):
        log = place.with_name(f"{place.name}.txt")
        log.unlink(missing_ok=True)
        super().__init__(
            log,
            *SETTINGS,
            f"data.files={place.parent}/book.txt",
            f"trainer.precision={precision}",
            f"paths.runs={place}/runs",
            f"paths.cache={place.parent}/cache",
            before=lambda: limit and resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )

    def wait_for_rows(self, place: Path, rows: int) -> None:
        """Until so many steps are recorded, or the process has ended."""
        while self.poll() is None:
            files = list(place.glob("runs/default/*/metrics.jsonl"))
            if rows == 0 or (files and files[0].read_bytes().count(b"\n") >= rows):
                return
            time.sleep(0.001)

    def wait_for_writing(self, place: Path) -> None:
        """Until a checkpoint is half written, or the process has ended."""
        while self.poll() is None and not list(place.glob("runs/default/*/checkpoints/step-*.ckpt.partial")):
            pass


def directory_of(place: Path) -> RunDirectory | None:
    found = list(place.glob("runs/default/*"))
    return RunDirectory(found[0]) if found else None


def whole_steps(place: Path) -> tuple[list[int], list[Path]]:
    """Steps of whole checkpoints, newest first, and the damaged ones."""
    run = directory_of(place)
    paths = [] if run is None else run.step_checkpoints()
    bad = [path for path in paths if damage_of(path) is not None]
    return [RunDirectory.step_of(path) for path in paths if path not in bad], bad


def outcome(run: RunDirectory) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses without times, and weights."""
    rows = [{key: row[key] for key in row if key not in TIMES} for row in run.metrics()]
    return rows, torch.load(run.last, weights_only=True)["state_dict"]


def fill(place: Path) -> None:
    """Write until nothing more fits."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def can_mount(place: Path) -> bool:
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", place], check=True)
    return done.returncode == 0


def disturbed(number: int, place: Path, seed: int, mounts: bool, expected: dict) -> dict:
    """One run: interrupted once or twice, taken up until it is done, compared."""
    choose = random.Random(seed * 10_000 + number)
    kind, precision = KINDS[number % len(KINDS)], ("fp32", "bf16")[number // len(KINDS) % 2]
    found = {"run": number, "kind": kind, "precision": precision, "interrupted": 0, "while writing": 0}
    found |= {"lost": 0, "resumed": []}
    truncated: set[Path] = set()
    for _ in range(choose.choice((1, 2))):
        rows, pause = choose.randrange(STEPS - 1), choose.uniform(0, 0.05)
        while_writing = kind != "SIGTERM" and choose.random() < 0.5
        newest = max(whole_steps(place)[0], default=0)
        limited = kind == "full disk" and not mounts
        job = Job(place, precision, FILE_LIMIT if limited else None)
        if not limited:
            job.wait_for_rows(place, rows)
            time.sleep(pause)
            if while_writing:
                job.wait_for_writing(place)
        if kind == "full disk" and mounts:
            fill(place)
        elif kind != "full disk":
            with contextlib.suppress(ProcessLookupError):
                if job.poll() is None:
                    os.kill(job.pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        code = job.wait()
        (place / "filler").unlink(missing_ok=True)
        found["interrupted"] += code != 0
        found.setdefault("codes", []).append(code)
        if kind == "full disk" and code not in (0, 1, 2):
            found["message"] = job.log.read_text()[-2000:]
        if kind == "full disk" and code == 1:
            errors = [line for line in job.log.read_text().splitlines() if line.startswith("error: ")]
            found["lines"] = found.get("lines", 0) + (len(errors) == 1)
        run = directory_of(place)
        found["while writing"] += run is not None and bool(list(run.checkpoints.glob("step-*.ckpt.partial")))
        steps, bad = whole_steps(place)
        found["lost"] += len(set(bad) - truncated) + (max(steps, default=0) < newest)
        if kind == "truncated checkpoint" and steps and run is not None and not run.is_finished:
            path = run.checkpoint(steps[0])
            truncated.add(path)
            os.truncate(path, choose.randrange(path.stat().st_size))
            found["damaged"] = found.get("damaged", 0) + 1
    before = whole_steps(place)[0]
    job = Job(place, precision)
    found["last code"] = job.wait()
    text = job.log.read_text()
    if before and max(before) < STEPS:
        found["resumed"].append(max(before))
        found["lost"] += f"resuming after step {max(before)}" not in text
    run = directory_of(place)
    assert run is not None, text
    rows, weights = outcome(run) if run.is_finished else ([], {})
    theirs_rows, theirs = expected[precision]
    found["equal"] = (
        rows == theirs_rows
        and weights.keys() == theirs.keys()
        and all(torch.equal(weights[name], theirs[name]) for name in theirs)
    )
    if not found["equal"]:
        found["message"] = text[-2000:]
    return found


def undisturbed(place: Path, precision: str) -> tuple[list, dict[str, torch.Tensor]]:
    place.mkdir(exist_ok=True)
    job = Job(place, precision)
    assert job.wait() == 0, job.log.read_text()
    run = directory_of(place)
    assert run is not None
    return outcome(run)


def table(results: list[dict], mounts: bool, command: str) -> str:
    substitute = (
        "a full tmpfs" if mounts else f"a limit of {FILE_LIMIT:,} bytes a file, as nothing may be mounted"
    )
    lines = [
        "# Interrupted runs",
        "",
        f"`{command}`",
        "",
        f"{cpu_name()}, torch {torch.__version__}, one thread. {len(results)} runs of `nano`, "
        f"{STEPS} steps, dropout 0.1, two micro-batches a step, fp32 and bf16; each is interrupted once "
        f"or twice at a random instant, half of the time one at which a checkpoint is being written, and "
        f"taken up again. Full disk: {substitute}.",
        "",
        "| interruption | runs | interruptions | while a checkpoint was written | finished checkpoints lost "
        "| losses and weights bitwise equal |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        chosen = [r for r in results if kind in (r["kind"], "all")]
        total = {
            key: sum(r[key] for r in chosen) for key in ("interrupted", "while writing", "lost", "equal")
        }
        lines.append(
            f"| {kind} | {len(chosen)} | {total['interrupted']} | {total['while writing']} | {total['lost']} "
            f"| {total['equal']} of {len(chosen)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--directory", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    top = options.directory.resolve()
    top.mkdir(parents=True, exist_ok=True)
    (top / "book.txt").write_text(inspect.getsource(argparse))
    mounts = can_mount(top / "small")
    expected = {}
    for precision in ("fp32", "bf16"):
        shutil.rmtree(top / precision, ignore_errors=True)
        expected[precision] = undisturbed(top / precision, precision)
    record = top / "results.jsonl"
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for number in range(len(results), options.runs):
        place = top / f"run-{number}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        small = mounts and KINDS[number % len(KINDS)] == "full disk"
        if small:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
        try:
            results.append(disturbed(number, place, options.seed, mounts, expected))
        finally:
            if small:
                subprocess.run(["umount", place], check=True)
        if results[-1]["equal"]:
            shutil.rmtree(place)
        with record.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(results[-1], flush=True)
    results = results[: options.runs]
    command = f"python tests/chaos/chaos.py --runs {options.runs} --table results/chaos.md"
    print(text := table(results, mounts, command))
    if options.table is not None:
        options.table.write_text(text)
    if not all(r["equal"] and not r["lost"] for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
