"""The page of a report: what is on it against what was planted, and what there is where no answer can be
given."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from planted import LAW, arms, loss_of, sizes

from scantling.analysis.ablation import first
from scantling.analysis.arms import MOST_ARMS
from scantling.report.curve_charts import LINES, POINTS, curves_chart, thinned
from scantling.report.records import differing_settings, train_command
from scantling.runs.table import load_curves, load_runs


def charts_of(page):
    found = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    titles = re.findall(r'<div class="card chart"><h3>(.*?)</h3>', page)
    return dict(zip(titles, map(json.loads, found), strict=True))


@pytest.fixture
def page(tmp_path):
    return lambda name: next((tmp_path / "runs" / "reports").rglob(f"{name}/report.html")).read_text()


def test_the_answer_comes_first_and_with_its_interval(record, report, page, tmp_path):
    arms(record)
    assert report("study=parts", "baseline=llama")[0] == 0
    table = pd.read_csv(tmp_path / "runs/reports/parts/arms.csv").set_index("arm").loc["alibi"]
    shown = page("parts")
    answer = re.findall(r'<p class="answer">(.*?)</p>', shown)[0]
    assert (
        f"Worse than llama: alibi by {table.difference:.4f} ({table.low:.4f} to {table.high:.4f})" in answer
    )
    assert "no difference from llama found: gelu by" in answer
    assert shown.index('class="answer"') < shown.index("<section")
    forest = charts_of(shown)["Difference from llama"]["series"]
    assert [series["values"]["arm"] for series in forest] == [["gelu"], ["alibi"]]
    assert [series["colour"] for series in forest] == ["c1", "c2"]
    assert forest[1]["low"]["difference"] == [pytest.approx(table.low, rel=1e-5)]
    curve = charts_of(shown)["Validation and training"]["series"][0]
    of_arm = load_runs(tmp_path / "runs/parts").query("arm == 'llama'")
    assert curve["group"] == "llama"
    assert curve["values"]["val/bpb"][-1] == pytest.approx(of_arm["bpb"].mean(), rel=1e-5)
    assert curve["high"]["val/loss"][-1] == pytest.approx(
        of_arm["loss"].mean() + 2 * of_arm["loss"].std() / np.sqrt(5), rel=1e-5
    )


def test_the_page_is_one_file_that_asks_for_nothing(record, report, page, tmp_path):
    arms(record)
    report("study=parts", "baseline=llama")
    shown = page("parts")
    without_plotly = re.sub(r"<script>(?!\s*\"use strict\").*?</script>", "", shown, flags=re.DOTALL)
    assert len(without_plotly) < 200_000 < len(shown) < 6_000_000
    assert shown.count("plotly.js v") == 1
    assert not re.search(r'(src|href)="(https?:)?//', without_plotly)
    links = re.findall(r'<td class="word"><a href="(.*?)"', without_plotly)
    assert len(links) == 15
    assert all((tmp_path / "runs/reports/parts" / link / "config.yaml").exists() for link in links)


def test_what_runs_say_is_no_code(record, report, page, tmp_path):
    evil = "</script><script>alert(1)</script>"
    for name, arm in (("a", evil), ("b", "b")):
        for seed in (0, 1):
            overrides = [f"seed={seed}", f"arm={arm}"]
            record("parts", f"{name}{seed}", overrides, loss=3 + 0.1 * seed, seed=seed, arm=arm)
    directory = tmp_path / "runs" / "parts" / "a0"
    (directory / "samples.jsonl").write_text(
        json.dumps({"step": 1, "text": f"<img src=x onerror=alert(2)>{evil}"})
    )
    metric = "<img src=x onerror=alert(3)>"
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 2, metric: 3.0}))
    assert report("run=a0")[0] == 0
    (axis,) = charts_of(page("a0"))["Also recorded"]["y"]
    assert axis["title"] == axis["short"] == "&lt;img src=x onerror=alert(3)&gt;"  # as plotly reads it
    assert report("study=parts", "baseline=b")[0] == 0
    shown = page("parts")
    assert "alert(1)" in shown
    assert evil not in shown
    assert "<img" not in re.sub(r"<script>.*?</script>", "", shown, flags=re.DOTALL)


def test_a_run_without_a_size_or_a_finite_loss_is_drawn(record, report, page):
    sizes(record)
    overrides = ["budget.tokens=1e9", "seed=0", "arm=d9", "model.d_model=9"]
    record("sizes", "late", overrides, loss=np.inf, arm="d9", finished=False)
    assert report("study=sizes", "gate.held_out=0")[0] == 0
    chart = charts_of(page("sizes"))["Validation and training"]
    colours = {series["group"]: series["colour"] for series in chart["series"]}
    assert (colours["d9"], colours["d0"], colours["d5"]) == (None, "s0", "s1")
    low, high = chart["y"][0]["range"]
    assert 0 < low < high < loss_of(1e5, 1e6)
    (late,) = (series for series in chart["series"] if series["group"] == "d9")
    assert late["values"]["val/loss"] == [None, None]
    assert report("run=late")[0] == 0
    assert charts_of(page("late"))["Validation and training"]["y"][0]["range"] is None


def test_a_failed_run_takes_its_arm_out_and_the_others_stay(record, report, page, tmp_path):
    arms(record)
    lost = tmp_path / "runs/parts/alibi-3-1e+07"
    (lost / "summary.json").unlink()
    (lost / "failed.json").write_text(json.dumps({"reason": "no [/data/corpus.txt]"}))
    assert "failed: no [/data/corpus.txt]" in report(f"run={lost.name}")[1]
    (lost / "failed.json").write_text(json.dumps({"reason": "loss is not finite <at> step 7"}))
    metrics = (lost / "metrics.jsonl").read_text().splitlines(keepends=True)
    (lost / "metrics.jsonl").write_text(metrics[0])
    code, out, _ = report("study=parts", "baseline=llama")
    assert code == 0
    assert "arm alibi is not compared: its seed 3 failed" in out
    assert "of 1 comparison with llama" in out
    shown = page("parts")
    assert "alibi-3-1e+07 (alibi, seed 3) failed: loss is not finite &lt;at&gt; step 7" in shown
    lines = charts_of(shown)["Validation and training"]["series"]
    (mean,) = (line for line in lines if line["group"] == "alibi" and line["style"] == "line")
    assert len(mean["values"]["tokens"]) == 2, "the mean of the others goes on where it ended"
    (thin,) = (line for line in lines if line["hover"] == "alibi, seed 3")
    assert len(thin["values"]["tokens"]) == 1


def test_before_anything_is_validated_the_training_loss_is_drawn(record, report, page, tmp_path):
    record("early", "begun", ["seed=0"], loss=3.0, finished=False)
    rows = [{"step": step, "tokens": 10 * step, "train/loss": 5.0 - step} for step in (1, 2)]
    (tmp_path / "runs/early/begun/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, out, _ = report("run=begun")
    assert code == 0
    assert "Nothing was validated yet" in out
    chart = charts_of(page("begun"))["Validation and training"]
    assert [axis["key"] for axis in chart["y"]] == ["train/loss"]
    assert chart["series"][0]["values"]["train/loss"] == [4.0, 3.0]


def test_rates_tried_are_a_line_an_arm_and_scale(record, report, page, tmp_path):
    arms(record, seeds=3, scales=(1e7, 1e8))
    note = {"lr": [5e-4, 1e-3], "bpb": [1.2, 1.1], "edge": True}
    for run in (tmp_path / "runs/parts").iterdir():
        config = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"tuned": note}))
    assert report("study=parts", "baseline=llama")[0] == 0
    lines = [s for s in charts_of(page("parts"))["Learning rates tried"]["series"] if s["style"] == "line"]
    assert sorted(line["hover"] for line in lines) == sorted(
        f"{arm}, budget.tokens={tokens}"
        for arm in ("llama", "alibi", "gelu")
        for tokens in ("1e+07", "1e+08")
    )
    assert all(line["values"]["lr"] == [5e-4, 1e-3] for line in lines)
    assert "the tries of tune=lr apart" in page("parts")


def test_every_table_is_a_csv_too(record, report, tmp_path):
    losses = arms(record, seeds=30)
    assert report("study=parts", "baseline=llama")[0] == 0
    tables = tmp_path / "runs/reports/parts/tables"
    runs = pd.read_csv(tables / "all-90-runs.csv")
    assert runs["nats per token"].tolist() == pytest.approx(
        [losses[None, arm, seed] for arm, seed in zip(runs["arm"], runs["seed"], strict=True)], abs=1e-4
    )
    assert (tables / "arms-against-llama-95-intervals.csv").exists()
    assert report("study=parts", "baseline=gelu")[0] == 0
    assert not (tables / "arms-against-llama-95-intervals.csv").exists()


def test_a_run_that_the_baseline_lacks_takes_its_seed_out(record, report, tmp_path):
    arms(record)
    (tmp_path / "runs/parts/llama-3-1e+07/summary.json").unlink()
    code, out, _ = report("study=parts", "baseline=llama")
    assert code == 0
    assert "seed 3 is not compared: the run of llama is not finished" in out
    assert set(pd.read_csv(tmp_path / "runs/reports/parts/arms.csv")["seeds"]) == {4}


def one_seed(record):
    arms(record, seeds=1)


def one_arm(record):
    arms(record, shifts=(("llama", 0.0),))


def none_finished(record):
    record("parts", "late", ["seed=0", "arm=llama"], loss=3.0, arm="llama", finished=False)


def unpaired(record):
    arms(record)
    record("parts", "alone", ["seed=7", "arm=llama"], loss=3.0, seed=7, arm="llama")


def mid_sweep(record):
    for arm, seed, finished in (
        ("llama", 0, True),
        ("llama", 1, True),
        ("alibi", 0, True),
        ("alibi", 1, False),
    ):
        overrides = [f"seed={seed}", f"arm={arm}"]
        record("parts", f"{arm}-{seed}", overrides, loss=3.0 + seed, seed=seed, arm=arm, finished=finished)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (mid_sweep, "nothing to compare yet: arm alibi is not compared: its seed 1 is not finished"),
        (one_seed, "one seed only"),
        (one_arm, "no other arm has a finished run"),
        (none_finished, "holds no finished run"),
        (unpaired, "seeds are unpaired"),
    ],
)
def test_without_an_answer_there_is_a_page_of_what_there_is(record, report, page, tmp_path, prepare, message):
    earlier = tmp_path / "runs" / "reports" / "parts"
    earlier.mkdir(parents=True)
    for name in ("report.html", "mine.csv"):
        (earlier / name).touch()
    prepare(record)
    code, _, err = report("study=parts", "baseline=llama")
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert "runs/reports/parts/report.html" in err
    shown = page("parts")
    assert re.search(rf'<p class="answer">No answer yet: .*{message}', shown)
    assert "Validation and training" in charts_of(shown)
    assert sorted(file.name for file in earlier.iterdir()) == [
        "mine.csv",
        "report.html",
        "report.md",
        "tables",
    ]


def test_runs_of_a_study_without_an_answer_are_averaged_over_seeds_alone(record, report, page):
    """An arm of several sizes, or of several rates, has a curve for each; and says its size where it has come
    to one."""
    for arm, layers, lr, seeds in (("x", 2, 1, 2), ("x", 4, 1, 2), ("x", 4, 3, 2), ("y", 2, 1, 1)):
        for seed in range(seeds):
            overrides = [
                f"model.n_layers={layers}",
                f"lr={lr}e-3",
                f"seed={seed}",
                f"arm={arm}",
                f"attn={arm}",
            ]
            name, loss = f"{arm}-{layers}-{lr}-{seed}", layers + lr / 10 + seed / 100
            record("parts", name, overrides, loss=loss, arm=arm, seed=seed, finished=(layers, lr) == (2, 1))
    assert "seeds are unpaired" in report("study=parts", "baseline=x")[2]
    series = charts_of(page("parts"))["Validation and training"]["series"]
    ends = {s["hover"]: s["values"]["val/loss"][-1] for s in series if s["style"] == "line"}
    assert ends == {
        "x, model.n_layers=2 lr=1e-3": pytest.approx(2.105),
        "x, model.n_layers=4 lr=1e-3": pytest.approx(4.105),
        "x, model.n_layers=4 lr=3e-3": pytest.approx(4.305),
        "y, model.n_layers=2 lr=1e-3": pytest.approx(2.1),
    }


def test_a_mistyped_baseline_leaves_the_page_alone(record, report, page):
    arms(record)
    report("study=parts", "baseline=llama")
    before = page("parts")
    assert report("study=parts", "baseline=gpt")[0] == 2
    assert page("parts") == before


@pytest.mark.parametrize(
    ("prepare", "overrides", "message"),
    [
        (lambda record: None, (), "name the arm that others are compared with"),
        (lambda record: None, ("baseline=llama", "law=nothing"), "nothing is not a directory of a study"),
        (
            lambda record: record("parts", "alone", ["seed=7", "arm=llama"], loss=3.0, seed=7, arm="llama"),
            ("baseline=llama",),
            "seeds are unpaired",
        ),
    ],
)
def test_an_answer_stays_where_there_is_no_new_one(record, report, tmp_path, prepare, overrides, message):
    """With its figures and tables, to the byte."""
    arms(record)
    assert report("study=parts", "baseline=llama")[0] == 0
    files = [path for path in (tmp_path / "runs/reports/parts").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert {"report.html", "arms.csv", "arms.png", "arms.svg"} <= {path.name for path in files}
    prepare(record)
    code, _, err = report("study=parts", *overrides)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err
    assert err.endswith("runs/reports/parts/report.html stays as it was\n")
    assert {path: path.read_bytes() for path in files} == before


def test_mixed_devices_are_warned_of(record, report, page, tmp_path):
    arms(record, seeds=2)
    for i, directory in enumerate(sorted((tmp_path / "runs/parts").iterdir())):
        path = directory / "env.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "GPU" if i else "CPU"}))
    report("study=parts", "baseline=llama")
    assert "mixed devices: GPU (5 runs), CPU (1 run)" in re.findall(r"cautions.*?</ul>", page("parts"))[0]


def test_what_a_launcher_found_for_an_arm_is_no_part_of_its_name(record, report, tmp_path):
    for attn, rate in (("mha", 1e-3), ("gqa", 2e-3)):
        for seed in (0, 1):
            overrides = [f"attn={attn}", f"seed={seed}", f"lr={rate}", "tuned={lr:[1e-3,2e-3]}", "tune=lr"]
            overrides += [f"model.d_ff={int(rate * 1e5)}", "matched={by:params}"]
            record("tuned", f"{attn}{seed}", overrides, loss=3 + rate + 0.01 * seed, seed=seed, lr=rate)
    code, _, err = report("study=tuned", "baseline=attn=mha")
    assert (code, err) == (0, "")
    assert list(pd.read_csv(tmp_path / "runs/reports/tuned/arms.csv")["arm"]) == ["attn=mha", "attn=gqa"]


def test_a_run_is_called_by_all_that_makes_it_another(record, tmp_path):
    """But for its seed; what the launcher found for an arm goes with the arm."""
    for name, typed in (
        ("a", ["attn=gqa", "seed=0"]),
        ("b", ["attn=gqa", "trainer.precision=fp32"]),
        ("c", ["lr=2e-3", "tuned={lr:[1e-3,2e-3]}"]),
    ):
        record("grid", name, typed, loss=3.0)
    names = ["attn=gqa", "attn=gqa trainer.precision=fp32", "default"]
    assert list(load_runs(tmp_path / "runs/grid")["arm"]) == names


@pytest.mark.slow
def test_a_law_has_its_valleys_and_what_was_held_out(record, report, page):
    rng = np.random.default_rng(0)
    for compute in (1e13, 1e14, 1e15, 1e16):
        best = 0.3 * np.sqrt(compute / 6)
        for i, n in enumerate(best * np.geomspace(0.3, 3, 5)):
            d = compute / 6 / n
            overrides = [f"budget.flops={compute:g}", "seed=0", f"arm=d{i}", f"model.d_model={i}"]
            loss = loss_of(n, d) * np.exp(0.001 * rng.standard_normal())
            record("law", f"{compute:g}-{i}", overrides, loss=loss, params=n, tokens=d, arm=f"d{i}")
    code, _, err = report("study=law")
    assert (code, err) == (0, "")
    shown = charts_of(page("law"))
    assert len({series["group"] for series in shown["IsoFLOP valleys"]["series"]}) == 4
    assert "Loss by size and tokens" not in shown  # of twenty sizes, a run each
    held_out = shown["Held out: 5 runs above 1e+15 FLOPs, predicted from 15"]["series"][1]
    assert held_out["values"]["predicted"] == pytest.approx(held_out["values"]["loss"], rel=0.02)
    exponents = shown["How the exponent depends on the way of finding it"]["series"]
    planted = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    assert {series["group"]: len(series["values"]["a"]) for series in exponents}["without a budget"] == 4
    assert exponents[0]["low"]["a"][0] < planted < exponents[0]["high"]["a"][0]


@pytest.mark.slow
def test_a_law_of_few_sizes_has_a_line_for_each(record, report, page, tmp_path):
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1e5, 1e6, 5)
    for compute in (1e13, 1e14, 1e15, 1e16):
        for i, n in enumerate(sizes):
            d = compute / 6 / n
            overrides = [f"budget.flops={compute:g}", "seed=0", f"arm=d{i}", f"model.d_model={i}"]
            loss = loss_of(n, d) * np.exp(1e-4 * rng.standard_normal())
            record("law", f"{compute:g}-{i}", overrides, loss=loss, params=n, tokens=d, arm=f"d{i}")
    assert report("study=law")[0] == 0
    shown = charts_of(page("law"))
    for name in ("Frontier", "Residuals"):  # whose points have colours of one scale
        assert shown[name]["scale"] == ["parameters", "100 k", "1.00 M"]
    series = shown["Loss by size and tokens"]["series"]
    assert [one["style"] for one in series] == 5 * ["points", "line"]
    for n, points, line in zip(sizes, series[::2], series[1::2], strict=True):
        assert len(points["values"]["D"]) == 4
        tokens = np.array(line["values"]["D"])
        assert line["values"]["loss"] == pytest.approx(loss_of(n, tokens).tolist(), rel=0.01)
    for name in ("grid.png", "grid.svg"):
        assert (tmp_path / "runs" / "reports" / "law" / name).exists()


def test_an_arm_has_one_colour_in_all_charts(record, report, page, tmp_path):
    arms(
        record,
        seeds=2,
        shifts=(("llama", 0.0), ("alibi", 0.02), ("gelu", -0.01)),
        scales=(1e7, 1e8, 1e9, 1e10),
    )
    read = [
        {"run": f"pos={arm} seed=0", "directory": f"{arm}-0-1e+07"}
        | {"sliding": False, "length": 64, "trained_at": 64, "loss": 3.0, "bpb": 1.0}
        for arm in ("gelu", "llama", "another")
    ]
    (tmp_path / "runs/parts/lengths.json").write_text(json.dumps(read))
    assert report("study=parts", "baseline=llama")[0] == 0
    assert (tmp_path / "runs/reports/parts/gains.png").read_bytes()[:4] == b"\x89PNG"
    shown = charts_of(page("parts"))
    expected = {"llama": "c0", "gelu": "c1", "alibi": "c2", "pos=another": "c3"}
    for title in (
        "Validation and training",
        "Difference from llama over scale",
        "Compute-equivalent gain",
        "Loss by length of context",
    ):
        colours = {series["group"]: series["colour"] for series in shown[title]["series"]}
        assert len(colours) > 1
        assert colours.items() <= expected.items(), title
    style = page("parts").partition("</style>")[0]
    for figure, drawn in (("arms", {"llama", "gelu", "alibi"}), ("gains", {"gelu", "alibi"})):
        svg = (tmp_path / f"runs/reports/parts/{figure}.svg").read_text().partition('id="legend_1"')[2]
        named = re.findall(r"stroke: (#[0-9a-f]{6})(?:(?!stroke: #).)*?<!-- (\w+) -->", svg, re.DOTALL)
        assert {arm for _, arm in named} == drawn
        for light, arm in named:
            assert f"--{expected[arm]}: light-dark({light}, " in style, (figure, arm)


def test_one_run_and_any_runs(record, report, page, tmp_path, monkeypatch):
    arms(record, seeds=2)
    sizes(record, n=2)
    (tmp_path / "runs/parts/llama-0-1e+07/samples.jsonl").write_text(
        "".join(json.dumps({"step": step, "text": f"sample {step}"}) + "\n" for step in range(1, 41))
    )
    assert report("run=llama-0-1e+07")[0] == 0
    shown = page("llama-0-1e+07")
    captions = re.findall(r"<figcaption>step (\d+)</figcaption>", shown)
    assert (captions[0], captions[-1]) == ("1", "40")
    assert "2 arms" not in shown
    code, out, err = report("runs=[llama-0-1e+07,runs/sizes/0-0-0]")
    assert (code, err) == (0, "")
    lowest = min(
        float(json.loads((tmp_path / "runs" / run / "summary.json").read_text())["val/bpb"])
        for run in ("parts/llama-0-1e+07", "sizes/0-0-0")
    )
    assert f"The lowest of 2: {lowest:.4f} bits per byte" in out
    assert report("run=nothing")[2] == "error: nothing is not a run below runs/\n"
    assert "must be a list" in report("runs=llama-0-1e+07")[2]
    assert "give one of fit=FILE" in report("study=parts", "run=llama-0-1e+07")[2]
    assert report("run=[llama-0-1e+07,0-0-0]")[2] == (
        "error: run=[llama-0-1e+07,0-0-0] is one run's: several side by side are runs=[NAME,NAME]\n"
    )
    monkeypatch.chdir(tmp_path / "runs/sizes/0-0-0")
    assert report("run=.", f"paths.runs={tmp_path}/runs")[0] == 0
    assert (tmp_path / "runs/reports/sizes/0-0-0/report.html").exists()


def test_runs_side_by_side_are_never_one_curve(record, report, tmp_path):
    """Of other studies and of other sizes, whatever they are called; only seeds of one thing are averaged."""
    record("one", "same", ["seed=0"], loss=3.0)
    record("two", "same", ["seed=0"], loss=4.0)
    for name, layers, seed, loss in (("a", 2, 0, 5.0), ("b", 4, 0, 6.0), ("c", 4, 1, 6.5)):
        overrides = [f"seed={seed}", f"model.n_layers={layers}", "arm=x", "attn=mha"]
        record("named", name, overrides, loss=loss, arm="x", seed=seed)

    def curves(*names):
        code, out, _ = report(f"runs=[{','.join(names)}]")
        assert code == 0
        shown = Path(re.findall(r"(\S+/report\.html)", out)[0])
        series = charts_of(shown.read_text())["Validation and training"]["series"]
        lines = [s for s in series if s["style"] == "line"]
        return shown, {s["hover"]: (s["values"]["val/loss"][-1], bool(s["low"])) for s in lines}

    one, of_studies = curves("runs/one/same", "runs/two/same", str(tmp_path / "runs/one/same"))
    assert of_studies == {"one/default": (3.0, False), "two/default": (4.0, False)}
    other, of_sizes = curves("a", "b", "c")
    assert of_sizes == {"x, model.n_layers=2": (5.0, False), "x, model.n_layers=4": (6.25, True)}
    assert len({one, other, curves("a", "b", "runs/one/same")[0]}) == 3
    assert report("run=runs/one/same")[0] == report("run=runs/two/same")[0] == 0
    assert (tmp_path / "runs/reports/two/same/report.html").exists()


def test_watched_pages_ask_for_themselves_until_the_end(record, report, page, monkeypatch):
    none_finished(record)
    reloads = []

    def sleep(seconds):
        reloads.append(re.findall(r'http-equiv="refresh" content="(\d+)"', page("parts"))[0])
        if len(reloads) == 2:
            raise KeyboardInterrupt
        arms(record, seeds=2)
        (record("parts", "later", ["seed=9", "arm=x"], loss=3.0, seed=9, arm="x", finished=False))

    monkeypatch.setattr(time, "sleep", sleep)
    code, out, _ = report("study=parts", "baseline=llama", "watch=true", "watch_seconds=7")
    assert (code, reloads) == (0, ["7", "7"])
    assert "holds no finished run" in out
    assert "refresh" not in page("parts").partition("<script>")[0]
    assert "Worse than llama" in page("parts")


def test_many_runs_stay_small():
    n_arms, n_rows = 60, 3000
    steps = np.arange(1, n_rows + 1)
    runs = pd.DataFrame(
        {
            "run": [f"r{i}" for i in range(2 * n_arms)],
            "arm": [f"a{i // 2}" for i in range(2 * n_arms)],
            "scale": "",
            "status": "finished",
            "seed": [0, 1] * n_arms,
            "loss": np.arange(2.0 * n_arms),
            "bpb": 1.0,
            "params": 1e6,
        }
    )
    curves = pd.DataFrame(
        {
            "run": np.repeat(runs["run"], n_rows),
            "step": np.tile(steps, 2 * n_arms),
            "tokens": np.tile(10 * steps, 2 * n_arms),
            "flops": 1.0,
            "seconds": 1.0,
            "val/loss": 1.0,
            "val/bpb": 1.0,
        }
    )
    chart = curves_chart(curves, runs, metric="loss")
    assert len(runs) > LINES
    assert chart is not None
    assert [series.group for series in chart.series] == [f"a{i}" for i in range(MOST_ARMS)]
    assert sum(len(series.values["tokens"]) for series in chart.series) <= POINTS
    assert set(chart.series[0].values["tokens"]) <= set(10 * steps)
    assert (chart.series[0].values["tokens"][0], chart.series[0].values["tokens"][-1]) == (10, 10 * n_rows)
    assert list(thinned(np.arange(5), 10)) == [0, 1, 2, 3, 4]
    chart = curves_chart(curves, runs, metric="loss", baseline="a59")
    assert chart is not None
    assert [series.group for series in chart.series] == ["a59", *(f"a{i}" for i in range(MOST_ARMS - 1))]


@pytest.mark.parametrize("least", [2, 3, 17, 99_999, 100_000])
def test_the_least_number_is_found_without_trying_all(least):
    tried = []
    assert first(lambda n: bool(tried.append(n)) or n >= least, 100_000) == least
    assert len(tried) < 20
    assert first(lambda n: False, 100_000) is None


def test_curves_of_a_study_are_those_of_its_records(record, tmp_path):
    arms(record, seeds=2)
    runs = load_runs(tmp_path / "runs/parts").assign(scale="")
    chart = curves_chart(load_curves(tmp_path / "runs/parts"), runs, metric="bpb")
    assert chart is not None
    lines = [series for series in chart.series if series.style == "thin"]
    assert len(lines) == len(runs)
    ends = {series.hover: series.values["val/loss"][-1] for series in lines}
    for run in runs.to_dict("records"):
        assert ends[f"{run['arm']}, seed {run['seed']}"] == pytest.approx(run["loss"])


BLOCKS = {"hydra": {"sweeper": {"arms": {"pre": [], "post": [], "both": []}, "params": {"seed": "0,1"}}}}
OF_BLOCKS = [
    ["sweeps=blocks", f"seed={seed}", "model.n_layers=12", f"arm={arm}", f"block={arm}"]
    for arm in ("pre", "post")
    for seed in (0, 1)
]


@pytest.mark.parametrize(
    ("overrides", "sweep", "command"),
    [
        (OF_BLOCKS, BLOCKS, "python src/train.py -m sweeps=blocks model.n_layers=12 arm=pre,post"),
        (
            [*OF_BLOCKS, *([o.replace("post", "both") for o in job] for job in OF_BLOCKS[2:])],
            BLOCKS,
            "python src/train.py -m sweeps=blocks model.n_layers=12",
        ),
        (  # its yaml is gone, or has other arms now
            [["arm=a", "attn=mha"], ["arm=b", "pos=alibi"]],
            None,
            "python src/train.py arm=a attn=mha\npython src/train.py arm=b pos=alibi",
        ),
        (
            [["sweeps=blocks", "arm=old", "block=pre"], ["sweeps=blocks", "arm=pre", "block=post"]],
            BLOCKS,
            "python src/train.py sweeps=blocks arm=old block=pre hydra.mode=RUN\n"
            "python src/train.py sweeps=blocks arm=pre block=post hydra.mode=RUN",
        ),
        (  # commands of their own
            [["study=x", "lr=1"], ["study=x", "attn=gqa"]],
            None,
            "python src/train.py study=x lr=1\npython src/train.py study=x attn=gqa",
        ),
        (
            [[f"attn={attn}", f"seed={seed}"] for attn in ("mha", "gqa") for seed in (0, 1)],
            None,
            "python src/train.py -m attn=gqa,mha seed=0,1",
        ),
        (
            [[f"lr={i}", f"seed={i}"] for i in range(30)],
            None,
            "# 30 runs, no grid: env.json of each has what was typed for it",
        ),
    ],
)
def test_the_command_of_the_runs_is_one_that_makes_them(overrides, sweep, command):
    runs = pd.DataFrame({"overrides": ["\n".join(typed) for typed in overrides]})
    assert train_command(runs, sweep) == command


@pytest.mark.parametrize(("rates", "shown"), [((1e-3, 2e-3), ["lr"]), ((1e-3, 5e-3), ["lr", "optim.lr"])])
def test_a_rate_set_apart_is_a_setting_that_differs(record, tmp_path, rates, shown):
    for name, lr, of_optimiser in zip("ab", (1e-3, 2e-3), rates, strict=True):
        record("rates", name, ["seed=0"], loss=3.0, arm=name, lr=lr)
        path = tmp_path / "runs" / "rates" / name / "config.yaml"
        path.write_text(path.read_text() + f"optim: {{lr: {of_optimiser}}}\n")
    assert list(differing_settings(load_runs(tmp_path / "runs/rates"))["setting"]) == shown
