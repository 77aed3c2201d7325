"""report.py study=…: arms and laws of recorded runs, against what was planted in their records."""

import io
import json
import re
import shutil
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from planted import LAW, arms, loss_of, sizes
from rich.console import Console
from scipy.stats import t, ttest_rel

from scantling.analysis import arms as arms_module
from scantling.analysis.ablation import holm
from scantling.analysis.allocation import frontier
from scantling.analysis.arms import first_arm, pairable_runs, recorded_runs, rows_where, study_runs
from scantling.analysis.comparison import compare_arms
from scantling.analysis.forms import saturating
from scantling.analysis.law import find_law
from scantling.analysis.observations import doubts
from scantling.analysis.scaling import fit
from scantling.cli import report_study
from scantling.cli.report_study import WIDE, law_of, observations_of, print_tables
from scantling.report.arm_charts import gain_chart, rows_by_arm
from scantling.report.arm_words import arms_table, headline, tables, trend_line
from scantling.report.curve_charts import curves_chart
from scantling.report.published import grouping
from scantling.report.sentences import sentence
from scantling.runs.table import load_curves


def unfinished(record):
    record("parts", "late", ["seed=0", "arm=llama"], loss=3.0, arm="llama", finished=False)


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


@pytest.mark.slow
@pytest.mark.parametrize("make", [arms, lambda record: sizes(record, "parts"), unfinished])
def test_a_study_is_read_once(record, report, monkeypatch, make):
    """Its runs and its curves, whether it is arms, a law, or gives no answer."""
    make(record)
    read = []
    for module, name in ((arms_module, "load_runs"), (report_study, "load_curves")):
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda study, load=load, name=name: read.append(name) or load(study)
        )
    report("study=parts", "baseline=llama", "gate.held_out=0")
    assert sorted(read) == ["load_curves", "load_runs"]


@pytest.mark.parametrize("scales", [(None,), (1e7, 1e8)])
@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_terminal_cuts_no_number(record, width, scales):
    """It has room for fewer columns: those of the answer stay, and every cell is whole."""
    arms(record, shifts=(("ffn=gelu", 0.0), ("ffn=swiglu", 0.02), ("ffn=relu2", -0.05)), scales=scales)
    found = compared(record, baseline="ffn=gelu", law=None)
    out = io.StringIO()
    print_tables(Console(file=out, width=width, markup=False), tables(found), [])
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    whole = arms_table(found).drop(columns=WIDE)
    kept = ["arm", "difference", "paired t", "verdict"]
    kept += ["loss", "Holm p", "in noise"] if width >= 100 else []
    kept = [*whole] if width == 160 else kept
    shown = [line for line in lines if line.startswith(("ffn=", "budget."))]
    for row, line in zip(whole.to_dict("records"), shown, strict=True):
        assert set(line.split()) >= set(" ".join(str(row[name]) for name in kept).split())


def test_a_planted_gain_comes_back_at_every_scale(record, report, tmp_path):
    """An arm that does with D tokens what the baseline does with 1.3·D, by the law of another study of the
    baseline."""
    arms(record, shifts=(("llama", 0.0), ("better", 1.0)), scales=(1e7, 1e8, 1e9), gain=1.3)
    sizes(record)
    code, out, err = report("study=parts", "baseline=llama", "law=sizes")
    assert (code, err) == (0, "")
    assert len(re.findall(r"better 6e\+1[345] [\d.]+ × compute|better 6\.000e\+1[345]", out)) == 3
    assert "better: " in out
    assert "per decade of compute" in out


def test_noise_of_one_scale_does_not_cancel_that_of_another(record, report):
    """The trend's interval by the delta method: log m = −shift/(beta·(L − E)) at each scale, a line through
    three."""
    arms(record, shifts=(("llama", 0.0), ("alike", 0.0)), scales=(1e7, 1e8, 1e9))
    sizes(record, noise=1e-5)
    directory = record.runs / "parts"
    for path in directory.glob("alike-*/summary.json"):
        base = json.loads(
            (directory / path.parent.name.replace("alike", "llama") / "summary.json").read_text()
        )
        shift = 0.1 * (-1) ** int(path.parent.name.split("-")[1])
        path.write_text(json.dumps(base | {"val/loss": base["val/loss"] + shift}))
    _, out, _ = report("study=parts", "baseline=llama", "law=sizes", "resamples=2000")
    ((low, high),) = re.findall(r"alike: .* per decade of compute \(([\d.]+) to ([\d.]+)\)", out)
    spread = np.std([0.1 * (-1) ** seed for seed in range(5)], ddof=1) / np.sqrt(5)
    gamma = LAW["alpha"] * LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    ends = []
    for compute in (6e13, 6e15):
        n = (LAW["alpha"] * LAW["A"] / LAW["beta"] / LAW["B"]) ** (1 / (LAW["alpha"] + LAW["beta"]))
        n *= (compute / 6) ** (LAW["beta"] / (LAW["alpha"] + LAW["beta"]))
        ends.append(spread / gamma / (loss_of(n, compute / 6 / n) - LAW["E"]))
    expected = 2 * t.ppf(0.975, 4) * np.hypot(*ends) / 2
    assert np.log(float(high) / float(low)) == pytest.approx(expected, rel=0.15)


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


def test_a_law_has_one_interval_wherever_it_is_asked_for(record):
    """On a planned grid, whose bootstrap draws noise: as the law of its own study, and as law= of another."""
    for budget in (1e12, 1e13, 1e14, 1e15):
        for i, n in enumerate(0.3 * np.sqrt(budget / 6) * np.geomspace(0.3, 3, 5)):
            loss = loss_of(n, budget / 6 / n) * (1 + 0.002 * np.cos(7 * i))
            overrides = [f"budget.flops={budget:g}", f"model.d_model={i}"]
            record("grid", f"{budget:g}-{i}", overrides, loss=loss, params=n, tokens=budget / 6 / n)
    settings: dict[str, Any] = {"resamples": 100, "level": 0.9, "seed": 0}
    paths = SimpleNamespace(runs=record.runs)
    config = cast(Any, SimpleNamespace(paths=paths, law="grid", study="grid", **settings))
    config.drop_highest, config.irreducible = 0, None
    study = study_runs(record.runs / "grid")
    own = find_law(
        observations_of(config, study), source="grid", held_out=0, tolerance=0.01, budgets=None, **settings
    )
    assert law_of(config, study).intervals == frontier(own.fit).intervals


@pytest.mark.slow
def test_repeated_data_and_schedules_that_do_not_end_are_warned_of(record, report):
    sizes(record, unique=5e8, schedule="constant")
    _, out, _ = report("study=sizes", "gate.held_out=0")
    assert re.search(r"repeated epochs: \d+ rows pass their data up to 2\.0 times", out)
    assert "schedule=constant: the learning rate does not fall" in out


def test_one_is_singular_and_nothing_is_not_negative(record):
    """One row passes its data; one comparison; a difference of -0.00001 is none at four decimals."""
    arms(record, shifts=(("llama", 0.0), ("alike", 0.0)))
    for path in (record.runs / "parts").glob("alike-*/summary.json"):
        base = path.parent.with_name(path.parent.name.replace("alike", "llama")) / "summary.json"
        loss = json.loads(base.read_text())["val/loss"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"val/loss": loss - 1e-5}))
    found = compared(record, law=None)
    assert "of 1 comparison with llama" in headline(found)
    assert list(arms_table(found)["difference"]) == ["", "+0.0000"]
    runs = pd.DataFrame({"N": [1e6, 1e6], "D": [1e8, 3e8], "C": [6e14, 1.8e15], "run": ["a", "b"]})
    (doubt,) = doubts(runs, np.array([2e8, 2e8]), several=False)
    assert sentence(doubt).startswith("repeated epochs: 1 row passes its data up to 1.5 times")


def test_what_is_not_finished_is_named(record, report):
    arms(record)
    record("parts", "late", ["seed=9", "arm=llama"], loss=3.0, seed=9, arm="llama", finished=False)
    record("parts", "stray", ["seed=0", "attn=gqa"], loss=3.0, finished=False)
    _, out, _ = report("study=parts", "baseline=llama")
    assert "warning: left out, not finished: late, stray" in out
    assert "of 2 comparisons with llama" in out


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


@pytest.mark.parametrize("key", ["lr", "batch_size", "micro_batch_size"])
def test_a_size_with_several_rates_makes_no_law(record, key):
    """Most of such runs are mistuned; only micro-batches leave the loss as it is."""
    for width in (32, 64, 128):
        for tokens in ("1e6", "4e6"):
            for value in (1, 3):
                overrides = [f"model.d_model={width}", f"budget.tokens={tokens}", f"{key}={value}"]
                settings = {"params": 24 * width**2, "tokens": float(tokens), "loss": 3.0}
                record("grid", f"{width}-{tokens}-{value}", overrides, **settings)
    study = study_runs(record.runs / "grid")
    assert study.is_law == (key == "micro_batch_size")
    if not study.is_law:
        assert set(study.runs["arm"]) == {f"{key}=1", f"{key}=3"}
        assert study.scales[0] == "model.d_model=32 budget.tokens=1e6"


def test_runs_of_a_law_are_alike_only_where_size_and_length_are(record):
    sizes(record, seeds=2, n=3)
    study = study_runs(record.runs / "sizes")
    assert study.is_law
    for arm_and_scale, runs in study.runs.groupby(["arm", "scale"]):
        assert set(runs["seed"]) == {0, 1}, arm_and_scale
        assert len(set(runs["tokens"])) == 1
    chart = curves_chart(load_curves(record.runs / "sizes"), study.runs, metric="loss", by_size=True)
    assert chart is not None
    validated = [series for series in chart.series if "val/loss" in series.values]
    assert len([series for series in validated if series.style == "line"]) == 3 * 5
    losses = study.runs.groupby(["params", "tokens"])["loss"].mean()
    assert sorted(series.values["val/loss"][-1] for series in validated if series.style == "line") == (
        pytest.approx(sorted(np.asarray(losses)))
    )


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_seed_that_the_baseline_lacks_costs_no_other_arm_its_place(record, names):
    """Whichever of the two lost runs is listed first."""
    arms(record, seeds=3)
    for arm, name in zip(("llama", "alibi"), names, strict=True):
        (record.runs / f"parts/{arm}-2-1e+07").rename(record.runs / "parts" / name)
        (record.runs / "parts" / name / "summary.json").unlink()
    runs, cautions = pairable_runs(study_runs(record.runs / "parts"), "llama")
    assert {(arm, seed) for arm, seed in zip(runs["arm"], runs["seed"], strict=True)} == {
        (arm, seed) for arm in ("llama", "alibi", "gelu") for seed in (0, 1)
    }
    assert list(map(sentence, cautions)) == ["seed 2 is not compared: the run of llama is not finished"]


def test_a_run_that_goes_on_with_another_setting_is_another_arm(record):
    for attn in ("mha", "gqa"):
        for seed in (0, 1):
            record("grid", f"{attn}-{seed}", [f"attn={attn}", f"seed={seed}"], loss=3.0, seed=seed)
    record("grid", "going", ["attn=gqa", "seed=1", "qk_norm=on"], loss=3.0, seed=1, finished=False)
    study = study_runs(record.runs / "grid")
    assert study.recorded.to_dict("index")["going"]["arm"] == "attn=gqa qk_norm=on"
    assert set(study.runs["arm"]) == {"attn=mha", "attn=gqa"}
    partial, _ = recorded_runs(record.runs / "grid")
    assert list(partial["arm"]) == list(study.recorded["arm"])


def test_sizes_typed_after_an_arms_name_are_scales(record):
    """As `-m arm=gqa attn=gqa model.n_layers=2,4 seed=0,1` leaves them, a command an arm."""
    for arm in ("mha", "gqa"):
        for layers in (2, 4):
            for seed in (0, 1):
                overrides = [f"arm={arm}", f"attn={arm}", f"model.n_layers={layers}", f"seed={seed}"]
                name = f"{arm}-{layers}-{seed}"
                loss = 3 - 0.1 * layers + 0.01 * seed * (arm == "gqa")
                record("typed", name, overrides, loss=loss, params=layers * 1e6, seed=seed, arm=arm)
    study = study_runs(record.runs / "typed")
    assert study.scales == ["model.n_layers=2", "model.n_layers=4"]
    assert grouping(study) == ["config.arm", "config.model.n_layers"]
    found = compared(record, study="typed", baseline="mha")
    assert list(found.arms["scale"]) == [scale for scale in study.scales for _ in range(2)]


OF_A_SIZE = {
    "E": LAW["E"] + LAW["A"] / 1e6 ** LAW["alpha"],
    "B": LAW["B"] * 6e6 ** LAW["beta"],
    "beta": LAW["beta"],
}
"""The law of the baseline of `arms` against C = 6ND, N its million parameters."""


def compared(record, *, study="parts", shift=0.0, **changed):
    """Arms against llama, with the law of its baseline, all of its losses off by `shift`."""
    c = np.geomspace(1e12, 1e17, 20)
    loss = shift + OF_A_SIZE["E"] + OF_A_SIZE["B"] / c ** OF_A_SIZE["beta"]
    loss *= np.exp(0.002 * np.random.default_rng(0).standard_normal(20))
    law = fit(saturating("C"), {"C": c}, loss, resamples=200)
    settings: dict[str, Any] = {
        "baseline": "llama",
        "metric": "loss",
        "precision": 0.002,
        "level": 0.95,
        "resamples": 200,
        "law": law,
        **changed,
    }
    return compare_arms(study_runs(record.runs / study), seed=0, **settings)


def test_an_arm_of_more_tokens_is_said(record):
    """The same steps at twice the batch are twice the tokens, and twice the FLOPs."""
    for seed in range(3):
        for arm, batch in {"llama": 32, "large": 64, "ragged": 32.1}.items():
            overrides = [f"seed={seed}", f"arm={arm}", f"batch_size={batch}"]
            tokens, loss = batch * 1e5, 3 - batch / 640 + 0.01 * seed + 1e-4 * seed * batch
            record("batches", f"{arm}-{seed}", overrides, loss=loss, tokens=tokens, seed=seed, arm=arm)
    found = compared(record, study="batches", law=None)
    assert list(rows_where(found.arms, arm="large")["flops_off"]) == [1]
    (said,) = map(sentence, found.cautions)
    assert said == "large trains on 100.0% more tokens than llama, and its difference is of these too"


@pytest.mark.parametrize(("shift", "is_off"), [(0.0, False), (-1.0, True), (0.2, True)])
def test_a_baseline_that_is_not_on_the_law_is_said(record, shift, is_off):
    arms(record, scales=(1e7, 1e9))
    found = compared(record, shift=shift)
    said = [text for text in map(sentence, found.cautions) if "the law says" in text]
    assert len(said) == (2 if is_off else 0)
    if is_off:
        own = rows_where(found.arms, arm="llama")["loss"].iloc[-1]
        assert f"at budget.tokens=1e+09 the baseline comes to {own:.4f} where the law says" in said[1]


def test_gains_far_beyond_the_runs_of_the_law_are_said(record):
    """Its largest run took 10¹⁷ FLOPs."""
    arms(record, shifts=(("llama", 0.0), ("far", -0.9), ("gelu", 0.05)), scales=(1e7, 1e9))
    found = compared(record)
    gains = found.gains_table
    assert gains is not None
    largest = rows_where(gains, scale="budget.tokens=1e+09").to_dict("records")
    needed = {row["arm"]: row["FLOPs"] * row["gain"] / 1e17 for row in largest}
    assert list(gains["beyond"].tail(2)) == pytest.approx(list(needed.values()))
    assert needed["far"] > 2
    (said,) = (text for text in map(sentence, found.cautions) if "largest run" in text)
    assert f"of 1e+17 FLOPs (far {needed['far']:.2g} times as far)" in said


def test_gains_that_have_no_end_are_named(record):
    """At 10⁹ tokens the law leaves 0.98 to gain: a difference of 1.2 is beyond it, one of 0.97 not surely
    within."""
    scales = (1e7, 1e8, 1e9)
    shifts = (("llama", 0.0), ("far", -1.2), ("near", -0.97), ("gelu", 0.05), ("out", -6.0))
    arms(record, shifts=shifts, scales=scales)
    found = compared(record)
    chart = gain_chart(found, {name: i for i, name in enumerate(found.order)})
    assert chart is not None
    note = chart.note
    at = "budget.tokens=1e+09"
    assert f"far at {at} (no compute reaches its loss)" in note
    assert f"near at {at} (its interval has no upper end)" in note
    assert "gelu" not in note
    lines = {line.partition(":")[0]: line for line in map(trend_line, found.trends)}
    assert lines["far"].endswith(f"; without {at}, where no compute reaches its loss")
    assert "without" not in lines["gelu"]
    assert lines["out"].endswith(f"no compute reaches its loss at {', '.join(found.arms['scale'].unique())}")


def test_trends_are_corrected_for_their_number(record):
    shifts = (("llama", 0.0), ("a", -0.1), ("b", 0.05), ("c", 0.001))
    arms(record, shifts=shifts, scales=(1e7, 1e8))
    found = compared(record)
    alone = {
        arm: float(re.findall(r"p ([\d.e-]+)", trend_line(compared_alone(record, arm).trends[0]))[0])
        for arm in "abc"
    }
    for line, p in zip(sorted(map(trend_line, found.trends)), holm(list(alone.values())), strict=True):
        assert float(re.findall(r"p ([\d.e-]+) by Holm over 3 arms", line)[0]) == pytest.approx(p, rel=0.02)


def compared_alone(record, arm):
    """Without the others' records."""
    study, parts = f"only-{arm}", record.runs / "parts"
    for path in parts.iterdir():
        if path.name.startswith(("llama", f"{arm}-")):
            shutil.copytree(path, record.runs / study / path.name)
    return compared(record, study=study)


def test_the_largest_scale_speaks_for_the_study(record):
    """Its noise in the headline, its order of arms; colours go by that order, the baseline's first."""
    for scale, losses in {1e7: (3.0, 3.1, 2.9), 1e8: (2.5, 2.3, 2.6)}.items():
        for arm, loss in zip(("llama", "alibi", "gelu"), losses, strict=True):
            for seed in (0, 1, 2):
                overrides = [f"budget.tokens={scale:g}", f"seed={seed}", f"arm={arm}"]
                noise = 0.02 * seed * (scale / 1e7)
                name = f"{arm}-{seed}-{scale:g}"
                record("parts", name, overrides, loss=loss + noise, tokens=scale, seed=seed, arm=arm)
    found = compared(record)
    assert found.order == ["llama", "alibi", "gelu"]
    assert f"noise {np.std([0, 0.2, 0.4], ddof=1):.4f} between seeds" in headline(found)
    assert list(rows_by_arm(found)) == ["alibi", "gelu"]


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
        (arms, ("study=nothing",), "nothing is not a directory of a study"),
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
