"""Runs killed at chosen instants go on to the losses and weights of the run that was not interrupted."""

import json
import os
import resource
import signal
import subprocess

import pytest
import torch

from scantling.runs.directory import RunDirectory
from scantling.training import checkpoints, task

LONG = (
    "budget.steps=60",
    "val_every=20",
    "model.dropout=0.1",
    "micro_batch_size=2",
    "ema.decay=0.9",
    "noise_scale=true",
)
TIMES = ("seconds", "tokens_per_second", "mfu")


def only_run(runs) -> RunDirectory:
    (directory,) = (path for path in runs.glob("default/nano-*"))
    return RunDirectory(directory)


def state(directory: RunDirectory) -> dict:
    return torch.load(directory.last, weights_only=True)


def assert_equal_runs(ours: RunDirectory, theirs: RunDirectory) -> None:
    """Losses and samples, weights, optimiser, schedule and random numbers, bit for bit."""
    rows = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in run.metrics()]
        for run in (ours, theirs)
    ]
    assert rows[0] == rows[1]
    assert ours.samples.read_text() == theirs.samples.read_text()
    a, b = state(ours), state(theirs)
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal_trees(a[part], b[part])
    averages = [s["callbacks"]["WeightAverage"]["weights"] for s in (a, b)]
    assert_equal_trees(*averages)
    random_states = [s["callbacks"]["Checkpoints"]["random_states"] for s in (a, b)]
    assert_equal_trees(*random_states)


def assert_equal_trees(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal_trees(x, y)
    else:
        assert a == b


def in_child(command, *overrides, before=lambda: None) -> int:
    """Run in a forked process; its exit status, negative for the signal that ended it."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            before()
            code = command(*overrides)[0]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(name: str, count: int):
    """Make the `count`-th call of `name` in the module that writes checkpoints the process's last."""
    owner, _, attribute = name.rpartition(".")
    target = {"os": os, "HashedFile": checkpoints.HashedFile}[owner]
    original, calls = getattr(target, attribute), iter(range(1, 10**9))

    def call(*arguments):
        inside = owner == "HashedFile" or any(
            "checkpoints" in str(a) or isinstance(a, int) for a in arguments
        )
        if inside and next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(target, attribute, call)


@pytest.fixture(scope="session")
def trained() -> dict[tuple[str, ...], RunDirectory]:
    return {}


@pytest.fixture
def whole(command, tmp_path, trained):
    """`whole(*overrides)`: the same run, never interrupted; trained once."""

    def whole(*overrides) -> RunDirectory:
        if overrides not in trained:
            assert command(*LONG, *overrides, "paths.runs=whole")[0] == 0
            trained[overrides] = only_run(tmp_path / "whole")
        return trained[overrides]

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_killed_while_a_checkpoint_is_written(command, tmp_path, whole, precision):
    """In turn: in the middle of the file, before its checksum, before its name, before `last` and `best`."""
    chosen = f"trainer.precision={precision}"
    uninterrupted = whole(chosen)
    run = None
    for name, count, finished in (
        ("HashedFile.write", 20, 0),
        ("os.replace", 1, 0),
        ("os.replace", 2, 0),
        ("os.replace", 3, 20),
        ("HashedFile.write", 40, 20),
        ("os.replace", 2, 20),
        ("os.replace", 4, 40),
    ):
        code = in_child(command, *LONG, chosen, before=lambda name=name, count=count: kill_at(name, count))
        assert code == -signal.SIGKILL
        run = only_run(tmp_path / "runs")
        newest, damaged = checkpoints.newest_whole_checkpoint(run)
        assert damaged == []
        assert (0 if newest is None else run.step_of(newest)) == finished
    code, out, _ = command(*LONG, chosen)
    assert code == 0
    assert "resuming after step 40" in out
    assert_equal_runs(run, uninterrupted)
    best = min((row["val/loss"], row["step"]) for row in run.metrics() if "val/loss" in row)
    assert torch.load(run.best, weights_only=True)["global_step"] == best[1]
    assert not list(run.checkpoints.glob("*.partial"))


@pytest.mark.parametrize("harm", ["truncated", "flipped", "without a checksum"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(command, tmp_path, whole, harm):
    uninterrupted = whole()
    assert in_child(command, *LONG, before=lambda: kill_at("os.replace", 7)) == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    newest, older = run.step_checkpoints()
    assert [run.step_of(newest), run.step_of(older)] == [40, 20]
    content = newest.read_bytes()
    if harm == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        middle = len(content) // 2
        newest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        checkpoints.checksum_of(newest).unlink()
    code, out, _ = command(*LONG)
    assert code == 0
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert str(newest.relative_to(tmp_path)) in warnings[0]
    assert "resuming after step 20" in out
    assert_equal_runs(run, uninterrupted)


SHORT = ("budget.steps=12", "val_every=4")


def kill_in_step(step: int) -> None:
    training_step = task.LanguageModelTask.training_step

    def killed(self, batch, batch_idx):
        if self.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return training_step(self, batch, batch_idx)

    task.LanguageModelTask.training_step = killed


def test_killed_again_after_the_only_checkpoint_was_damaged(command, tmp_path):
    assert in_child(command, *SHORT, before=lambda: kill_in_step(6)) == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    (only,) = run.step_checkpoints()
    only.write_bytes(only.read_bytes()[:1000])
    assert in_child(command, *SHORT, before=lambda: kill_in_step(2)) == -signal.SIGKILL  # started over
    assert command(*SHORT)[0] == 0
    assert state(run)["global_step"] == 12


def test_killed_between_the_final_checkpoint_and_its_second_names(command, tmp_path):
    """The third, each with a checksum, the file, `last` and `best`. No step is left to do."""
    assert in_child(command, *SHORT, before=lambda: kill_at("os.replace", 11)) == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    assert (run.step_of(run.step_checkpoints()[0]), state(run)["global_step"]) == (12, 8)
    assert command(*SHORT)[0] == 0
    assert run.last.samefile(run.checkpoint(12))
    assert run.best.samefile(run.checkpoint(run.summary["best"]["step"]))
    assert not list(run.checkpoints.glob("*.partial"))


def test_newest_checkpoints_stay_with_their_checksums(command, tmp_path):
    command("budget.steps=12", "val_every=2", "checkpoint.keep=3")
    run = only_run(tmp_path / "runs")
    assert [run.step_of(path) for path in run.step_checkpoints()] == [12, 10, 8]
    assert run.last.samefile(run.checkpoint(12))
    names = [path.name + ".sha256" for path in run.step_checkpoints()]
    assert sorted(path.name for path in run.checkpoints.glob("*.sha256")) == sorted(names)
    subprocess.run(["sha256sum", "--check", "--strict", *names], cwd=run.checkpoints, check=True)


def test_snapshot_is_a_copy_that_keeps_shared_memory():
    weight = torch.arange(4.0)
    taken = checkpoints.snapshot({"a": weight, "b": [weight, (weight[1:], 5)]}, {})
    weight += 1
    assert taken["a"].tolist() == [0, 1, 2, 3]
    assert taken["a"] is taken["b"][0]
    assert taken["b"][1][0].tolist() == [1, 2, 3]
    assert taken["b"][1][1] == 5


def test_random_state_of_every_library_returns():
    import random

    import numpy as np

    def drawn():
        return random.gauss(0, 1), np.random.normal(), torch.rand(()).item()

    drawn()  # leaves half of a pair of normal numbers in hand
    kept = checkpoints.random_state(torch.device("cpu"))
    first = drawn()
    drawn()
    checkpoints.set_random_state(kept, torch.device("cpu"))
    assert drawn() == first


def test_run_of_an_older_version_is_not_started_over(command, tmp_path):
    command()
    run = only_run(tmp_path / "runs")
    (run.path / "summary.json").unlink()
    for path in run.checkpoints.glob("step-*"):
        path.unlink()
    code, _, err = command()
    assert code == 2
    assert "is of an older version" in err


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [27, 40])
def test_preempted_run_leaves_a_checkpoint_and_goes_on(command, tmp_path, whole, which, step):
    """Between two validations, and at the step before one; the signal comes within an optimiser step."""
    growing = ("batch_warmup.start=2", "batch_warmup.steps=35")
    uninterrupted = whole(*growing)

    def preempt():
        step_of_task = task.LanguageModelTask.training_step

        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == step - 1:
                os.kill(os.getpid(), which)
            return step_of_task(self, batch, batch_idx)

        task.LanguageModelTask.training_step = training_step

    assert in_child(command, *LONG, *growing, before=preempt) == 130
    run = only_run(tmp_path / "runs")
    assert run.step_of(run.step_checkpoints()[0]) == step
    code, out, _ = command(*LONG, *growing)
    assert code == 0
    assert f"resuming after step {step}" in out
    assert_equal_runs(run, uninterrupted)
    assert run.metrics()[-1]["tokens"] == 64 * (2 * 35 + 4 * 25)


def test_checkpoints_come_by_the_clock_too(command, tmp_path, whole):
    half = "trainer.precision=bf16"
    uninterrupted = whole(half)
    often = (*LONG, half, "checkpoint.every_minutes=1e-9", "checkpoint.keep=100")
    # 27 checkpoints of at least two renames; `best` makes it an earlier one.
    assert in_child(command, *often, before=lambda: kill_at("os.replace", 70)) == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    steps = [run.step_of(path) for path in run.step_checkpoints()]
    assert steps == list(range(len(steps), 0, -1))
    assert len(steps) > 20
    assert command(*LONG, half)[0] == 0
    assert_equal_runs(run, uninterrupted)


def test_full_disk_is_one_line_and_finished_checkpoints_stand(command, tmp_path, whole):
    uninterrupted = whole()
    assert in_child(command, *LONG, before=lambda: kill_at("os.replace", 6)) == -signal.SIGKILL
    run = only_run(tmp_path / "runs")
    finished = (run.checkpoint(20), checkpoints.checksum_of(run.checkpoint(20)))
    before = [path.read_bytes() for path in finished]

    def recorded(*overrides):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        code, out, err = command(*overrides)
        (tmp_path / "error.txt").write_text(err)
        return code, out, err

    assert in_child(recorded, *LONG) == 1
    error = (tmp_path / "error.txt").read_text()
    assert error.count("\n") == 1
    assert "step-00000040.ckpt cannot be written (File too large)" in error
    assert before == [path.read_bytes() for path in finished]
    assert run.step_checkpoints() == [finished[0]]
    assert command(*LONG)[0] == 0
    assert_equal_runs(run, uninterrupted)


@pytest.mark.parametrize(("what", "log_every"), [("loss", 1), ("loss", 10), ("grad_norm", 1)])
def test_training_that_is_no_longer_finite_stops_with_its_samples(
    command, tmp_path, monkeypatch, what, log_every
):
    """One weight or one gradient becomes infinite after the 25th step; the checkpoints stay finite."""
    on_step = task.LanguageModelTask.configure_gradient_clipping

    def poisoned(self, optimizer, *arguments, **named):
        if self.trainer.global_step == 25:
            parameter = next(self.decoder.parameters())
            (parameter.grad if what == "grad_norm" else parameter.data)[0, 0] = float("inf")
            parameter.data[1:] = float("inf") if what == "loss" else parameter.data[1:]
        on_step(self, optimizer, *arguments, **named)

    monkeypatch.setattr(task.LanguageModelTask, "configure_gradient_clipping", poisoned)
    code, _, err = command(*LONG, f"log_every={log_every}")
    run = only_run(tmp_path / "runs")
    assert code == 1
    (line,) = err.strip().splitlines()
    step = {"loss": 27, "grad_norm": 26}[what]  # whenever a row of metrics shows it
    assert f"at step {step}:" in line
    (record,) = map(json.loads, (run.path / "guards.jsonl").read_text().splitlines())
    assert record["samples"] == [(step - 1) * 4, step * 4]
    assert all(torch.isfinite(weight).all() for weight in state(run)["state_dict"].values())
    assert not run.is_finished
