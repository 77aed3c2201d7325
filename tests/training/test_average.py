"""The average of the weights, against its formula over the checkpoints of every step."""

import pytest
import torch
from torch.testing import assert_close

from scantling.inference.safe_loading import read_weights
from scantling.inference.stored_run import StoredRun
from scantling.runs.directory import RunDirectory


def only_run(path) -> RunDirectory:
    (directory,) = (path / "runs" / "default").iterdir()
    return RunDirectory(directory)


def test_average_by_formula_and_what_sees_it(command, tmp_path, nano, entry):
    every_step = ("checkpoint.every_minutes=1e-9", "checkpoint.keep=100")
    code, _, err = command("ema.decay=0.5", *every_step)
    assert code == 0, err
    run = only_run(tmp_path)
    average = {k: v.double() for k, v in nano("model.vocab_size=257").state_dict().items()}
    for t, path in enumerate(reversed(run.step_checkpoints()), start=1):
        weights = torch.load(path, weights_only=True)["state_dict"]
        decay = min(0.5, (1 + t) / (10 + t))
        for name in average:
            average[name] += (1 - decay) * (weights[f"decoder.{name}"].double() - average[name])
    assert len(run.step_checkpoints()) == 12
    stored = read_weights(run, "last_average")
    for name, expected in average.items():
        assert_close(stored[name].double(), expected, rtol=1e-5, atol=1e-7)
    # Validation saw it, and training did not: the weights are those of a run without.
    opened = StoredRun.load(str(run.path), "last_average")
    corpus = opened.corpus(None, tmp_path / "cache")
    loss = opened.loss(corpus, split="val", n_windows=8, batch_size=4).results()["loss"]
    assert run.metrics()[-1]["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert command(*every_step, "paths.runs=without/runs")[0] == 0
    without = only_run(tmp_path / "without")
    for name, weight in read_weights(without, "last").items():
        assert torch.equal(read_weights(run, "last")[name], weight)
    assert without.metrics()[-1]["train/loss"] == run.metrics()[-1]["train/loss"]
    assert without.metrics()[-1]["val/loss"] != run.metrics()[-1]["val/loss"]
    code, _, err = entry("evaluate", "paths.cache=cache", f"run={without.path}", "checkpoint=last_average")
    assert code == 2
    assert "kept no average of its weights" in err


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("ema.decay=1",), "ema.decay=1 must be above 0 and below 1"),
        (("ema.decay=0.9", "trainer=zero3", "trainer.accelerator=cpu"), "ema.decay is not for ZeRO 3"),
    ],
)
def test_mistakes(command, overrides, line):
    code, _, err = command(*overrides)
    assert code == 2
    assert line in err
