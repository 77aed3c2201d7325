"""`tune=lr`: each arm gets the best rate of its own search, the search is run once, and the study holds none
of it.
"""

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from scantling.cli import train
from scantling.config.mistakes import Mistake
from scantling.runs.directory import RunDirectory
from scantling.runs.table import load_runs, load_tuning
from scantling.sweep.tuning import Search, TuningSettings

SETTINGS: dict[str, Any] = {"factors": [0.25, 0.5, 1, 2, 4], "extend": 2, "budget": 0.25, "seed": 7}


def loss(rate: float, best: float) -> float:
    """Lowest at `best`; no answer beyond 16 times as much."""
    return math.inf if rate > 16 * best else 2 + math.log(rate / best) ** 2


def searched(best: float, **settings) -> Search:
    search = Search("arm", [], 1e-3, {"tokens": 1000}, TuningSettings(**{**SETTINGS, **settings}))
    while wanted := search.wanted():
        search.tried |= {rate: loss(rate, best) for rate in wanted}
    return search


@pytest.mark.parametrize("factor", [0.02, 0.06, 0.12, 0.25, 0.6, 1, 1.3, 3, 4.1, 8, 15, 17, 40])
def test_the_best_of_the_grid_is_found_and_an_edge_is_told(factor):
    """The rates are 2^k · 1e-3, k from −2 to 2, and two more where the best lies outside: against all of
    them.
    """
    best = factor * 1e-3
    search = searched(best)
    reachable = [2.0**k * 1e-3 for k in range(-4, 5)]
    nearest = min(reachable, key=lambda rate: loss(rate, best))
    assert search.best == pytest.approx(nearest, rel=1e-3)
    assert len(search.tried) <= 7
    assert search.edge == (nearest in (reachable[0], reachable[-1]))
    if len(search.tried) == 5:
        assert reachable[2] < nearest < reachable[-3]


def test_a_failed_try_leaves_the_arm_without_a_rate():
    search = searched(1e-3)
    search.tried[1e-3] = None
    assert search.failed
    assert not search.wanted()
    everything_diverges = searched(1e-9)
    assert everything_diverges.failed


@pytest.mark.parametrize(
    "wrong",
    [
        {"factors": [1, 2]},
        {"factors": [1, 0.5, 2]},
        {"factors": [0, 1, 2]},
        {"budget": 0},
        {"budget": 1.5},
        {"extend": -1},
    ],
)
def test_numbers_that_make_no_search_are_refused(wrong):
    with pytest.raises(Mistake, match=f"tune.{next(iter(wrong))}="):
        TuningSettings(**{**SETTINGS, **wrong})


BEST = {"mha": 3e-3, "mqa": 1e-3}
"""Of the runs that do not train here. The second lies beyond the grid about the preset's 3e-3, as that is
here.
"""


@pytest.fixture
def known(monkeypatch):
    """Runs end at once with a loss that is known; they note that they ran."""

    def fit(this, console):
        attn = this.config.choices.attn
        (this.directory.path / "ran").open("a").write("x")
        bpb = loss(this.config.lr, BEST[attn])
        row = {
            "mfu": 0.1,
            "step": this.plan.steps,
            "tokens": this.plan.tokens,
            "val/bpb": bpb,
            "val/loss": bpb,
            "train/loss": bpb,
        }
        if bpb == math.inf:
            this.directory.guard({"step": 1, "action": "stop", "reason": "not finite", "samples": [0, 4]})
            raise RuntimeError("not finite")
        this.directory.finish(row)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "last_screen", lambda this: "")


def ran(folder) -> dict[str, int]:
    return {path.parent.name: len(path.read_text()) for path in folder.glob("*/ran")}


SWEEP = (
    "-m",
    "attn=mha,mqa",
    "seed=0,1",
    "budget.steps=40",
    "tune=lr",
    "tune.factors=[0.5,1,2]",
    "hydra.launcher.cores=2",
)


@pytest.mark.slow
def test_every_arm_gets_the_rate_of_its_own_search(command, tmp_path, known):
    code, out, err = command(*SWEEP, "dry_run=true")
    assert code == 0, err
    assert sum(line.startswith("search: attn=") for line in out.splitlines()) == 6
    (total,) = (line.split() for line in out.splitlines() if line.startswith("10 jobs"))
    assert total[5] == str(6 * 10 + 4 * 40)  # steps: a quarter for each try
    assert not (tmp_path / "runs").exists()

    code, out, err = command(*SWEEP)
    assert code == 0, err
    study = tmp_path / "runs" / "default"
    tries, compared = ran(study / "tuning"), ran(study)
    assert set(tries.values()) == set(compared.values()) == {1}
    assert (len(tries), len(compared)) == (3 + 5, 4)
    assert "warning: attn=mqa: the best rate tried" not in out
    for path in study.glob("nano-*"):
        config = OmegaConf.load(RunDirectory(path).config)
        assert config.lr == {"mha": 3e-3, "mqa": 0.75e-3}[config.choices.attn]
    frame = load_runs(study)
    assert len(frame) == 4
    assert not frame.attrs["left_out"]
    assert set(frame["arm"]) == {"attn=mha", "attn=mqa"}
    table = load_tuning(study)
    assert table.groupby("arm").size().to_dict() == {"attn=mha": 3, "attn=mqa": 5}
    groups: Any = table.groupby("arm")
    for arm, of_arm in groups:
        expected = [loss(rate, BEST[arm.removeprefix("attn=")]) for rate in of_arm["lr"]]
        assert of_arm["bpb"].tolist() == pytest.approx(expected, rel=1e-4)
        assert of_arm["bpb"].idxmin() == of_arm["chosen"].idxmax()
        assert of_arm["chosen"].sum() == 1
    assert {OmegaConf.load(path).seed for path in study.glob("tuning/*/config.yaml")} == {1000}

    code, out, err = command(*SWEEP)
    assert code == 0, err
    assert (ran(study / "tuning"), ran(study)) == (tries, compared)
    assert out.count("finished before") == 4

    code, out, err = command(*SWEEP, "dry_run=true")
    assert code == 0, err
    assert out.count("finished") >= 8 + 4
    assert "12 jobs, 0 to run" in out


@pytest.mark.slow
def test_an_outermost_rate_warns_and_what_diverges_is_not_tried_again(command, tmp_path, known):
    few = (*SWEEP, "seed=0", "tune.factors=[0.5,1,20]", "tune.extend=0")
    code, out, err = command(*few)
    assert code == 0, err
    assert "attn=mqa: the best rate tried, 0.0015, is the outermost" in " ".join(out.split())
    assert "diverged" in out
    before = ran(tmp_path / "runs" / "default" / "tuning")
    assert len(before) == 6
    assert command(*few)[0] == 0
    assert ran(tmp_path / "runs" / "default" / "tuning") == before


@pytest.mark.slow
def test_an_arm_whose_search_fails_leaves_the_others_alone(command, tmp_path, known, monkeypatch):
    fit = train.fit

    def sometimes(this, console):
        if this.config.choices.attn == "mqa" and this.config.lr == 3e-3:
            raise RuntimeError("the matrix is cursed")
        fit(this, console)

    monkeypatch.setattr(train, "fit", sometimes)
    few = (*SWEEP, "seed=0", "tune.extend=0")
    code, out, err = command(*few)
    assert code == 1
    assert err.strip().endswith("error: 1 of 2 jobs failed")
    assert "the matrix is cursed" in " ".join(out.split())
    assert len(ran(tmp_path / "runs" / "default")) == 1
    monkeypatch.setattr(train, "fit", fit)
    assert command(*few)[0] == 0
    assert len(ran(tmp_path / "runs" / "default")) == 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("-m", "seed=0,1", "lr=1e-3,2e-3", "tune=lr"), "tune=lr chooses lr: leave lr out of the sweep"),
        (("-m", "seed=0,1", "optim=sgd", "tune=lr"), "optim.lr=0.1 does not follow lr"),
        (("-m", "seed=0,1", "tune=lr", "tune.factors=[2,1,4]"), "tune.factors=[2, 1, 4] must be"),
        (("-m", "seed=0,1", "tune=rl"), "tune=rl is unknown"),
        (("tune=lr",), "tune=lr chooses the learning rate of a sweep's arms: add -m"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(command, tmp_path, overrides, expected):
    code, _, err = command(*overrides)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("runs/**/ran"))
