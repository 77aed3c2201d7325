"""benchmarks/gpu.py on a CPU: a GPU is not always at hand to find out that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_contestant_of_the_gpu_benchmark_trains_the_same_model():
    tiny = ("--device=cpu", "--tiny", "--steps=2", "--only=llama")
    command = [sys.executable, GPU, *tiny]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("│")] for line in done.stdout.splitlines() if "│" in line]
    losses = {row[2]: float(row[7]) for row in rows}
    assert len(losses) == 5
    assert losses.pop("fp8, compiled") == pytest.approx(losses["ours"], abs=0.02)
    assert max(losses.values()) - min(losses.values()) < 2e-3, losses
