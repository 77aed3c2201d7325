"""Every study in sweeps/: its yaml says what it asks, and each of its jobs can be built and is none twice."""

import itertools
import shlex
import sys
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from scantling.cli.train import train
from scantling.config.command_line import run_entry
from scantling.config.options import ROOT
from scantling.sweep.jobs import label_jobs
from scantling.sweep.outlook import look_ahead

LAUNCHER = "hydra_plugins.scantling_launcher.processes.ProcessLauncher"
STUDIES = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))


def header(study: str) -> list[str]:
    lines = (ROOT / "sweeps" / f"{study}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    return list(itertools.takewhile(lambda line: line.startswith("#"), lines[1:]))


def command_of(study: str) -> list[str]:
    """The arguments of the first command that its header gives."""
    (first, *_) = (line for line in header(study) if f"python src/train.py -m sweeps={study}" in line)
    return shlex.split(first.partition("train.py")[2])


LOOKS: dict[str, list[dict]] = {}
"""At the jobs of a study, of one seed: looked at once in this process."""


@pytest.fixture
def looks(tmp_path, monkeypatch):
    """`looks("norms")` are those at the jobs of that study, which raise for what is no job."""
    monkeypatch.chdir(tmp_path)

    def looks(study):
        def only_look(self, overrides, initial_job_idx):
            named = label_jobs(overrides)
            LOOKS[study] = look_ahead(
                self.compose, overrides, named, self.cores, self.n_jobs, elsewhere=False
            )
            sys.exit(0)

        if study not in LOOKS:
            # Hydra's own copy of the plugin's module.
            monkeypatch.setattr(Plugins.instance().class_name_to_class[LAUNCHER], "launch", only_look)
            monkeypatch.setattr(sys, "argv", ["train", *command_of(study), "seed=0"])
            with pytest.raises(SystemExit) as stop:
                run_entry(train, config_name="train")
            assert stop.value.code == 0
        return LOOKS[study]

    return looks


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_every_job_of_a_study_can_be_built(looks, study):
    """And none is there twice: `look_ahead` raises for both."""
    found = looks(study)
    assert len(found) >= 2
    assert {Path(look["directory"]).parent.name for look in found} == {study}
    assert not Path("runs").exists()


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_opens_with_its_question(study):
    assert "?" in "".join(header(study)[:2])


def test_isoflop_brackets_each_budget_with_five_sizes(looks):
    """At least five budgets over 1.5 decades; a budget's runs cost the same but for the last step."""
    sizes = {}
    for look in looks("isoflop"):
        (budget,) = (float(o.partition("=")[2]) for o in look["overrides"] if o.startswith("budget.flops="))
        step = look["flops"] / look["steps"]
        assert budget - step < look["flops"] <= budget
        sizes.setdefault(budget, []).append(look["parameters"])
    assert len(sizes) >= 5
    assert max(sizes) / min(sizes) >= 10**1.5
    assert all(len(set(of_budget)) >= 5 for of_budget in sizes.values())
