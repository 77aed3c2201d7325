"""Searches that others' programs lead: Optuna's through its Hydra sweeper, and W&B's agents.

`wandb_sweep_schema.json` is that of W&B's package `sweeps` 0.3.0 (MIT, © 2021 Weights and Biases), which asks
for a NumPy below 2 and cannot be installed here.
"""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import wandb.wandb_agent
import yaml
from omegaconf import OmegaConf
from warm import Command

from scantling.config.options import ROOT
from scantling.runs.directory import RunDirectory

FILES = sorted((ROOT / "sweeps" / "wandb").glob("*.yaml"))


def records(folder) -> dict[str, dict]:
    return {path.name: RunDirectory(path).summary for path in folder.glob("*-*") if path.is_dir()}


@pytest.mark.slow
def test_optuna_finds_the_best_of_its_runs_and_goes_on_where_it_stopped(command, tmp_path):
    search = (
        *(
            "-m",
            "hydra/sweeper=optuna",
            "hydra.sweeper.n_jobs=2",
            "hydra.sweeper.sampler.seed=0",
            "study=search",
        ),
        *("lr=tag(log,interval(1e-4,1e-1))", "model.d_model=choice(16,32)", "budget.steps=2"),
    )
    code, out, _ = command(*search, "hydra.sweeper.n_trials=2")
    assert code == 0
    first = records(tmp_path / "runs" / "search")
    assert len(first) == 2
    code, out, _ = command(*search, "hydra.sweeper.n_trials=4")
    assert code == 0
    assert out.count("finished before") == 2
    found = records(tmp_path / "runs" / "search")
    assert len(found) == 4
    assert first.items() <= found.items()
    best = yaml.safe_load((tmp_path / "runs" / "search" / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(summary["val/bpb"] for summary in found.values())
    (run,) = (name for name, summary in found.items() if summary["val/bpb"] == best["best_value"])
    config = yaml.safe_load((tmp_path / "runs" / "search" / run / "config.yaml").read_text())
    assert config["lr"] == pytest.approx(best["best_params"]["lr"])
    assert config["model"]["d_model"] == best["best_params"]["model.d_model"]

    code, out, _ = command(*search, "hydra.sweeper.n_trials=4", "dry_run=true")
    assert code == 0
    assert "which follow depends on their results" in out


def violations(sweep: dict) -> list[str]:
    schema = json.loads(Path(__file__).with_name("wandb_sweep_schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(sweep)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_accepts_its_sweep_files(path):
    sweep = yaml.safe_load(path.read_text())
    assert violations(sweep) == []
    assert sweep["program"] == "src/train.py"
    assert "${args_no_hyphens}" in sweep["command"]
    assert violations({**sweep, "method": "guess"})
    name = next(iter(sweep["parameters"]))
    assert violations({**sweep, "parameters": {name: {"min": "5e-4", "max": 1}}})


def first_values(sweep: dict) -> dict[str, float | str]:
    return {
        name: choice["values"][0] if "values" in choice else math.sqrt(choice["min"] * choice["max"])
        for name, choice in sweep["parameters"].items()
    }


def command_of_an_agent(sweep: dict, monkeypatch, tmp_path) -> tuple[list[str], dict[str, str]]:
    """What W&B's agent starts for these, and in which environment: its own code, stopped before the
    process.
    """
    started = {}
    monkeypatch.setattr(wandb.wandb_agent, "AgentProcess", lambda **made: started.update(made) or Started())
    for name, value in {"WANDB_SWEEP_ID": "a1b2c3", "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    agent = object.__new__(wandb.wandb_agent.Agent)
    agent._in_jupyter, agent._function, agent._forward_signals = False, None, False
    agent._sweep_command, agent._run_processes = list(sweep["command"]), {}
    args = {name: {"value": value} for name, value in first_values(sweep).items()}
    agent._command_run({"run_id": "run7", "program": sweep["program"], "args": args})
    return started["command"], started["env"]


class Started:
    last_sigterm_time = None


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_of_an_agent_runs(path, tmp_path, book, monkeypatch):
    """One step of it, offline, under the identity that the agent gave."""
    sweep = yaml.safe_load(path.read_text())
    monkeypatch.setenv("WANDB_MODE", "offline")
    command, environment = command_of_an_agent(sweep, monkeypatch, tmp_path)
    small = (
        *("data=text", f"data.files={book}", f"paths.cache={tmp_path}/cache", f"paths.runs={tmp_path}/runs"),
        *("batch_size=1", "budget.flops=6e8", "model.seq_len=64", "val_windows=2", "sample.n_tokens=2"),
    )
    assert command[:2] == ["/usr/bin/env", "python"]
    process = Command([*command[2:], *small], ROOT, environment=environment)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    (run,) = tmp_path.glob("runs/*/llama_tiny-*")
    config = OmegaConf.load(run / "config.yaml")
    assert {name: OmegaConf.select(config, name) for name in first_values(sweep)} == first_values(sweep)
    assert RunDirectory(run).is_finished
    assert list(run.parent.glob("wandb/offline-run-*-run7/run-run7.wandb"))
