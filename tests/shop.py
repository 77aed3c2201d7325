"""Runs started from the command line, as a user would, that several tests share."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from warm import Command

from scantling.inference.safe_loading import read_weights
from scantling.runs.directory import RunDirectory

TRAIN = Path(__file__).parents[1] / "src" / "train.py"
USUAL = (
    *("model=nano", "data=text", "data.files=book.txt", "tokenizer=byte", "logger=none", "log_every=1"),
    *("budget=steps", "budget.steps=20", "trainer.accelerator=cpu", "trainer.precision=fp32"),
    *("batch_size=16", "val_windows=8", "val_every=10", "sample.n_tokens=8", "paths.cache=cache"),
)


class Shop:
    """A place with a text and its tokens, where runs are started as a user would."""

    def __init__(self, path: Path):
        self.path = path
        (path / "book.txt").write_text(inspect.getsource(argparse))

    def start(self, *overrides: str, runs: str, processes: int | None = None, **started: Any) -> Command:
        """As a user would; `processes=1` leaves it to Lightning to start the second of two."""
        if processes is None:
            processes = 2 if "trainer.devices=2" in overrides else 1
        argv = [TRAIN, *self.options(*overrides), f"paths.runs={runs}"]
        return Command(argv, self.path, processes=processes, **started)

    @staticmethod
    def options(*overrides: str) -> list[str]:
        """These, and the usual ones that they leave."""
        given = {override.partition("=")[0] for override in overrides}
        options = [*(o for o in USUAL if o.partition("=")[0] not in given), *overrides]
        return sorted(options, key=lambda option: option != "-m")

    def run(self, *overrides: str, runs: str, **started: Any) -> RunDirectory:
        process = self.start(*overrides, runs=runs, **started)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        return self.directory(runs)

    def refused(self, *overrides: str) -> str:
        """The one line with which a mistake is answered."""
        process = self.start(*overrides, runs="refused", processes=1)
        _, err = process.communicate()
        assert process.returncode == 2, err
        (line,) = err.strip().splitlines()
        return line

    def entry(self, name: str, *overrides: str) -> str:
        process = Command([TRAIN.with_stem(name), *overrides], self.path)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        return out

    def directory(self, runs: str) -> RunDirectory:
        (path,) = (self.path / runs / "default").iterdir()
        return RunDirectory(path)


def assert_same_training(run: RunDirectory, alone: RunDirectory) -> None:
    """Rows and final weights of one process, but for rounding."""
    rows, expected = run.metrics(), alone.metrics()
    assert [row["step"] for row in rows] == list(range(1, 21))
    for key in ("train/loss", "lr", "val/loss", "grad_norm"):
        ours = [row[key] for row in rows if key in row]
        # The norm is a difference away from its rounding: 20 steps leave it a little more.
        tolerance = 1e-4 if key == "grad_norm" else 1e-5
        assert ours == pytest.approx([row[key] for row in expected if key in row], rel=tolerance)
    weights, single = read_weights(run, "last"), read_weights(alone, "last")
    assert weights.keys() == single.keys()
    for name, weight in single.items():
        torch.testing.assert_close(
            weights[name], weight, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
