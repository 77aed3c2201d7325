"""How long a page of many runs takes, and how much memory: `python benchmarks/report.py` writes 1000
synthetic runs, as train.py leaves them, and reports on them as arms and as single runs side by side.

Each measurement is a process of its own, from its start to its end; the first of a study also reads its
records, the second finds them in the study's tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arms", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200, help="of metrics.jsonl")
    parser.add_argument("--compared", type=int, default=100, help="runs side by side")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = write_study(Path(folder), arguments)
        side_by_side = f"runs=[{','.join(names[: arguments.compared])}]"
        print(f"{'':44}{'seconds':>10}{'peak MB':>10}{'page MB':>10}")
        for title, overrides in {
            f"{len(names)} runs, {arguments.arms} arms, read for the first time": [
                "study=many",
                "baseline=arm000",
            ],
            "the same again": ["study=many", "baseline=arm000"],
            f"{arguments.compared} runs side by side": [side_by_side],
            "one run": [f"run={names[0]}"],
        }.items():
            seconds, megabytes = measured(Path(folder), overrides)
            size = (Path(folder) / "page" / "report.html").stat().st_size / 1e6
            print(f"{title:44}{seconds:>10.1f}{megabytes:>10.0f}{size:>10.1f}")


def measured(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory, MB, of one report."""
    command = [sys.executable, str(ROOT / "src" / "report.py"), *overrides, "to=page"]
    begun = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    scale = 1e6 if sys.platform == "darwin" else 1e3
    return time.perf_counter() - begun, usage.ru_maxrss / scale


def write_study(folder: Path, arguments: argparse.Namespace) -> list[str]:
    rng = np.random.default_rng(0)
    setting = yaml.safe_load((ROOT / "conf" / "model" / "nano.yaml").read_text())["model"]
    names = []
    for arm in range(arguments.arms):
        for seed in range(arguments.seeds):
            names.append(f"run-{arm:03}-{seed}")
            directory = folder / "runs" / "many" / names[-1]
            directory.mkdir(parents=True)
            write_run(directory, f"arm{arm:03}", seed, setting, arguments.rows, rng)
    return names


def write_run(
    directory: Path, arm: str, seed: int, setting: dict, n_rows: int, rng: np.random.Generator
) -> None:
    configuration = {
        "arm": arm,
        "seed": seed,
        "lr": 1e-3,
        "batch_size": 8,
        "model": setting,
        "choices": {"norm": arm, "attn": "mha", "schedule": "linear"},
        "decoder": {"norm": {"scale": float(rng.random())}},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(configuration))
    environment = {
        "overrides": [f"seed={seed}", f"arm={arm}", f"norm={arm}"],
        "corpus": {"fingerprint": "c" * 64, "train_tokens": 10**9},
        "tokenizer": "t" * 64,
        "device": "a CPU",
        "commit": "0" * 40,
    }
    (directory / "env.json").write_text(json.dumps(environment))
    steps = np.arange(1, n_rows + 1) * 10
    loss = (
        3
        + 3 * steps**-0.3
        + 0.01 * int(arm[3:]) / 100
        + 0.005 * rng.standard_normal()
        + 0.02 * rng.random(n_rows)
    )
    rows = [
        {
            "step": int(step),
            "tokens": int(step) * 512,
            "flops": float(step) * 1e9,
            "seconds": float(step) / 50,
            "train/loss": float(value),
            **({"val/loss": float(value), "val/bpb": float(value) / 2} if i % 10 == 9 else {}),
        }
        for i, (step, value) in enumerate(zip(steps, loss, strict=True))
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "samples.jsonl").write_text(
        json.dumps({"step": int(steps[-1]), "text": "def main():\n"}) + "\n"
    )
    summary = rows[-1] | {"parameters": {"feed-forward": 90_000, "embedding": 10_000}, "best": rows[-1]}
    (directory / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
