"""The profile of a run: where the time goes adds up, and nothing else changes."""

import gzip
import json
import os

import pytest
import torch
from torch.profiler import record_function

from scantling.runs.directory import RunDirectory
from scantling.training.profiling import PART, time_by_part, without_stderr


def test_backward_time_goes_to_the_part_whose_gradient_it_is():
    """Two products in one graph: what PyTorch itself says of each one's range, and of its gradient, is found
    again."""
    first, second = (torch.randn(64, d, requires_grad=True) for d in (64, 512))
    x = torch.randn(512, 64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        with record_function(PART + "first"):
            y = x @ first
        with record_function(PART + "second"):
            z = y @ second
        z.sum().backward()
    events = profile.events()
    assert events is not None

    def spans(name: str) -> list[float]:
        found = [event for event in events if event.name.endswith(name)]
        return [event.cpu_time_total for event in sorted(found, key=lambda event: event.time_range.start)]

    spent = time_by_part(events, "cpu")
    assert [spent["first"][0]] == pytest.approx(spans(PART + "first"))
    assert [spent["second"][0]] == pytest.approx(spans(PART + "second"))
    # Backward, the one that came last is the first.
    backward = [spent["second"][1], spent["first"][1]]
    assert backward == pytest.approx(spans("evaluate_function: MmBackward0"))
    assert spent["gradients, added up"][1] == 0
    whole = sum(event.self_cpu_time_total for event in events)
    assert sum(sum(pair) for pair in spent.values()) == pytest.approx(whole)


def test_what_the_profiler_says_stays_off_the_screen(capfd):
    with without_stderr():
        os.write(2, b"profiler_start")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_profile_of_a_run(command, tmp_path):
    code, out, err = command("profile=true")
    assert code == 0, err
    (path,) = (tmp_path / "runs" / "default").iterdir()
    run = RunDirectory(path)
    table = (run.profile / "table.txt").read_text()
    for part in (
        "attention",
        "feed-forward",
        "norm",
        "head, loss",
        "embedding",
        "optimiser",
        "data",
        "callbacks",
    ):
        assert part in table
        assert part in out
    trace = json.loads(gzip.decompress((run.profile / "trace.json.gz").read_bytes()))
    assert {"part: attention", "part: data"} <= {event.get("name") for event in trace["traceEvents"]}
    shares = [
        float(line.split()[-1].rstrip("%")) for line in table.splitlines() if line.rstrip().endswith("%")
    ]
    assert sum(shares) == pytest.approx(100, abs=1)
    # The same run without: the same id, the same losses.
    assert command("paths.runs=without")[0] == 0
    (path,) = (tmp_path / "without" / "default").iterdir()
    assert path.name == run.path.name
    losses = [[row["train/loss"] for row in each.metrics()] for each in (run, RunDirectory(path))]
    assert losses[0] == losses[1]


def test_run_that_is_too_short_is_refused(command):
    code, _, err = command("profile=true", "budget.steps=9")
    assert code == 2
    assert "profile=true takes 10 steps, and this run has 9:" in err


def test_the_rest_of_a_run_may_be_too_short(command, tmp_path):
    code, _, err = command("budget.steps=12", "val_every=4")
    assert code == 0, err
    (path,) = (tmp_path / "runs" / "default").iterdir()
    run = RunDirectory(path)
    (path / "summary.json").unlink()  # as if it had been interrupted after step 8
    for name in (run.checkpoint(12), run.last, run.best):
        name.unlink()
    code, out, err = command("budget.steps=12", "val_every=4", "profile=true")
    assert code == 0, err
    assert "no profile: it takes 10 steps, and 4 are left" in out
    assert run.is_finished
