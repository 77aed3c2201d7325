"""A sweep of small runs against the same runs as separate commands, one after the other.

    python benchmarks/sweep.py --jobs 40 --separate 40 --table results/sweep.md

Both train `nano` for 50 steps on the default text, seeds 0 to 39, without a logger; the text is tokenised
before. `--separate` says how many of the commands are timed; fewer than the jobs are extrapolated, and the
table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from scantling.model.hardware import cpu_name

TRAIN = Path(__file__).resolve().parents[1] / "src" / "train.py"
SETTINGS = ("model=nano", "tokenizer=byte", "budget=steps", "budget.steps=50", "logger=none", "trainer=cpu")


def timed(*overrides: str) -> float:
    """Seconds of one command. Raises CalledProcessError where it fails."""
    began = time.perf_counter()
    command = [sys.executable, TRAIN, *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def losses(runs: Path) -> list[str]:
    """Of every finished run, its last row but for times."""
    rows = [json.loads(path.read_text()) for path in sorted(runs.glob("default/*/summary.json"))]
    return sorted(f"{row['val/loss']!r} {row['train/loss']!r}" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--separate", type=int, default=40)
    parser.add_argument("--directory", type=Path, default=Path("runs/benchmark-sweep"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    shutil.rmtree(options.directory, ignore_errors=True)
    paths = {name: options.directory / name for name in ("before", "sweep", "separate")}
    timed(*SETTINGS, f"paths.runs={paths['before']}", "dry_run=true")
    seeds = ",".join(map(str, range(options.jobs)))
    sweep = timed(*SETTINGS, f"paths.runs={paths['sweep']}", f"seed={seeds}", "-m")
    single = [
        timed(*SETTINGS, f"paths.runs={paths['separate']}", f"seed={seed}")
        for seed in range(options.separate)
    ]
    separate = sum(single) * options.jobs / options.separate
    equal = len(set(losses(paths["sweep"])) & set(losses(paths["separate"])))
    how = "timed" if options.separate == options.jobs else f"{options.separate} timed, the rest extrapolated"
    lines = [
        "# A sweep of small runs",
        "",
        f"`python benchmarks/sweep.py --jobs {options.jobs} --separate {options.separate}`",
        "",
        f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores. {options.jobs} runs of `nano`, 50 steps each.",
        "",
        "| | seconds | a run |",
        "|---|---|---|",
        f"| `train.py -m seed=0,…,{options.jobs - 1}` | {sweep:.0f} | {sweep / options.jobs:.1f} |",
        f"| {options.jobs} commands one after the other ({how}) "
        f"| {separate:.0f} | {separate / options.jobs:.1f} |",
        "",
        f"The sweep takes {sweep / separate:.2f} of their time. Final losses equal bit for bit in {equal} of "
        f"{options.separate} runs.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.table is not None:
        options.table.write_text(text)


if __name__ == "__main__":
    main()
