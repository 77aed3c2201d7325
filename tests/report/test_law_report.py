"""report.py fit=…: what it prints and writes against the fit itself, and one line for each mistake."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from scantling.analysis.scaling import fit_hoffmann
from scantling.report.law_words import optimum_as_read
from scantling.report.numbers import cell_text

LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


def runs(noise=0.002, n=40, seed=0):
    rng = np.random.default_rng(seed)
    params, tokens = 10 ** rng.uniform(7, 9, n), 10 ** rng.uniform(8.5, 10.5, n)
    loss = LAW["E"] + LAW["A"] / params ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]
    loss *= np.exp(noise * rng.standard_normal(n))
    return pd.DataFrame({"model size": params, "tokens": tokens, "flops": 6 * params * tokens, "loss": loss})


@pytest.fixture
def command(monkeypatch, entry, tmp_path):
    """Runs report.py on a table in this process -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(table, *overrides, columns=("n=model size", "d=tokens", "loss=loss")):
        table.to_csv("runs.csv", index=False)
        usual = ["fit=runs.csv", "resamples=200", *columns]
        given = {override.partition("=")[0] for override in overrides}
        kept = [o for o in usual if o.partition("=")[0] not in given]
        return entry("report", *kept, *overrides)

    return call


@pytest.mark.slow
def test_it_prints_and_writes_the_fit(command, tmp_path):
    table = runs()
    code, out, err = command(table, "gate.tolerance=0.05", "budgets=[1e22]")
    assert (code, err) == (0, "")
    expected = fit_hoffmann(table["model size"], table["tokens"], table["loss"], resamples=200)
    directory = tmp_path / "runs" / "reports" / "runs.csv"
    parameters = pd.read_csv(directory / "parameters.csv", index_col="parameter")
    for name, value in expected.parameters.items():
        assert parameters.value[name] == pytest.approx(value)
        assert (parameters.low[name], parameters.high[name]) == pytest.approx(expected.intervals[name])
        assert re.search(rf"^\s*{name}\s+{re.escape(f'{value:#.5g}')}\s", out, re.MULTILINE), name
    assert parameters.profile_low["A"] < expected.A < parameters.profile_high["A"]
    optimum = pd.read_csv(directory / "optimum.csv")
    assert optimum["C"].tolist() == [1e22]
    page = (directory / "report.md").read_text()
    assert "held-out gate passed" in page
    assert "held-out gate passed" in " ".join(out.split())
    assert f"{expected.alpha:#.5g}" in page
    assert (directory / "fit.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("floor", [1.8, 0.0])
def test_a_floor_far_below_the_runs_is_not_drawn(command, tmp_path, floor):
    """It would flatten all else to a line."""
    table = runs(noise=1e-6)
    command(table.assign(loss=table["loss"] - LAW["E"] + floor), "gate.tolerance=0.05")
    page = (tmp_path / "runs" / "reports" / "runs.csv" / "report.html").read_text()
    assert ('"E = ' in page) == (floor > 0)


@pytest.mark.slow
def test_flops_stand_in_for_tokens_and_a_failed_gate_is_on_every_page(command, tmp_path):
    table = runs()
    table.loc[table.flops > np.quantile(table.flops, 0.8) * 1.06, "loss"] *= 1.2
    code, out, _ = command(table, columns=("n=model size", "c=flops", "loss=loss"))
    assert code == 0
    assert "held-out gate FAILED" in " ".join(out.split())
    assert "held-out gate FAILED" in (tmp_path / "runs/reports/runs.csv/report.md").read_text()


@pytest.mark.slow
def test_conventions_are_compared_and_mixed_ones_warned_of(command):
    table = runs()
    table["without embeddings"] = table["model size"] ** 0.9
    table.loc[:9, "flops"] *= 2
    _, out, _ = command(table, "n=[model size,without embeddings]", "c=flops", "gate.held_out=0")
    assert "The same by counting convention" in out
    assert re.search(r"without embeddings\s+0\.3", out)
    assert "warning: mixed conventions: C/(6ND) runs from 1.00 to 2.00" in " ".join(out.split())
    assert "held-out gate" not in out


@pytest.mark.slow
def test_json_lines_are_read(command, tmp_path):
    table = runs()
    rows = [json.dumps(row) for row in table.to_dict("records")]
    (tmp_path / "runs.jsonl").write_text("\n".join(rows))
    code, out, _ = command(table, "fit=runs.jsonl", "gate.held_out=0", "to=there")
    assert code == 0
    assert "40 rows of runs.jsonl" in out
    assert (tmp_path / "there" / "report.md").exists()


def changed(column, row, value):
    table = runs().astype({column: object}) if isinstance(value, str) else runs()
    table.loc[row, column] = value
    return table


def mixed(name):
    return runs().assign(**{name: ["books"] * 37 + ["code"] * 3})


@pytest.mark.parametrize(
    ("table", "overrides", "message"),
    [
        (
            runs(n=5),
            (),
            "5 runs cannot determine the 5 parameters of .*: at least 6 are needed, 8 for intervals",
        ),
        (runs(n=7), (), "7 runs are too few for intervals of .*: at least 8 are needed"),
        (
            runs(n=9),
            (),
            "held-out gate: 7 runs are too few for intervals of .*: at least 8 .*; "
            "gate.held_out=0 does without",
        ),
        (runs().assign(flops=1e19), ("c=flops",), r"one budget only: all 40 rows have about 1e\+19 FLOPs"),
        (changed("loss", 3, np.nan), (), "column loss must be positive and finite: nan in row 4"),
        (changed("loss", 3, np.inf), (), "column loss must be positive and finite: inf in row 4"),
        (changed("loss", 3, "diverged"), (), "column loss must be positive and finite: diverged in row 4"),
        (changed("tokens", 0, -5), (), "column tokens must be positive and finite: -5.0 in row 1"),
        (runs(), ("irreducible=2.6",), r"loss is at or below the irreducible 2\.6 in rows? \d"),
        (pd.concat([runs(), runs().iloc[[6]]]), (), "the same N, D and loss stand in rows 7, 41"),
        (mixed("corpus"), (), "column corpus mixes books, code: .* others in rows 38, 39, 40"),
        (mixed("tokenizer"), (), "column tokenizer mixes books, code: .* others in rows 38, 39, 40"),
        (runs(), ("n=params",), "there is no column 'params': columns are model size, tokens, flops, loss"),
        (runs(), ("d=null",), r"tokens are not known: name their column with d=…"),
        (runs(), ("fit=none.csv",), r"no file none\.csv"),
        (runs(), ("fit=runs.xlsx",), r"runs\.xlsx is none of \.csv, \.tsv, \.jsonl"),
        (runs(), ("resamples=10",), "resamples=10 gives no interval"),
        (runs(), ("gate.held_out=1",), r"gate\.held_out=1 must be at least 0 and below 1"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(command, table, overrides, message):
    code, out, err = command(table, *overrides)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_a_table_too_small_for_the_gate_is_fitted_without_it(command):
    code, out, err = command(runs(n=8), "gate.held_out=0")
    assert (code, err) == (0, "")
    assert "8 rows of runs.csv" in out


@pytest.mark.slow
def test_what_is_left_out_is_named(command):
    table = runs()
    table.loc[[4, 30], "loss"] = [9.0, 8.0]
    _, out, _ = command(table, "drop_highest=2", "gate.held_out=0")
    assert "left out as asked, the 2 highest losses: rows 5, 31" in " ".join(out.split())
    assert "38 rows of runs.csv" in out
    _, out, _ = command(table, "drop_highest=1", "gate.held_out=0")
    assert "left out as asked, the 1 highest loss: row 5" in " ".join(out.split())


def test_digits_that_count_are_kept():
    """So that numbers of one column end in one place."""
    optimum = pd.DataFrame({"C": [1e15, 1e16], "N": [13e6, 13.2e6], "D": [2e8, 2.04e8], "loss": [3.1, 3.127]})
    read = optimum_as_read(optimum.assign(tokens_per_parameter=[13.0, 132.4]))
    assert list(read["parameters"]) == ["13.0 M", "13.2 M"]
    assert list(read["tokens"]) == ["200 M", "204 M"]
    assert list(read["tokens per parameter"]) == ["13.0", "132"]
    assert list(read["nats per token"]) == ["3.100", "3.127"]
    assert [cell_text(x) for x in (0.3688, 0.36296, 2202.04, 3.0, -0.0, 1e6)] == (
        ["0.36880", "0.36296", "2202.0", "3", "0", "1.000e+06"]
    )
