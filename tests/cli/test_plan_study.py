"""plan.py isoflop.flops=…: the sweep it writes is one that train.py takes as it is, at the cost that was
forecast.
"""

import os
import re

import pytest
import yaml
from warm import assumed_peak

from scantling.cli import plan_study
from scantling.config.options import ROOT
from scantling.runs.directory import RunDirectory
from scantling.runs.table import load_runs
from scantling.training import record, run

STUDY = f"planned_by_a_test_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
SMALL = (
    "model=nano",
    "tokenizer=byte",
    "model.seq_len=32",
    "attn=gqa",
    "attn/pattern=sliding",
)
GRID = ("isoflop.flops=3e11", "isoflop.budgets=2", "isoflop.ratio=2", "isoflop.sizes=4", "isoflop.spread=3")
FAST = ("isoflop.draws=100", "isoflop.throughput=1e9", "batch_size=4")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No figure, no measurement of the machine, and no sweep is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, "draw_curves", lambda *_, **__: None)
    monkeypatch.setattr(run.hardware, "peak_flops", assumed_peak)
    path = ROOT / "sweeps" / f"{STUDY}.yaml"
    path.unlink(missing_ok=True)
    yield
    path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `srun` command is available")  # Lightning's, where SLURM is installed
def test_a_planned_study_is_a_sweep_that_runs(entry, book, tmp_path):
    typed = (
        *SMALL,
        "data=text",
        f"data.files={book}",
        "batch_size=4",
        "val_windows=8",
        "logger=none",
        "trainer=cpu",
    )
    code, out, err = entry("plan", f"study={STUDY}", *GRID, *FAST, *typed, "isoflop.seeds=2")
    assert (code, err) == (0, "")
    path = ROOT / "sweeps" / f"{STUDY}.yaml"
    written = yaml.safe_load(path.read_text())
    assert {"override /attn": "gqa"} in written["defaults"]
    assert {"override /attn/pattern": "sliding"} in written["defaults"]
    arms = written["hydra"]["sweeper"]["arms"]
    assert len(arms) == 8
    assert (tmp_path / "runs" / "plans" / f"{STUDY}.png").read_bytes()[:4] == b"\x89PNG"

    code, forecast, err = entry("train", "-m", f"sweeps={STUDY}", "dry_run=true", "paths.cache=cache")
    assert (code, err) == (0, ""), forecast + err
    assert "16 jobs, 16 to run" in forecast
    total = float(re.findall(r"16 jobs, 16 to run.*?([\d.]+e[+\d]+)", forecast)[0])
    assert 0.97 * 3e11 < total <= 3e11  # whole steps fall short of a budget by less than one

    name = list(arms)[3]  # the largest of the smaller budget, whose run is the shortest
    code, _, err = entry(
        "train",
        "-m",
        f"sweeps={STUDY}",
        f"arm={name}",
        "seed=1",
        "paths.cache=cache",
        "hydra.launcher.cores=1",
    )
    assert code == 0, err
    (row,) = load_runs(tmp_path / "runs" / STUDY).to_dict("records")
    assert (row["arm"], row["seed"], row["status"]) == (name, 1, "finished")
    planned_row = next(line for line in out.splitlines() if line.startswith(name))
    assert f"{row['params']:,.0f}" in planned_row
    assert f"{row['n_layers']} × {row['d_model']}" in planned_row
    assert f"{row['steps']:,.0f}" in planned_row.split()
    assert "time: of one device at 1.00 GFLOP/s, isoflop.throughput" in out
    assert row["choice.attn/pattern"] == "sliding"
    assert RunDirectory(row["path"]).summary["flops"] == pytest.approx(1e11 / 8, rel=0.03)


@pytest.mark.slow
def test_hours_buy_what_the_throughput_makes_of_them(entry):
    usual = (f"study={STUDY}", *SMALL, *GRID[1:], "isoflop.draws=100", "batch_size=4")
    bought = "isoflop.flops=null", "isoflop.device_hours=0.1", "isoflop.throughput=1e9"
    code, out, err = entry("plan", *usual, *bought)
    assert (code, err) == (0, "")
    assert float(re.findall(r"in all ([\d.e+]+) FLOPs", out)[0]) == pytest.approx(0.1 * 3600 * 1e9, rel=0.03)
    assert re.search(r"in all .* 6\.0 minutes", out) or re.search(r"in all .* 5\.9 minutes", out)


@pytest.mark.slow
def test_the_speed_that_times_are_of_is_named(entry):
    code, out, err = entry("plan", f"study={STUDY}", *SMALL, *GRID, *FAST[:1], "batch_size=4", "mfu=0.5")
    assert (code, err) == (0, "")
    assert "time: of one device at 494 TFLOP/s, mfu=0.5 of peak=989 TFLOP/s: set them to your device's" in out


def test_a_measured_throughput_is_of_training_steps(composed):
    config = composed("model=nano", "tokenizer=byte", "trainer=cpu", "trainer.precision=fp32")
    speed = plan_study.measured(config, seconds=0.2)
    assert 1e7 < speed < 1e12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("isoflop.device_hours=1",), "give one of isoflop.flops and isoflop.device_hours"),
        (("isoflop.flops=-1",), "isoflop.flops=-1 must be positive"),
        (("isoflop.budgets=1",), "isoflop.budgets=1: 2 are the least"),
        (("isoflop.lr_rule=none",), "isoflop.lr_rule=none is unknown: use porian or constant"),
        (("isoflop.throughput=fast",), "isoflop.throughput=fast: give FLOP/s, or measured"),
        (("study=a-b",), "study=a-b: a name of letters, digits and _"),
        (("isoflop.flops=1e8",), "no model of these parts has as few as"),
        (("isoflop.spread=1.2",), "two sizes come to one shape"),
        (("study=parts",), "sweeps/parts.yaml exists: choose another study=NAME, or isoflop.overwrite=true"),
    ],
)
def test_what_cannot_be_planned_is_one_line(entry, overrides, message):
    given = {override.partition("=")[0] for override in overrides}
    usual = [o for o in (f"study={STUDY}", *SMALL, *GRID, *FAST) if o.partition("=")[0] not in given]
    code, out, err = entry("plan", *usual, *overrides)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err
    assert not (ROOT / "sweeps" / f"{STUDY}.yaml").exists()
