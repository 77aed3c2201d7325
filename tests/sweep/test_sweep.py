"""Sweeps from the command line: what becomes of every job, whatever happens to it or to the launcher."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from scantling.cli import train
from scantling.runs.directory import RunDirectory

TIMES = ("seconds", "tokens_per_second", "mfu", "peak_flops")


def runs_of(path) -> dict[str, RunDirectory]:
    return {p.name: RunDirectory(p) for p in sorted(path.glob("nano-*"))}


def results(path) -> dict[str, dict]:
    """Finished records, without what differs from one time to the other."""
    found = {name: d.summary for name, d in runs_of(path).items() if d.is_finished}
    return {
        name: {key: value for key, value in summary.items() if key not in TIMES}
        for name, summary in found.items()
    }


def under_way(study: Path) -> int:
    """Runs that have taken a step and not their last."""
    return sum(not path.with_name("summary.json").exists() for path in study.glob("*/metrics.jsonl"))


def starts(directory: RunDirectory) -> int:
    return (directory.path / "log.txt").read_text().count("directory   ")


@pytest.fixture
def fate(monkeypatch):
    """`fate[seed] = call` makes a job of that seed do something else than train; jobs are forked and inherit
    it.
    """
    fates = {}
    fit = train.fit

    def fated(this, console):
        fates.get(this.config.seed, lambda: fit(this, console))()

    monkeypatch.setattr(train, "fit", fated)
    return fates


@pytest.mark.slow
def test_failed_hanging_and_killed_jobs_leave_the_others_alone(command, tmp_path, fate):
    again = tmp_path / "killed once"

    def broken():
        raise RuntimeError("the matrix is cursed")

    def hangs():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)

    def killed_once():
        if not again.exists():
            again.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    fate |= {1: broken, 2: hangs, 3: killed_once, 4: lambda: os.kill(os.getpid(), signal.SIGKILL)}
    limits = (
        "hydra.launcher.timeout_minutes=0.25",
        "hydra.launcher.stop_seconds=0.5",
        "hydra.launcher.cores=3",
    )
    code, out, err = command("-m", "seed=0,1,2,3,4,5", "budget.steps=2", *limits)
    assert code == 1
    assert err.strip() == "error: 4 of 6 jobs failed"  # job 3 was tried again, and left no record
    table = {line.split()[0]: line for line in out.splitlines() if line.startswith("seed=")}
    assert "failed" in table["seed=1"]
    assert "the matrix is cursed" in " ".join(out.split())
    assert "ran beyond its limit of 0.25 minutes" in " ".join(out.split())
    assert "killed by SIGKILL, 2 times" in " ".join(out.split())
    assert {"seed=0", "seed=5"} == {key for key, line in table.items() if " done " in line}
    assert len(results(tmp_path / "runs" / "default")) == 2
    assert not list(tmp_path.glob("runs/default/*/lease-*"))

    fate.clear()
    code, out, _ = command("-m", "seed=0,1,2,3,4,5", "budget.steps=2")
    assert code == 0
    assert out.count("finished before") == 2
    assert len(results(tmp_path / "runs" / "default")) == 6
    # As single runs are.
    command("seed=4", "budget.steps=2", "paths.runs=alone")
    (alone,) = results(tmp_path / "alone" / "default").items()
    assert alone in results(tmp_path / "runs" / "default").items()


@pytest.mark.slow
def test_interrupted_sweep_goes_on_from_its_checkpoints(command, tmp_path):
    """Killed, then interrupted, then let be."""
    long = ("-m", "seed=0,1", "budget.steps=60", "val_every=20", "hydra.launcher.cores=2")
    command(*long, "paths.runs=whole")

    def wait_for(rows):
        while not any(
            p.read_text().count("\n") > rows for p in tmp_path.glob("runs/default/*/metrics.jsonl")
        ):
            time.sleep(0.002)

    launcher = multiprocessing.get_context("fork").Process(target=lambda: os._exit(command(*long)[0]))
    launcher.start()
    wait_for(10)
    launcher.kill()
    launcher.join()
    assert len(results(tmp_path / "runs" / "default")) < 2
    parent = os.getpid()
    watcher = os.fork()
    if watcher == 0:
        wait_for(30)
        os.kill(parent, signal.SIGINT)
        os._exit(0)
    code, out, _ = command(*long)
    os.waitpid(watcher, 0)
    assert code == 130
    assert "interrupted; the same command goes on from there" in out
    assert not list(tmp_path.glob("runs/default/*/lease-*"))
    assert len(results(tmp_path / "runs" / "default")) < 2
    code, _, _ = command(*long)
    assert code == 0
    assert results(tmp_path / "runs" / "default") == results(tmp_path / "whole" / "default")
    whole = runs_of(tmp_path / "whole" / "default")
    for name, directory in runs_of(tmp_path / "runs" / "default").items():
        weights = (torch.load(r.last, weights_only=True)["state_dict"] for r in (directory, whole[name]))
        torch.testing.assert_close(*weights, rtol=0, atol=0)
    logs = [p.read_text() for p in tmp_path.glob("runs/default/*/log.txt")]
    assert any("resuming after step" in log for log in logs)


@pytest.mark.slow
def test_two_launchers_share_a_sweep_and_one_inherits(command, tmp_path):
    sweep = ("-m", "seed=0,1,2,3", "budget.steps=40", "val_every=20")
    command(*sweep, "paths.runs=whole")
    context = multiprocessing.get_context("fork")

    def worker():
        os.setsid()
        os._exit(command(*sweep, "hydra.launcher.cores=1")[0])

    one, two = context.Process(target=worker), context.Process(target=worker)
    one.start()
    two.start()
    while under_way(tmp_path / "runs" / "default") < 2:
        assert two.is_alive()
        time.sleep(0.002)
    one.kill()
    one.join()
    two.join()
    assert two.exitcode == 0
    assert results(tmp_path / "runs" / "default") == results(tmp_path / "whole" / "default")
    begun = [starts(directory) for directory in runs_of(tmp_path / "runs" / "default").values()]
    assert sorted(begun) == [1, 1, 1, 2]
    assert not list(tmp_path.glob("runs/default/*/lease-*"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("attn=gqa,gqq",), "job 2 of 2, attn=gqq: attn=gqq is unknown: did you mean gqa"),
        (
            ("attn=mha", "model.n_heads=4,5"),
            "job 2 of 2, model.n_heads=5: n_heads=5 does not divide d_model=32",
        ),
        (("seed=0,1,0",), "are the same run: give each setting and seed once"),
        (("seed=0,1", "resume=never"), "resume=never is for single runs"),
        (("seed=0,1", "budget.steps=many"), "budget.steps=many is not a number"),
        (("seed=0,1", "hydra.launcher.n_jobs=0"), "hydra.launcher.n_jobs must be positive"),
        (("seed=0,1", "hydra.launcher.n_jobs=two"), "'two' of type 'str' could not be converted to Integer"),
        (("ffn=swiglu,moe", "match=params"), "no model.d_ff brings this arm within 1 %"),
        (("ffn=swiglu,gelu", "match=size"), "match=size is unknown: use params or flops"),
        (("sweeps=parts", "arm=lion"), "arm=lion is unknown"),
        (("sweeps=parts", "norm=none"), "norm is what the arm"),
        (
            ("sweeps=lr_width",),
            "lr_width.yaml sets hydra.sweeper.n_trials of another sweeper: add hydra/sweeper=",
        ),
    ],
)
def test_mistakes_are_found_before_any_job_starts(command, tmp_path, overrides, expected):
    code, _, err = command("-m", *overrides)
    assert code == 2
    assert expected in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/nano-*"))


def test_a_directory_of_another_study_is_refused(command, tmp_path):
    smoke = ("-m", "sweeps=smoke", "budget.steps=1", "seed=0", "attn=mha")
    assert command(*smoke)[0] == 0
    code, _, err = command("-m", "sweeps=attention", "study=smoke", "budget.steps=1")
    assert code == 2
    assert "holds the runs of sweeps=smoke: give those of sweeps=attention a place with study=NAME" in err


def test_a_sweep_that_was_not_asked_for_says_so(command):
    """Its yaml makes it one, with -m or without."""
    said = (
        "sweeps=smoke is a sweep, also without -m: 4 jobs; hydra.mode=RUN makes a single run of its settings"
    )
    code, out, _ = command("sweeps=smoke", "dry_run=true")
    assert (code, out.splitlines()[0]) == (0, said)
    assert "also without -m" not in command("-m", "sweeps=smoke", "dry_run=true")[1]


def test_dry_run_lists_every_job_and_the_total(command, tmp_path):
    code, out, _ = command("-m", "model.n_layers=1,2,3", "seed=0,1", "dry_run=true")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.startswith("model.n_layers=")]
    assert len(rows) == 6
    block = (
        4 * 32 * 32 + 3 * 32 * 88 + 2 * 32
    )  # projections, a gated feed-forward of 2/3 · 128 in eights, norms
    expected = [257 * 32 + 32 + n * block for n in (1, 1, 2, 2, 3, 3)]
    assert [int(row[2].replace(",", "")) for row in rows] == expected
    assert [int(row[4].replace(",", "")) for row in rows] == [12 * 4 * 64] * 6
    (total,) = (line.split() for line in out.splitlines() if line.startswith("6 jobs"))
    assert total[5:7] == [f"{6 * 12:,}", f"{6 * 12 * 4 * 64:,}"]
    assert sum(float(row[5]) for row in rows) == pytest.approx(float(total[7]), rel=5e-3)
    assert not list(tmp_path.glob("runs/default/nano-*"))


def test_matched_arms_are_equal_and_the_record_says_how(command, tmp_path):
    large = ("model=llama_tiny", "model.seq_len=64", "optim=adamw", "budget.steps=1")
    code, _, err = command("-m", *large, "attn=mha,mqa", "match=params")
    assert code == 0, err
    directories = [RunDirectory(p) for p in tmp_path.glob("runs/default/llama_tiny-*")]
    counts = [sum(d.summary["parameters"].values()) for d in directories]
    assert len(counts) == 2
    assert max(counts) / min(counts) < 1.01
    for directory, count in zip(directories, counts, strict=True):
        config = OmegaConf.load(directory.config)
        # The note is of the preset's vocabulary, the run's of the tokenizer's.
        missing = (config.model.vocab_size - 257) * config.model.d_model
        assert config.matched.here == count + missing
        assert config.matched.off == pytest.approx(
            config.matched.here / config.matched.reference - 1, abs=1e-6
        )


def test_arms_of_a_study_are_one_change_each(command, tmp_path):
    code, out, err = command("-m", "sweeps=parts", "arm=llama,layernorm,alibi", "seed=0", "dry_run=true")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.startswith("arm=")] == [
        "arm=llama",
        "arm=layernorm",
        "arm=alibi",
    ]


def test_a_failure_elsewhere_is_not_tried_again(command, tmp_path, fate):
    """By a launcher that was at work when it happened; a later command does try."""

    def broken():
        raise RuntimeError("cursed")

    fate[0] = broken
    assert command("-m", "seed=0", "budget.steps=1")[0] == 1
    (failure,) = tmp_path.glob("runs/default/*/failed.json")
    assert json.loads(failure.read_text())["reason"] == "RuntimeError: cursed"
    later = time.time() + 100
    os.utime(failure, (later, later))
    code, out, _ = command("-m", "seed=0", "budget.steps=1")
    assert code == 1
    assert "failed elsewhere: RuntimeError: cursed" in out
    os.utime(failure, (0, 0))
    fate.clear()
    assert command("-m", "seed=0", "budget.steps=1")[0] == 0
    assert not failure.exists()
