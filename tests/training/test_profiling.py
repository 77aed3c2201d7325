"""The profile of a run: where the time goes adds up, and nothing else changes."""

import gzip
import json

import pytest
import torch
from torch import nn
from torch.profiler import record_function

from scantling.run_directory import RunDirectory
from scantling.training.profiling import PART, times


def test_backward_time_goes_to_the_part_whose_gradient_it_is():
    """A large product labelled one thing and a small one labelled another, in one graph."""
    small, large = nn.Linear(64, 64), nn.Linear(64, 4096)
    x = torch.randn(512, 64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        with record_function(PART + "small"):
            y = small(x)
        with record_function(PART + "large"):
            z = large(y)
        z.sum().backward()
    spent = times(profile.events(), "cpu")
    assert spent["large"][0] > 2 * spent["small"][0]
    assert spent["large"][1] > 2 * spent["small"][1] > 0
    assert spent["gradients, added up"][1] == 0
    whole = sum(event.self_cpu_time_total for event in profile.events())
    assert sum(sum(pair) for pair in spent.values()) == pytest.approx(whole)


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
    assert "profile=true takes 10 steps, and this run has 9 left" in err
