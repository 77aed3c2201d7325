"""Optima against SciPy's minimiser, gates against planted laws, approaches 1 and 2 against planted
exponents."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from scantling.analysis.allocation import (
    allocation_exponent,
    convention_table,
    frontier,
    held_out_gate,
    optimum_table,
)
from scantling.analysis.forms import HOFFMANN, KaplanSum
from scantling.analysis.isoflop import fit_envelope, fit_isoflop, parabola_bias
from scantling.analysis.law import ScalingLaw, find_law
from scantling.analysis.observations import observe
from scantling.analysis.scaling import fit
from scantling.report.law_charts import law_charts
from scantling.report.law_words import answer, gate_verdict, tables, without_table
from scantling.report.sentences import sentence

LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}
EXPONENT = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
HISTORIC = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
"""Hoffmann et al. 2022, equation 10."""


def loss_of(n, d, law=LAW):
    return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


def grid(budgets=(1e18, 1e19, 1e20, 1e21), sizes=9, width=0.6, off=0.0, law=LAW, k=6.0):
    """N, C and noiseless loss of an IsoFLOP grid around each budget's optimum, or `off` decades beside it; C
    = kND."""
    n, c = [], []
    for budget in budgets:
        optimum = minimise_by_scipy(budget, law, k)
        n += list(optimum * 10 ** (off + np.linspace(-width, width, sizes)))
        c += [budget] * sizes
    n, c = np.array(n), np.array(c)
    return n, c, loss_of(n, c / k / n, law)


def minimise_by_scipy(budget, law=LAW, k=6.0):
    best = minimize_scalar(
        lambda x: loss_of(np.exp(x), budget / k / np.exp(x), law),
        bounds=(5, 35),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return float(np.exp(best.x))


def fitted(noise=0.0, seed=0, resamples=0):
    n, c, loss = grid()
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    sizes = {"N": n, "D": c / 6 / n}
    return fit(HOFFMANN, sizes, loss, starts_SP=HOFFMANN.theta(LAW)[None], resamples=resamples)


def test_the_optimum_is_scipys():
    table = optimum_table(fitted(), [1e20, 3e23])
    for row in table.to_dict("records"):
        c = row["C"]
        n = minimise_by_scipy(c)
        assert row["N"] == pytest.approx(n, rel=1e-3)
        assert row["tokens_per_parameter"] == pytest.approx(c / 6 / n**2, rel=2e-3)
        assert row["loss"] == pytest.approx(loss_of(n, c / 6 / n), rel=1e-5)
        assert row["D"] * row["N"] * 6 == pytest.approx(c)


def test_chinchilla_at_gophers_budget():
    """Hoffmann et al. 2022, table A3, approach 3: 40.2 billion parameters at 5.76e23 FLOPs, by their printed
    parameters 0.46 for the exponent."""
    n, c, loss = grid(law=HISTORIC)
    at = fit(HOFFMANN, {"N": n, "D": c / 6 / n}, loss, starts_SP=HOFFMANN.theta(HISTORIC)[None])
    assert allocation_exponent(at)[0] == pytest.approx(0.46, abs=0.01)
    (row,) = optimum_table(at, [5.76e23]).to_dict("records")
    assert row["N"] == pytest.approx(40.2e9, rel=0.25)


def test_the_frontier_is_the_loss_at_the_optimum():
    law = fitted(noise=0.002, resamples=100)
    budgets = np.array([1e19, 1e22, 1e25])
    table = optimum_table(law, budgets.tolist())
    np.testing.assert_allclose(frontier(law).predict(C=budgets), table["loss"], rtol=1e-10)
    low, high = zip(*(frontier(law).interval_of(x) for x in frontier_samples(law, budgets)), strict=True)
    # Student's t has two degrees of freedom more for a law of three parameters.
    np.testing.assert_allclose(low, table["loss_low"], rtol=2e-5)
    np.testing.assert_allclose(high, table["loss_high"], rtol=2e-5)


def frontier_samples(law, budgets):
    line = frontier(law)
    assert line.resampled_SP is not None
    return np.exp(line.form.predictor({"C": budgets})(line.resampled_SP)[0]).T


def test_only_a_law_of_parameters_and_tokens_has_an_optimum():
    n = np.geomspace(1e7, 1e9, 8)
    other = fit(KaplanSum(("N",)), {"N": n}, (8.8e13 / n) ** 0.076)
    with pytest.raises(ValueError, match=r"needs a fit of L = E \+ A/N\^alpha"):
        optimum_table(other, [1e20])


def test_the_gate_passes_a_law_and_fails_one_that_bends():
    n, c, loss = grid()
    d = c / 6 / n
    gate = {"compute": c, "share": 0.25, "tolerance": 0.01}
    holds = held_out_gate(n, d, loss, **gate)
    assert holds.passed
    assert (holds.n_fitted, holds.n_held_out) == (27, 9)
    assert holds.cutoff in c
    assert holds.error < 1e-4
    bent = np.where(c > 5e20, loss * 1.05, loss)
    fails = held_out_gate(n, d, bent, **gate)
    assert not fails.passed
    assert fails.bias == pytest.approx(1 / 1.05 - 1, abs=1e-3)
    assert "held-out gate FAILED" in gate_verdict(fails)


def test_a_gate_needs_larger_budgets():
    n, c, loss = grid(budgets=(1e20,))
    with pytest.raises(ValueError, match="nothing larger is left to predict"):
        held_out_gate(n, c / 6 / n, loss, compute=c, share=0.2, tolerance=0.01)


def test_conventions_change_the_exponent_by_their_own_power():
    """Counting n' = n^0.8 for parameters multiplies alpha by 1/0.8 and leaves beta."""
    n, c, loss = grid()
    table = convention_table({"all": n, "power": n**0.8 * 30}, c / 6 / n, loss).set_index("convention")
    assert table.alpha["power"] == pytest.approx(LAW["alpha"] / 0.8, rel=1e-3)
    assert table.beta["power"] == pytest.approx(LAW["beta"], rel=1e-3)
    alpha = LAW["alpha"] / 0.8
    assert table.a["power"] == pytest.approx(LAW["beta"] / (alpha + LAW["beta"]), rel=1e-3)
    assert table.a["all"] == pytest.approx(EXPONENT, rel=1e-3)


@pytest.mark.parametrize("minimum", ["parabola", "akima"])
def test_isoflop_finds_the_planted_exponent(minimum):
    law = fit_isoflop(*grid(), minimum=minimum, resamples=100)
    assert law.exponent == pytest.approx(EXPONENT, abs=0.002)
    assert not law.warnings
    for budget, optimum in zip(law.budgets, law.optima, strict=True):
        assert optimum == pytest.approx(minimise_by_scipy(budget), rel=0.03)


def test_a_grid_that_drifts_off_the_optimum_biases_parabolas_and_warns():
    """Where alpha and beta differ, losses around an optimum are no parabola: noiseless, yet the exponent is
    off."""
    law = {"E": 2.1, "A": 210.0, "B": 5e6, "alpha": 0.3, "beta": 0.7}
    exponent = 0.7 / (0.3 + 0.7)
    drift = {1e18: -0.5, 1e19: -0.2, 1e20: 0.1, 1e21: 0.5}
    parts = [grid(budgets=(c,), width=0.9, off=off, law=law) for c, off in drift.items()]
    n, c, loss = (np.concatenate(column) for column in zip(*parts, strict=True))
    biased = fit_isoflop(n, c, loss, resamples=100, noise=0.002)
    off = biased.exponent - exponent
    assert abs(off) > 0.005
    groups = np.split(np.arange(36), 4)
    assert parabola_bias(np.log(n), np.log(c), np.log(loss), groups) == pytest.approx(off, abs=1e-3)
    assert sentence(biased.warnings[0]).startswith("parabola bias")
    assert f"miss its exponent by {off:+.3f}" in sentence(biased.warnings[0])
    splined = fit_isoflop(n, c, loss, minimum="akima", resamples=100, noise=0.002)
    assert splined.exponent == pytest.approx(exponent, abs=abs(off) / 3)


def test_minima_at_the_edge_and_few_budgets_are_said():
    law = fit_isoflop(*grid(budgets=(1e18, 1e19, 1e20), off=1.2), resamples=100)
    assert any("only 3 budgets" in sentence(warning) for warning in law.warnings)
    assert any(
        "edge of the grid of sizes at 1e+18, 1e+19, 1e+20 FLOPs" in sentence(warning)
        for warning in law.warnings
    )


def test_isoflop_refuses_what_it_cannot_see():
    n, c, loss = grid()
    with pytest.raises(ValueError, match="one budget only"):
        fit_isoflop(n[:9], c[:9], loss[:9])
    with pytest.raises(ValueError, match=r"the budget of 1e\+18 FLOPs has 3 sizes: four are the least"):
        fit_isoflop(np.delete(n, range(6)), np.delete(c, range(6)), np.delete(loss, range(6)))


def test_the_envelope_of_ideal_curves_has_the_planted_exponent():
    """Curves whose every point is as good as a run of that length: what approach 1 supposes."""
    n = np.repeat(np.geomspace(1e7, 1e10, 25), 80)
    d = np.tile(np.geomspace(1e8, 1e12, 80), 25)
    law = fit_envelope(n, n, d, loss_of(n, d), resamples=50)
    assert law.exponent == pytest.approx(EXPONENT, abs=0.01)
    assert "before the end of a schedule" in sentence(law.warnings[0])


def reported(n, d, c, loss, *, noise=1e-4, **changed) -> ScalingLaw:
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    table = pd.DataFrame({"N": n, "D": d, "C": c, "loss": loss}, index=range(1, len(n) + 1))
    columns = {"n": "N", "d": "D", "c": "C", "loss": "loss", "run": None, "unique": None, "same": ()}
    settings = {"source": "runs", "resamples": 100, "level": 0.95, "seed": 0, "held_out": 0.0}
    settings |= {"tolerance": 0.01, "budgets": None}
    return find_law(observe(table, **columns, drop_highest=0, irreducible=None), **settings | changed)


def test_measured_flops_are_divided_as_they_were_measured():
    """Where a parameter and token take 9 FLOPs: the optimum of C = 9ND, which approach 2 has without any such
    number."""
    n, c, loss = grid(k=9)
    report = reported(n, c / 9 / n, c, loss)
    expected = minimise_by_scipy(1e21, k=9)
    assert expected < 0.85 * minimise_by_scipy(1e21)
    assert report.optimum is not None
    optimum = report.optimum.set_index("C").to_dict("index")[1e21]
    assert optimum["N"] == pytest.approx(expected, rel=0.02)
    assert optimum["D"] == pytest.approx(1e21 / 9 / expected, rel=0.02)
    assert report.isoflop is not None
    assert report.isoflop.optima[-1] == pytest.approx(optimum["N"], rel=0.05)
    charts = {chart.title: chart.series for chart in law_charts(report)}
    at = 1e21 * np.array([0.9, 1.1])
    for title, line in {"Compute-optimal size": 1, "Frontier": 1}.items():
        values = charts[title][line].values
        drawn = np.exp(np.interp(np.log(at), np.log(values["C"]), np.log(values["N"])))
        np.testing.assert_allclose(drawn, [minimise_by_scipy(x, k=9) for x in at], rtol=0.02)
    assert any("C = 9ND" in title for title in tables(report))


def test_a_small_table_is_fitted_without_the_budgets_that_it_can_spare():
    """Eight rows in budgets of 3, 3, 1 and 1: without one of three, five are left for five parameters."""
    n = np.array([1e8, 2e8, 4e8, 2e8, 4e8, 8e8, 8e8, 1.6e9])
    c = np.array([1e18] * 3 + [1e19] * 3 + [1e20, 1e21])
    without = without_table(reported(n, c / 6 / n, c, loss_of(n, c / 6 / n)))
    assert without is not None
    assert list(without["without the runs of"]) == ["1e+20 FLOPs", "1e+21 FLOPs"]


@pytest.mark.slow
def test_the_answer_is_of_the_largest_budget_asked_for():
    n, c, loss = grid()
    assert answer(reported(n, c / 6 / n, c, loss)).startswith("At 1e+21 FLOPs")
    for budgets in ([1e18, 1e20], [1e20, 1e18]):
        assert answer(reported(n, c / 6 / n, c, loss, budgets=budgets)).startswith("At 1e+20 FLOPs")


def test_the_gate_has_the_level_and_the_resampling_of_the_fit():
    n, c, loss = grid(sizes=6)
    report = reported(n, c / 6 / n, c, loss, noise=0.002, held_out=0.25, level=0.8)
    losses = report.observations.runs["loss"]
    settings = {"compute": c, "share": 0.25, "tolerance": 0.01, "resamples": 100}
    expected = held_out_gate(n, c / 6 / n, losses, **settings, level=0.8, resampling="noise")
    assert report.gate is not None
    pd.testing.assert_frame_equal(report.gate.held_out, expected.held_out)
