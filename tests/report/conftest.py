"""Planted records, and report.py run on them."""

import json
from typing import Any, cast

import pytest
import yaml


@pytest.fixture
def record(tmp_path):
    """`record("study", "name", overrides, loss=…)` leaves what a finished run leaves, as far as a report
    reads it."""

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

    cast(Any, record).runs = tmp_path / "runs"
    return record


@pytest.fixture
def report(monkeypatch, entry, tmp_path):
    """`report("study=parts")` -> (exit code, output on one line, error)."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        code, out, err = entry("report", "resamples=300", *overrides)
        return code, " ".join(out.split()), err

    return call
