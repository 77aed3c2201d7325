"""Weights & Biases as a mirror of metrics.jsonl: offline, killed, failing, unreachable."""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import wandb
from shop import TRAIN
from warm import Command

from scantling.runs.directory import RunDirectory
from scantling.runs.wandb_file import records
from scantling.training import loggers
from scantling.training.record import tags_of_arm


@pytest.fixture
def offline(monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


def train(directory: Path, *overrides: str) -> list[str]:
    """The arguments of a small run into `directory`, logged to W&B."""
    book = directory / "book.txt"
    book.write_text(inspect.getsource(textwrap) * 4)
    return [
        str(TRAIN),
        *("model=nano", "data=text", f"data.files={book}", "tokenizer=byte", "trainer=cpu", "log_every=1"),
        *("budget=steps", "budget.steps=20", "batch_size=4", "val_windows=4", "sample.n_tokens=8"),
        *(f"paths.runs={directory}/runs", f"paths.cache={directory}/cache"),
        *overrides,
    ]


def history(directory: Path) -> list[dict]:
    """Rows of the only offline run."""
    (log,) = directory.glob("runs/default/wandb/offline-run-*/run-*.wandb")
    return history_of(log)


def history_of(log: Path) -> list[dict]:
    """Rows of a segment, read back by W&B's own command."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(log)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [r["history"]["item"] for r in map(json.loads, lines) if r["type"] == "history"]


def only_run(directory: Path) -> RunDirectory:
    (path,) = (p for p in (directory / "runs" / "default").iterdir() if p.name.startswith("nano-"))
    return RunDirectory(path)


def test_a_run_of_two_studies_is_two_to_wandb(tmp_path):
    runs = [RunDirectory(tmp_path / study / "llama_small-0123456789") for study in ("norms", "attention")]
    names = {run.wandb_id for run in runs}
    for run in runs:
        run.path.mkdir(parents=True)
        for action in ("skip", "rollback"):
            run.guard({"step": 1, "action": action})
            names.add(run.wandb_id)
    assert len(names) == 4
    assert max(map(len, names)) < 64  # W&B's limit
    assert not any(set(name) & set("/\\#?%:") for name in names)


@pytest.mark.slow
def test_offline_run_equals_the_record(tmp_path, offline):
    process = Command(train(tmp_path, "attn=gqa", "attn.n_kv_heads=2", "logger.tags=[mine]"), tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "W&B offline (no API key" in out
    mirrored = {row["_step"]: row for row in history(tmp_path)}
    for row in only_run(tmp_path).metrics():
        for key, value in row.items():
            assert mirrored[row["step"]][key] == pytest.approx(value), key
        assert mirrored[row["step"]]["trainer/global_step"] == row["step"]
    (log,) = tmp_path.glob("runs/default/wandb/offline-run-*/run-*.wandb")
    opened = next(record["run"] for record in records(log) if record["type"] == "run")
    assert opened["tags"] == ["mine", "attn=gqa", "attn.n_kv_heads=2"]
    assert tags_of_arm("gelu", ["attn=gqa"]) == ["gelu"]


@pytest.mark.slow
def test_killed_process_loses_at_most_a_second_of_rows(tmp_path, offline):
    process = Command(train(tmp_path, "budget.steps=100000"), tmp_path)
    deadline = time.monotonic() + 120
    rows = []
    while len(rows) < 100 or rows[-1]["seconds"] < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
        rows = only_run(tmp_path).metrics() if list(tmp_path.glob("runs/default/nano-*")) else []
    process.send_signal(signal.SIGKILL)
    process.communicate()
    rows = only_run(tmp_path).metrics()
    older = {row["step"] for row in rows if row["seconds"] < rows[-1]["seconds"] - 1.2}
    deadline = time.monotonic() + 120
    while not older <= {row["_step"] for row in history(tmp_path)}:  # W&B's own process takes note
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_segments_of_a_killed_run_join_to_one_curve(tmp_path, offline):
    """Killed before its first checkpoint, and past one: together the segments hold each step once.

    Whatever started the commands has a process of W&B's own, as a notebook has; it would hold a killed run.
    """
    wandb.setup(wandb.Settings(silent=True))
    assert os.environ["WANDB_SERVICE"]
    run = train(tmp_path, "budget.steps=120", "val_every=30")
    for rows in (10, 40):
        process = Command(run, tmp_path)
        while not list(tmp_path.glob("runs/default/nano-*")) or len(only_run(tmp_path).metrics()) < rows:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(2)  # W&B's own process takes note
    process = Command(run, tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    segments = list(tmp_path.glob("runs/default/wandb/offline-run-*/run-*.wandb"))
    assert len(segments) == 3
    assert len({segment.name for segment in segments}) == 1
    joined = sorted(
        (row for segment in segments for row in history_of(segment)), key=lambda row: row["_step"]
    )
    assert [row["_step"] for row in joined] == list(range(1, 121))
    for ours, row in zip(joined, only_run(tmp_path).metrics(), strict=True):
        for key in ("train/loss", "lr", "grad_norm", *(key for key in row if key.startswith("val/"))):
            assert ours[key] == row[key], (row["step"], key)


def test_a_server_that_cannot_be_reached_means_offline(offline, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    mode, reason = loggers.mode_and_reason()
    wandb.teardown()
    assert mode == "offline"
    assert "warning: the server cannot be reached" in reason


def test_wandb_mode_of_the_environment_rules(offline, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert loggers.mode_and_reason() == ("disabled", "WANDB_MODE")


def test_each_run_of_a_process_is_closed_even_when_it_fails(tmp_path, offline):
    made = {"project": "p", "tags": [], "save_dir": str(tmp_path), "group": "g"}
    for name, succeeded in (("one", False), ("two", True)):
        logger = loggers.Wandb(name=name, wandb_id=name, **made)
        logger.start({"lr": 1})
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.finish(succeeded)
        assert wandb.run is None
    assert {p.name.rsplit("-", 1)[1] for p in tmp_path.glob("wandb/offline-run-*")} == {"one", "two"}


@pytest.mark.parametrize("step", ["setup", "init"])
def test_a_run_goes_on_where_wandb_does_not_start(step, command, offline, monkeypatch):
    """As on a machine so busy that its process is not there in time."""
    started = getattr(wandb, step)

    def late(*args, **settings):
        if settings.get("mode") != "disabled":
            raise wandb.Error("Run initialization has timed out after 30.0 sec.\nTry again.")
        return started(*args, **settings)

    monkeypatch.setattr(wandb, step, late)
    code, out, err = command("logger=wandb")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert (
        "W&B disabled (warning: it did not start: Run initialization has timed out after 30.0 sec.)" in said
    )
    assert len(only_run(Path()).metrics()) == 12
