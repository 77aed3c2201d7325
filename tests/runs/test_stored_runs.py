"""Runs that 0.1.0 made, and what every command of today makes of them.

`stored_by_0.1.0.tar.gz` holds, of one process in float32 on LICENSE as text:

    runs/whole  a run of 40 steps, with its last checkpoint
    runs/cut    the same run, interrupted after step 23
    runs/arms   five of the six runs of `norm=rmsnorm,layernorm seed=0,1,2`, without checkpoints
"""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from warm import assumed_peak

from scantling.inference.safe_loading import read_weights
from scantling.model import hardware
from scantling.runs.directory import RunDirectory

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("model=nano", "model.d_model=16", "model.d_ff=16", "model.n_layers=1", "model.n_heads=2"),
    *("model.seq_len=32", "data=text", "data.files=LICENSE", "tokenizer=byte", "logger=none"),
    *("budget=steps", "trainer=cpu", "trainer.precision=fp32", "batch_size=4", "val_windows=8"),
    *("sample.n_tokens=8", "paths.cache=cache", "log_every=5"),
)
INTERRUPTED = (*SETTINGS, "budget.steps=40", "val_every=10", "seed=1", "ema.decay=0.9", "study=cut")


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A directory with the runs in it, and their text."""
    with tarfile.open(Path(__file__).with_name("stored_by_0.1.0.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copy(ROOT / "LICENSE", tmp_path)
    monkeypatch.setattr(hardware, "peak_flops", assumed_peak)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def only_run(study: Path) -> RunDirectory:
    (path,) = (path for path in study.iterdir() if path.is_dir())
    return RunDirectory(path)


def final_losses(run: RunDirectory) -> dict[int, float]:
    return {row["step"]: row["val/loss"] for row in run.metrics() if "val/loss" in row}


def test_an_interrupted_run_goes_on_to_the_same_end(stored, entry, monkeypatch):
    """The same command finds it; weights and losses are those of the run that was not interrupted."""
    code, out, err = entry("train", *INTERRUPTED)
    assert (code, err) == (0, "")
    assert "resuming after step 23" in out
    whole, cut = only_run(stored / "whole"), only_run(stored / "cut")
    assert whole.name == cut.name
    assert final_losses(cut) == pytest.approx(final_losses(whole), rel=1e-5)
    for checkpoint in ("last", "last_average"):
        before, after = read_weights(whole, checkpoint), read_weights(cut, checkpoint)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            torch.testing.assert_close(after[name], weight, rtol=1e-4, atol=1e-6)


def test_resume_of_its_directory_goes_on_too(stored, entry):
    code, out, err = entry("train", f"resume={only_run(stored / 'cut').path}")
    assert (code, err) == (0, "")
    assert "resuming after step 23" in out


def test_a_finished_run_is_found_finished(stored, entry):
    code, out, _ = entry("train", *INTERRUPTED, "study=whole")
    assert code == 0
    assert "This run is finished: 6.4" in out


def test_it_writes_text_and_is_measured(stored, entry):
    run = only_run(stored / "whole")
    code, out, _ = entry("sample", f"run={run.path}", "prompt=License", "n_tokens=8", "checkpoint=last")
    assert code == 0
    assert out.startswith("License")
    code, out, _ = entry(
        "evaluate", f"run={run.path}", "checkpoint=last_average", "n_windows=8", "paths.cache=cache"
    )
    assert code == 0
    assert f"{run.summary['val/bpb']:.4f}" in out


def test_it_is_exported_and_its_weights_are_written(stored, entry):
    run = only_run(stored / "whole")
    code = entry("hub", "action=export", f"run={run.path}", "family=llama", "to=hf")[0]
    assert code == 0
    assert json.loads(Path("hf/config.json").read_text())["hidden_size"] == 16
    assert entry("hub", "action=weights", f"run={run.path}", "to=weights.safetensors")[0] == 0


def test_a_sweep_runs_what_it_lacks_and_is_reported(stored, entry):
    before = {path.name for path in (stored / "arms").iterdir()}
    sweep = (
        *SETTINGS,
        "budget.steps=10",
        "val_every=5",
        "norm=rmsnorm,layernorm",
        "seed=0,1,2",
        "study=arms",
    )
    code, out, err = entry("train", "-m", *sweep, "hydra.launcher.n_jobs=1")
    assert (code, err) == (0, "")
    assert out.count("finished before") == 5
    added = {path.name for path in (stored / "arms").iterdir() if path.is_dir()} - before
    assert added == {"nano-f08ffc0817"}
    code, out, _ = entry("report", "study=arms", "baseline=norm=rmsnorm")
    assert code == 0
    assert "norm=layernorm" in out
    assert list((stored / "reports" / "arms").glob("*.html"))
    assert entry("report", f"run={only_run(stored / 'whole').path}")[0] == 0
    assert "norm=layernorm" in entry("runs", "study=arms")[1]
