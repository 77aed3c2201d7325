"""How long the table of a large study takes: `python benchmarks/store.py --runs 10000`, a minute or two.

Trains one small run, stands as many copies of its record in one study, and times `load_runs` and
`load_curves`: the first time, when every file is read, and again, from the Parquet files, in a process of its
own.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
RECORD = ("config.yaml", "env.json", "metrics.jsonl", "summary.json")
SETTINGS = ("model=nano", "tokenizer=byte", "budget=steps", "budget.steps=20", "logger=none", "trainer=cpu")
LOAD = (
    "import sys, time; sys.path.insert(0, sys.argv[1]); from scantling.runs import table; "
    "began = time.perf_counter(); "
    "frame = getattr(table, sys.argv[2])(sys.argv[3]); print(len(frame), time.perf_counter() - began)"
)


def timed(name: str, study: Path) -> tuple[int, float]:
    """Rows, and seconds without the import of pandas."""
    command = [sys.executable, "-c", LOAD, str(SOURCE), name, str(study)]
    rows, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(rows), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = f"paths.runs={scratch}/runs"
        command = [sys.executable, str(SOURCE / "train.py"), *SETTINGS, runs]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (one,) = Path(scratch).glob("runs/default/nano-*")
        study = Path(scratch) / "copies"
        for i in range(options.runs):
            copy = study / f"run-{i:06}"
            copy.mkdir(parents=True)
            for name in RECORD:
                shutil.copy(one / name, copy / name)
        for name in ("load_runs", "load_curves"):
            (rows, cold), (_, warm) = (timed(name, study) for _ in range(2))
            print(f"{name}: {options.runs:,} runs, {rows:,} rows, {cold:.2f} s, then {warm:.2f} s")


if __name__ == "__main__":
    main()
