"""report.py study=…: arms and laws of recorded runs, against what was planted in their records."""

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import ttest_rel

from scantling import reported
from scantling.command_line import run_entry
from scantling.study.arms import first_arm, study_runs

LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


def loss_of(n, d):
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


@pytest.fixture
def record(tmp_path):
    """`record("study", "name", overrides, loss=…)` leaves what a finished run leaves, as far as a report reads it."""

    def record(
        study,
        name,
        overrides,
        *,
        loss,
        params=1e6,
        tokens=1e7,
        seed=0,
        arm=None,
        finished=True,
        corpus="f",
        **changed,
    ):
        directory = tmp_path / "runs" / study / name
        directory.mkdir(parents=True)
        choices = {"attn": "mha", "schedule": changed.pop("schedule", "linear")}
        config = {
            "choices": choices,
            "seed": seed,
            "arm": arm,
            "model": {},
            "batch_size": 8,
            "lr": changed.pop("lr", 1e-3),
        }
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        unique = changed.pop("unique", 1e12)
        environment = {
            "overrides": overrides,
            "corpus": {"fingerprint": corpus, "train_tokens": unique},
            "tokenizer": "t",
        }
        (directory / "env.json").write_text(json.dumps(environment))
        last = {
            "step": 100,
            "tokens": tokens,
            "flops": 6 * params * tokens,
            "val/loss": loss,
            "val/bpb": loss / 3,
        }
        rows = [
            last | {"step": 50, "tokens": tokens / 2, "val/loss": loss * 1.2, "val/bpb": loss * 0.4},
            last,
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished:
            counts = {"feed-forward": params * 0.9, "embedding": params * 0.1}
            (directory / "summary.json").write_text(json.dumps(last | {"parameters": counts, "best": last}))

    return record


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """`report("study=parts")` -> (exit code, output on one line, error)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        monkeypatch.setattr(sys, "argv", ["report", "resamples=300", *overrides])
        code = 0
        try:
            run_entry(reported.report, config_name="report")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, " ".join(out.split()), err

    return call


def arms(
    record,
    study="parts",
    seeds=5,
    shifts=(("llama", 0.0), ("alibi", 0.02), ("gelu", 0.0005)),
    scales=(None,),
    gain=1.0,
):
    """Named arms over paired seeds, as sweeps/parts.yaml makes them; losses by study, arm, seed."""
    rng, losses = np.random.default_rng(3), {}
    for scale in scales:
        between = 0.01 * rng.standard_normal(seeds)
        for arm, shift in shifts:
            for seed in range(seeds):
                tokens = scale or 1e7
                base = loss_of(1e6, tokens * (gain if shift else 1.0))
                loss = base + (shift if gain == 1.0 else 0.0) + between[seed] + 0.001 * rng.standard_normal()
                grid = [] if scale is None else [f"budget.tokens={scale:g}"]
                overrides = [*grid, f"seed={seed}", f"arm={arm}", f"pos={arm}"]
                name = f"{arm}-{seed}-{tokens:g}"
                record(study, name, overrides, loss=loss, tokens=tokens, seed=seed, arm=arm)
                losses[scale, arm, seed] = loss
    return losses


def sizes(record, study="sizes", seeds=1, noise=0.002, n=6, **changed):
    rng = np.random.default_rng(0)
    for i, params in enumerate(np.geomspace(1e5, 1e7, n)):
        for j, tokens in enumerate(np.geomspace(1e6, 1e9, 5)):
            for seed in range(seeds):
                loss = loss_of(params, tokens) * np.exp(noise * rng.standard_normal())
                overrides = [
                    f"budget.tokens={tokens:g}",
                    f"seed={seed}",
                    f"arm=d{i}",
                    f"model.d_model={i}",
                    f"lr={1e-3 / (i + 1)}",
                ]
                record(
                    study,
                    f"{i}-{j}-{seed}",
                    overrides,
                    loss=loss,
                    params=params,
                    tokens=tokens,
                    arm=f"d{i}",
                    **changed,
                )


def test_arms_are_compared_over_seeds(record, report, tmp_path):
    losses = arms(record)
    code, out, err = report("study=parts", "baseline=llama")
    assert (code, err) == (0, "")
    table = pd.read_csv(tmp_path / "runs/reports/parts/arms.csv").set_index("arm")
    for arm in ("alibi", "gelu"):
        ours, base = ([losses[None, name, seed] for seed in range(5)] for name in (arm, "llama"))
        theirs = ttest_rel(ours, base)
        assert table.p[arm] == pytest.approx(theirs.pvalue)
        assert (table.low[arm], table.high[arm]) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
        assert table.effect[arm] == pytest.approx(np.mean(np.subtract(ours, base)) / np.std(base, ddof=1))
    assert (table.verdict["alibi"], table.verdict["gelu"]) == ("worse", "undecided")
    assert table.seeds_to_decide["gelu"] > table.seeds_to_decide["alibi"] >= 2
    assert table.lr["alibi"] == 1e-3
    assert table.params_off["alibi"] == table.flops_off["alibi"] == 0
    assert "of 2 comparisons with llama, 0 better, 1 worse, 1 undecided at 95%" in out
    page = (tmp_path / "runs/reports/parts/report.md").read_text()
    assert f"{table.low['alibi']:+.4f} to {table.high['alibi']:+.4f}" in page
    assert (tmp_path / "runs/reports/parts/arms.png").read_bytes()[:4] == b"\x89PNG"


def test_a_planted_gain_comes_back_at_every_scale(record, report, tmp_path):
    """An arm that does with D tokens what the baseline does with 1.3·D, by the law of another study of the baseline."""
    arms(record, shifts=(("llama", 0.0), ("better", 1.0)), scales=(1e7, 1e8, 1e9), gain=1.3)
    sizes(record)
    code, out, err = report("study=parts", "baseline=llama", "law=sizes")
    assert (code, err) == (0, "")
    assert len(re.findall(r"better 6e\+1[345] [\d.]+ × compute|better 6\.000e\+1[345]", out)) == 3
    assert "better: " in out
    assert "per decade of compute" in out


def test_sizes_alone_make_a_law(record, report, tmp_path):
    sizes(record)
    code, out, err = report("study=sizes", "gate.tolerance=0.05")
    assert (code, err) == (0, "")
    parameters = pd.read_csv(tmp_path / "runs/reports/sizes/parameters.csv").set_index("parameter")
    assert parameters.low["E"] < LAW["E"] < parameters.high["E"]
    assert parameters.value["alpha"] == pytest.approx(LAW["alpha"], abs=0.02)
    assert "held-out gate passed" in out
    assert "params_without_embeddings" in out
    assert "repeated epochs" not in out


def test_repeated_data_and_schedules_that_do_not_end_are_warned_of(record, report):
    sizes(record, unique=5e8, schedule="constant")
    _, out, _ = report("study=sizes", "gate.held_out=0")
    assert re.search(r"repeated epochs: \d+ rows pass their data up to 2\.0 times", out)
    assert "schedule=constant: the learning rate does not fall" in out


def test_what_is_not_finished_is_named(record, report):
    arms(record)
    record("parts", "late", ["seed=9", "arm=llama"], loss=3.0, seed=9, arm="llama", finished=False)
    _, out, _ = report("study=parts", "baseline=llama")
    assert "warning: left out, not finished: late" in out


def test_the_baseline_is_the_first_of_the_sweep():
    assert (
        first_arm({"hydra": {"sweeper": {"arms": {"llama": [], "gelu": []}}}}, ["gelu", "llama"]) == "llama"
    )
    grid = {"hydra": {"sweeper": {"params": {"attn": "mha,gqa", "seed": "0,1"}}}}
    assert first_arm(grid, ["attn=gqa", "attn=mha"]) == "attn=mha"
    with pytest.raises(ValueError, match=r"baseline= one of a, b"):
        first_arm(None, ["b", "a"])


def test_settings_typed_without_names_are_arms(record, tmp_path):
    for attn in ("mha", "gqa"):
        for seed in (0, 1):
            for tokens in ("1e6", "2e6"):
                overrides = [f"attn={attn}", f"seed={seed}", f"budget.tokens={tokens}"]
                record(
                    "grid", f"{attn}-{seed}-{tokens}", overrides, loss=3.0, tokens=float(tokens), seed=seed
                )
    study = study_runs(tmp_path / "runs" / "grid")
    assert not study.is_law
    assert study.scales == ["budget.tokens=1e6", "budget.tokens=2e6"]
    assert set(study.runs["arm"]) == {"attn=mha", "attn=gqa"}


def unpaired(record):
    arms(record)
    record("parts", "alone", ["seed=7", "arm=llama"], loss=3.0, seed=7, arm="llama")


def other_text(record):
    arms(record)
    record("parts", "books", ["seed=7", "arm=llama"], loss=3.0, seed=7, arm="llama", corpus="g")


@pytest.mark.parametrize(
    ("prepare", "overrides", "message"),
    [
        (arms, (), "name the arm that others are compared with: baseline= one of alibi, gelu, llama"),
        (arms, ("baseline=gpt",), "no runs of the baseline gpt: arms are alibi, gelu, llama"),
        (
            unpaired,
            ("baseline=llama",),
            "seeds are unpaired: arm alibi lacks seed 7 that other arms have (row alone)",
        ),
        (
            other_text,
            ("baseline=llama",),
            "runs of parts differ in their corpus, .*: books against the others",
        ),
        (lambda r: arms(r, seeds=1), ("baseline=llama",), "one seed only"),
        (arms, ("baseline=llama", "law=parts"), "law=parts: its runs differ in more than size"),
        (arms, ("fit=runs.csv",), "give one of fit=FILE"),
        (arms, ("study=nothing",), "nothing is no directory of a study"),
        (arms, ("metric=accuracy",), "metric=accuracy is unknown: use loss or bpb"),
        (lambda r: sizes(r, "parts", n=1), (), "alpha|N"),
    ],
)
def test_what_cannot_be_compared_is_one_line(record, report, prepare, overrides, message):
    prepare(record)
    given = {override.partition("=")[0] for override in overrides}
    usual = [] if "study" in given else ["study=parts"]
    code, _, err = report(*usual, *overrides)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), err), err
