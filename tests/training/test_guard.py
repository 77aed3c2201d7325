"""Steps that go wrong: one batch of the text is planted to break the loss or gradient wherever it is met."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from test_resume import LONG, assert_equal_runs, assert_equal_trees, in_child, kill_in_step, only_run, state

from scantling.data.loading import BatchSizes, TrainBatches
from scantling.runs.wandb_file import records as wandb_records
from scantling.training import task
from scantling.training.assembly import places_left_out
from scantling.training.guard import GuardSettings, robust_z
from scantling.training.rollback import samples_of

BAD = 25
"""The place in the order of data of the batch that is planted; step 26 meets it first."""
SPIKES = ("guard.spike=10", "guard.window=20")
SHORT = (*LONG, "budget.steps=40")


def plant(monkeypatch, what: str) -> None:
    """The batch at place BAD has an infinite loss, an infinite gradient, or a loss 50 nats too high."""
    training_step = task.LanguageModelTask.training_step

    def planted(self, batch, index):
        loss = training_step(self, batch, index)
        loader = self.trainer.train_dataloader
        start = loader.order.start(BAD * 4)
        if not np.array_equal(batch["inputs"][0], loader.tokens[start : start + loader.seq_len]):
            return loss
        if what == "gradient":
            return loss + (loss - loss.detach()).abs().sqrt()  # whose slope at 0 is not finite
        self.step_state.loss = self.step_state.loss + (float("inf") if what == "loss" else 50.0)
        return loss * float("inf") if what == "loss" else loss

    monkeypatch.setattr(task.LanguageModelTask, "training_step", planted)


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run.path / "guards.jsonl").read_text().splitlines()]


def losses(run) -> list[float]:
    return [row["train/loss"] for row in run.metrics()]


def test_robust_z_equals_the_formula():
    values = np.random.default_rng(0).standard_normal(101) ** 3
    distances = np.sort(np.abs(values - np.sort(values)[50]))
    for x in (-3.0, 0.1, 7.5):
        expected = 0.6745 * (x - np.sort(values)[50]) / distances[50]
        assert robust_z(x, values.tolist()) == pytest.approx(expected, rel=1e-12)
    many = np.random.default_rng(1).standard_normal(100_001).tolist()
    assert robust_z(3.0, many) == pytest.approx(3.0, abs=0.05)  # of normal numbers, the standard score
    assert robust_z(3.0, [*many, *[1e9] * 1000]) == pytest.approx(3.0, abs=0.1)  # and outliers do not move it
    assert [robust_z(x, [1.0] * 5) for x in (0.0, 1.0, 2.0)] == [-np.inf, 0.0, np.inf]


def test_order_without_some_places():
    settings = {"tokens": np.arange(1000), "seq_len": 4, "sizes": BatchSizes(4), "micro_batch_size": 2}
    settings |= {"rank": 0, "world_size": 2, "seed": 0}

    def first(count: int, **more) -> list:
        batches = iter(TrainBatches(**settings, **more))
        return [next(batches)["inputs"].tolist() for _ in range(count)]

    whole = first(20, first_step=0)
    kept = [batch for i, batch in enumerate(whole) if i not in (3, 4, 9)]
    for step in range(12):
        assert first(5, first_step=step, left_out=[9, 3, 4]) == kept[step : step + 5]


def test_places_left_out_by_several_rollbacks():
    """The record of each names the places that training would have met, whatever was left out before."""
    rows = []
    plan = SimpleNamespace(sizes=BatchSizes(4))
    run = cast(Any, SimpleNamespace(plan=plan, directory=SimpleNamespace(guarded=lambda: rows)))
    for first, last, places in ((4, 5, [3, 4]), (3, 4, [2, 3, 4, 5]), (3, 4, [6, 7])):
        rows.append({"action": "rollback", "samples": samples_of(run, first, last)})
        assert rows[-1]["samples"] == [4 * places[0], 4 * places[-1] + 4]
    order = TrainBatches(
        tokens=np.arange(1000),
        seq_len=4,
        sizes=BatchSizes(4),
        micro_batch_size=4,
        rank=0,
        world_size=1,
        seed=0,
        first_step=2,
        left_out=places_left_out(run),
    )
    met = next(iter(order))["inputs"][:, 0].tolist()
    assert met == order.order.starts(np.arange(32, 36)).tolist()  # place 8


@pytest.mark.parametrize("what", ["gradient", "spike"])
def test_stop_names_the_batch(command, tmp_path, monkeypatch, what):
    plant(monkeypatch, what)
    code, _, err = command(*SHORT, *SPIKES, "log_every=10")
    run = only_run(tmp_path / "runs")
    assert code == 1
    (line,) = err.strip().splitlines()
    assert "at step 26" in line
    assert {"gradient": "grad_norm is nan", "spike": "robust deviations above"}[what] in line
    (record,) = records(run)
    assert record["samples"] == [BAD * 4, BAD * 4 + 4]
    assert (record["action"], record["step"]) == ("stop", 26)
    assert run.step_of(run.step_checkpoints()[0]) == 20


@pytest.mark.parametrize(
    ("what", "optim"), [("loss", "adamw"), ("gradient", "adamw"), ("spike", "adamw"), ("gradient", "muon")]
)
def test_skip_leaves_weights_and_optimiser_as_they_are(command, tmp_path, monkeypatch, what, optim):
    compared = (what, optim) == ("loss", "adamw")
    if compared:
        assert command(*SHORT, "paths.runs=clean")[0] == 0
    plant(monkeypatch, what)
    before = {}

    def on_train_batch_start(self, batch, index):
        step = self.trainer.global_step
        if step in (25, 26) and step not in before:
            optimizer = self.trainer.optimizers[0].state_dict()
            before[step] = [
                {name: p.detach().clone() for name, p in self.decoder.named_parameters()},
                {i: {k: v.clone() for k, v in values.items()} for i, values in optimizer["state"].items()},
            ]

    monkeypatch.setattr(task.LanguageModelTask, "on_train_batch_start", on_train_batch_start, raising=False)
    code, _, err = command(*SHORT, *SPIKES, f"optim={optim}", "guard.action=skip", "log_every=1")
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    assert_equal_trees(before[25], before[26])
    assert len(before[25][1]) > 0
    (record,) = records(run)
    assert (record["action"], record["step"], record["samples"]) == ("skip", 26, [BAD * 4, BAD * 4 + 4])
    assert run.summary["guarded"] == 1
    assert [row["step"] for row in run.metrics() if "lr" in row] == list(range(1, 41))
    noise_scales = [row["noise_scale"] for row in run.metrics()]
    assert noise_scales[25] == noise_scales[24]
    assert np.isfinite(noise_scales).all()
    if compared:  # with the run that met no bad batch
        clean = only_run(tmp_path / "clean")
        assert [row["lr"] for row in run.metrics()] == [row["lr"] for row in clean.metrics()]
        assert losses(run)[:25] == losses(clean)[:25]
        assert losses(run)[26:] != losses(clean)[26:]


@pytest.mark.parametrize(("what", "batches"), [("loss", 7), ("spike", 1)])
def test_rollback_is_the_run_that_never_saw_the_batches(command, tmp_path, monkeypatch, what, batches):
    """With seven, the checkpoint of step 20 has seen the first of them, and the run starts over."""
    build = TrainBatches.__init__
    with monkeypatch.context() as patch:

        def without(self, **settings: Any):
            settings["left_out"] = range(BAD + 1 - batches, BAD + 1)
            build(self, **settings)

        patch.setattr(TrainBatches, "__init__", without)
        assert command(*SHORT, "paths.runs=without")[0] == 0
    plant(monkeypatch, what)
    code, out, err = command(
        *SHORT, *SPIKES, "guard.action=rollback", f"guard.batches={batches}", "log_every=10"
    )
    assert code == 0, err
    assert f"at step 26: back to step {20 if batches == 1 else 0}" in out
    run = only_run(tmp_path / "runs")
    expected = only_run(tmp_path / "without")
    ours, theirs = state(run), state(expected)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal_trees(ours[part], theirs[part])
    rows = [row for row in expected.metrics() if row["step"] % 10 == 0 or row["step"] == 1]
    assert losses(run) == [row["train/loss"] for row in rows]
    (record,) = records(run)
    assert record["samples"] == [(BAD + 1 - batches) * 4, (BAD + 1) * 4]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_a_resumed_run_is_guarded_alike(command, tmp_path, monkeypatch, action):
    """Killed before the bad step, with a window not yet full, and behind it, before the next checkpoint."""
    plant(monkeypatch, "spike")
    chosen = (*SHORT, *SPIKES, f"guard.action={action}", "guard.window=12", "val_every=8")
    assert command(*chosen, "paths.runs=whole")[0] == 0
    whole = only_run(tmp_path / "whole")
    assert [record["step"] for record in records(whole)] == [26]
    for last in (10, 29):
        assert in_child(command, *chosen, before=lambda n=last: kill_in_step(n)) == -signal.SIGKILL
    assert command(*chosen)[0] == 0
    run = only_run(tmp_path / "runs")
    assert_equal_runs(run, whole)
    assert records(run) == records(whole)
    assert state(run)["callbacks"]["Guard"] == state(whole)["callbacks"]["Guard"]
    assert len(state(run)["callbacks"]["Guard"]["losses"]) == 12


@pytest.mark.slow
def test_killed_within_a_rollback_to_the_start(command, tmp_path, monkeypatch):
    """Before each of the files that it removes."""
    options = (*SHORT, *SPIKES, "guard.action=rollback", "guard.batches=20")
    plant(monkeypatch, "loss")
    unlink = Path.unlink
    for name in ("last.ckpt", "best.ckpt", "step-00000020.ckpt"):

        def killed(path, name=name, **named):
            if path.name == name:
                os.kill(os.getpid(), signal.SIGKILL)
            return unlink(path, **named)

        def set_up(killed=killed):
            Path.unlink = killed

        assert in_child(command, *options, f"paths.runs={name}", before=set_up) == -signal.SIGKILL
        code, _, err = command(*options, f"paths.runs={name}")
        assert code == 0, err
        assert [record["action"] for record in records(only_run(tmp_path / name))] == ["rollback"]


def test_the_best_checkpoint_is_none_that_a_rollback_removed(command, tmp_path, monkeypatch):
    """That of step 8 goes, for step 9 leaves out what it has seen; that of step 2, the best before, is there
    no more."""
    losses_of = iter([1.0, 1.1, 1.2, 0.9, 1.09, 1.07, 1.05])  # of steps 2, 4, 6, 8, and from 6 on 8, 10, 12

    class Fixed(task.TextLoss):
        loss: float

        def results(self):
            return {"loss": self.loss, "bpb": self.loss, "perplexity": 1.0}

    def begin(self):
        self.text_loss = Fixed(self.token_bytes)
        self.text_loss.loss = next(losses_of)

    monkeypatch.setattr(task.LanguageModelTask, "on_validation_epoch_start", begin)
    monkeypatch.setattr("test_guard.BAD", 8)
    plant(monkeypatch, "loss")
    options = ("budget.steps=12", "val_every=2", "guard.action=rollback", "guard.batches=3")
    code, _, err = command(*options, "micro_batch_size=2")
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    best = torch.load(run.best, weights_only=True)["global_step"]
    assert best == run.summary["best"]["step"] == 12
    assert run.summary["best"]["val/loss"] == 1.05


def test_wandb_has_what_is_recorded_after_a_rollback(command, tmp_path, monkeypatch):
    """It takes no step twice: what is trained from there on is another run of the same name."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    plant(monkeypatch, "spike")
    options = (*SHORT, *SPIKES, "guard.action=rollback", "logger=wandb", "log_every=1")
    code, _, err = command(*options)
    assert code == 0, err
    run = only_run(tmp_path / "runs")
    first, second = (list(wandb_records(file)) for file in sorted(tmp_path.rglob("run-*.wandb")))
    for rows, steps in ((first, 26), (second, 40)):
        opened = next(row["run"] for row in rows if row["type"] == "run")
        assert opened["display_name"] == run.name
        logged = [row["history"]["item"] for row in rows if row["type"] == "history"]
        losses_of = {item["_step"]: item["train/loss"] for item in logged if "train/loss" in item}
        assert list(losses_of) == list(range(1, steps + 1))
    assert list(losses_of.values()) == losses(run)


def test_too_many_stop_the_run(command, tmp_path, monkeypatch):
    """A spike at every step, for each loss is above the median of those before."""
    monkeypatch.setattr(
        task.LanguageModelTask,
        "over_ranks",
        lambda self, loss: loss * 0 + 1.0 + 0.1 * (self.trainer.global_step % 3) + self.trainer.global_step,
    )
    for action in ("skip", "rollback"):
        chosen = ("guard.spike=0.1", "guard.window=5", "guard.most=2", f"guard.action={action}")
        code, _, err = command(*SHORT, *chosen, "seed=1", f"paths.runs={action}")
        assert code == 1
        (line,) = err.strip().splitlines()
        assert "after 2 others" in line
        assert [record["action"] for record in records(only_run(tmp_path / action))] == [
            action,
            action,
            "stop",
        ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("guard.action=go", "guard.action=go is unknown: use one of stop, skip, rollback"),
        ("guard.spike=-1", "guard.spike=-1 must be a positive number, or null"),
        ("guard.spike=much", "guard.spike=much must be a positive number, or null"),
        ("guard.window=2", "guard.window=2 must be at least 3"),
        ("guard.batches=0", "guard.batches=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line(command, override, said):
    code, _, err = command(override)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_engines_that_cannot_skip_say_so():
    from scantling.training.strategies import Zero

    zero = Zero(torch.device("cpu"), "fp32", zero_optimization={"stage": 2})
    settings = {"spike": None, "window": 100, "batches": 1, "most": 1}
    with pytest.raises(ValueError, match="DeepSpeed's engine takes every step"):
        GuardSettings(action="skip", **settings).check_engine(zero, "fp32", BatchSizes(4))
    with pytest.raises(ValueError, match="the loss scale leaves steps out itself"):
        GuardSettings(action="skip", **settings).check_engine(None, "fp16", BatchSizes(4))
    GuardSettings(action="rollback", **settings).check_engine(zero, "fp16", BatchSizes(4))
    with pytest.raises(ValueError, match="use stop or skip with batch_warmup"):
        GuardSettings(action="rollback", **settings).check_engine(None, "fp32", BatchSizes(4, 2, 10))
