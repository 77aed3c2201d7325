"""What the table of a sweep says of its jobs, from the records that their runs write."""

import io
import json

import pytest
from rich.console import Console

from scantling.report.numbers import clock
from scantling.runs.directory import RunDirectory
from scantling.sweep.jobs import Job
from scantling.sweep.screen import Screen


def record(path, step: int, *, planned: int) -> None:
    path.mkdir(exist_ok=True)
    (path / "env.json").write_text(json.dumps({"steps": planned}))
    rows = [{"step": n, "seconds": n / 10, "train/loss": 6 - n / 100} for n in range(10, step + 1, 10)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def job(tmp_path):
    return Job(0, [], "seed=0", RunDirectory(tmp_path / "run"), devices=1, nodes=1, on_gpu=False, steps=40)


def test_an_ended_job_has_its_last_numbers(job):
    """Though nobody looked at its record since an earlier step."""
    screen = Screen([job], Console(file=io.StringIO(), force_terminal=True, width=100))
    job.seen = {"step": 10, "seconds": 1.0, "train/loss": 5.9}
    record(job.directory.path, 50, planned=50)
    job.state = "done"
    screen.tell(job)
    assert screen.row(job)[2:] == ("50/50", "5.500", "")


def test_a_run_of_other_steps_than_forecast_is_counted_by_its_own(job):
    record(job.directory.path, 45, planned=50)
    job.state, job.seen = "running", {"step": 45, "seconds": 9.0, "train/loss": 5.0}
    assert Screen([job], Console(file=io.StringIO())).row(job)[2:] == ("45/50", "5.000", "0:01")


@pytest.mark.parametrize(("seconds", "said"), [(3723, "1:02:03"), (59.6, "1:00"), (0, "0:00"), (-5, "0:00")])
def test_a_clock(seconds, said):
    assert clock(seconds) == said
