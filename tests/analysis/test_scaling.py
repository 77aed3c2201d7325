"""Fits against published fits of published runs, planted laws, and SciPy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.stats import t

from scantling.analysis.forms import (
    HOFFMANN,
    KAPLAN,
    OVERTRAINING,
    KaplanSum,
    Repeated,
    critical_batch,
    minimum_compute,
    minimum_steps,
    saturating,
)
from scantling.analysis.huber import huber, minimise
from scantling.analysis.resampling import drawn_residuals, expanded_percentiles
from scantling.analysis.scaling import fit, fit_hoffmann, objective_scale, profile_interval, refit_hoffmann
from scantling.report.sentences import sentence

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


def published(name: str) -> Path:
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"published runs are not there: {path}")
    return path


@pytest.fixture(scope="module")
def chinchilla():
    """N, D and loss of 245 runs, read off a figure by Besiroglu et al. 2024, lowest loss first."""
    runs = pd.read_csv(published("epoch_chinchilla/svg_extracted_data.csv")).sort_values("loss")
    n, c, loss = (runs[name].to_numpy() for name in ("Model Size", "Training FLOP", "loss"))
    return n, c / (6 * n), loss


@pytest.fixture(scope="module")
def besiroglu(chinchilla):
    """The fit without the five highest losses, with Besiroglu's 4000 resamples."""
    return fit_hoffmann(*(column[:240] for column in chinchilla), resamples=4000)


def planted(form, parameters, noise=0.0, seed=0, n=60):
    """Sizes and losses of a law with noise in log loss."""
    rng = np.random.default_rng(seed)
    c, m = 10 ** rng.uniform(18, 22, n), 10 ** rng.uniform(0, 2.5, n)
    sizes = {"N": np.sqrt(c / 6 / m), "D": np.sqrt(c / 6 * m), "C": c, "M": m}
    sizes |= {"S": sizes["D"] / 5e5, "U": sizes["D"] / 10 ** rng.uniform(0, 1.5, n)}
    sizes = {letter: sizes[letter] for letter in form.inputs}
    prediction = form.predictor(sizes)(form.theta(parameters)[None])[0][0]
    return sizes, np.exp(prediction + noise * rng.standard_normal(n))


def test_besiroglus_optimum(besiroglu):
    assert besiroglu.objective == pytest.approx(0.00101827, abs=5e-9)
    assert besiroglu.alpha == pytest.approx(0.3473, abs=2e-4)
    assert besiroglu.beta == pytest.approx(0.3672, abs=2e-4)
    assert pytest.approx(1.8172, abs=2e-4) == besiroglu.E
    assert pytest.approx(477.8, rel=5e-3) == besiroglu.A
    assert pytest.approx(2143, rel=1e-2) == besiroglu.B


def test_besiroglus_standard_errors(besiroglu):
    assert besiroglu.standard_errors["alpha"] == pytest.approx(0.0154, rel=0.1)
    assert besiroglu.standard_errors["beta"] == pytest.approx(0.0206, rel=0.1)


def test_the_objective_at_besiroglus_published_point(chinchilla):
    """With the digits of the authors' notebook; those that the paper prints, A 482.01 and so on, give
    0.00101883."""
    n, d, loss = (column[:240] for column in chinchilla)
    logarithms = {"E": 0.5971119597824348, "A": 6.177955975826981, "B": 7.6427323622433505}
    exponents = {"alpha": 0.34781302903942635, "beta": 0.3658541172951044}
    point = {name: np.exp(value) for name, value in logarithms.items()} | exponents
    theta_SP = HOFFMANN.theta(point)[None]
    residuals = HOFFMANN.predictor({"N": n, "D": d})(theta_SP)[0] - np.log(loss)
    assert huber(residuals, 1e-3).sum() == pytest.approx(0.00101864475, abs=1e-11)


def test_all_245_rows_give_another_beta(chinchilla):
    assert refit_hoffmann(*chinchilla).beta == pytest.approx(0.453, abs=2e-3)


@pytest.mark.slow
def test_gemstones():
    runs = pd.read_json(published("gemstones/wandb_df_for_fitting_hot.jsonl"), lines=True)
    fitted = fit_hoffmann(runs["params_active_precise"], runs["tokens"], runs["final_loss"])
    assert fitted.alpha == pytest.approx(0.2929, abs=2e-4)
    assert fitted.beta == pytest.approx(0.7129, abs=2e-4)
    assert fitted.objective == pytest.approx(0.00198161, abs=5e-9)


def test_few_projected_starts_find_the_optimum_of_many(chinchilla, besiroglu):
    n, d, loss = (column[:240] for column in chinchilla)
    few = refit_hoffmann(n, d, loss)
    np.testing.assert_allclose(few.theta_P, besiroglu.theta_P, rtol=1e-5)


FORMS = [
    (HOFFMANN, LAW),
    (OVERTRAINING, {"E": 1.8, "a": 140.0, "b": 180.0, "eta": 0.18}),
    (saturating("D"), {"E": 2.0, "B": 400.0, "beta": 0.3}),
    (KAPLAN, {"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}),
    (KaplanSum(("N",)), {"N_c": 8.8e13, "alpha_N": 0.076}),
    (KaplanSum(("D",)), {"D_c": 5.4e13, "alpha_D": 0.095}),
    (KaplanSum(("C",)), {"C_c": 3.1e8 * 8.64e19, "alpha_C": 0.050}),
    (KaplanSum(("N", "S")), {"N_c": 6.5e13, "alpha_N": 0.077, "S_c": 2.1e3, "alpha_S": 0.76}),
    (Repeated(LAW), {"R_D": 15.4, "R_N": 5.3}),
]
"""Every form, with the constants of its paper where that gives any."""


@pytest.mark.parametrize(("form", "parameters"), FORMS, ids=lambda x: getattr(x, "formula", ""))
class TestEveryForm:
    def test_recovers_what_was_planted(self, form, parameters):
        fitted = fit(form, *planted(form, parameters))
        for name, value in parameters.items():
            assert fitted.parameters[name] == pytest.approx(value, rel=2e-3), name

    def test_its_jacobian_is_the_difference_quotient(self, form, parameters):
        sizes, _ = planted(form, parameters, n=7)
        predictor, theta = form.predictor(sizes), form.theta(parameters)
        _, jacobian = predictor(theta[None])
        for p in range(len(theta)):
            step = np.zeros_like(theta)
            step[p] = 1e-6
            ahead, behind = predictor((theta + step)[None])[0], predictor((theta - step)[None])[0]
            np.testing.assert_allclose(jacobian[0, p], (ahead - behind)[0] / 2e-6, rtol=1e-5, atol=1e-8)

    def test_theta_and_published_undo_each_other(self, form, parameters):
        back = form.published(form.theta(parameters)[None])
        assert {name: float(x[0]) for name, x in back.items()} == pytest.approx(parameters)


def test_formulas_of_papers():
    n, d = np.array([1e8, 1e9]), np.array([2e9, 1e10])
    at = {"N": n, "D": d}

    def loss(form, parameters, sizes):
        return np.exp(form.predictor(sizes)(form.theta(parameters)[None])[0][0])

    hoffmann = LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]
    np.testing.assert_allclose(loss(HOFFMANN, LAW, at), hoffmann)
    k = FORMS[3][1]
    kaplan = ((k["N_c"] / n) ** (k["alpha_N"] / k["alpha_D"]) + k["D_c"] / d) ** k["alpha_D"]
    np.testing.assert_allclose(loss(KAPLAN, k, at), kaplan)
    # Gadre's form is Hoffmann's with equal exponents and C = 6ND.
    same = LAW | {"beta": LAW["alpha"]}
    eta = LAW["alpha"] / 2
    gadre = {"E": LAW["E"], "a": LAW["A"] * 6**eta, "b": LAW["B"] * 6**eta, "eta": eta}
    over = loss(OVERTRAINING, gadre, {"C": 6 * n * d, "M": d / n})
    np.testing.assert_allclose(over, loss(HOFFMANN, same, at))


def test_data_that_are_never_repeated_are_not_discounted():
    n, d = (
        np.array([1e6]),
        np.array([2e9]),
    )  # fewer parameters than are optimal for these tokens: none in excess
    repeated, fresh = Repeated(LAW), HOFFMANN.predictor({"N": n, "D": d})(HOFFMANN.theta(LAW)[None])[0]
    theta = repeated.theta({"R_D": 15.4, "R_N": 5.3})[None]
    once = repeated.predictor({"N": n, "D": d, "U": d})(theta)[0]
    np.testing.assert_allclose(once, fresh)
    # Endless repetition is worth 1 + R_D times the fresh tokens (Muennighoff et al. 2023, section 6).
    endless = repeated.predictor({"N": n, "D": d * 1e6, "U": d})(theta)[0]
    worth = HOFFMANN.predictor({"N": n, "D": d * 16.4})(HOFFMANN.theta(LAW)[None])[0]
    np.testing.assert_allclose(endless, worth, rtol=1e-6)


def test_kaplans_batch_corrections():
    assert critical_batch(3.0) == pytest.approx(2e8 / 3 ** (1 / 0.21))
    critical = critical_batch(3.0)
    assert minimum_steps(1000.0, critical, 3.0) == pytest.approx(500)
    assert minimum_compute(1e20, critical, 3.0) == pytest.approx(5e19)
    assert minimum_steps(1000.0, 1e6 * critical, 3.0) == pytest.approx(1000, rel=1e-5)


def test_weighted_minima_are_scipys():
    sizes, loss = planted(HOFFMANN, LAW, noise=0.004)
    predictor, target = HOFFMANN.predictor(sizes), np.log(loss)
    weights_SN = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), 5).astype(float)
    start = HOFFMANN.theta(LAW)
    ours = minimise(predictor, target, np.repeat(start[None], 5, axis=0), delta=1e-3, weights_SN=weights_SN)
    centre = np.array([0, np.log(sizes["N"]).mean(), np.log(sizes["D"]).mean()])

    for weights, objective in zip(weights_SN, ours.objective_S, strict=True):

        def theirs(
            t, weights=weights
        ):  # exponents turn about the middle of the data, which SciPy needs to converge
            theta = np.array([t[0], t[1] + t[3] * centre[1], t[2] + t[4] * centre[2], t[3], t[4]])
            return 1e6 * (weights * huber(predictor(theta[None])[0][0] - target, 1e-3)).sum()

        t = np.array([start[0], start[1] - start[3] * centre[1], start[2] - start[4] * centre[2], *start[3:]])
        for _ in range(4):
            t = minimize(theirs, t, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9}).x
        assert objective <= theirs(t) / 1e6 * (1 + 1e-6)


def test_outliers_hardly_move_it():
    sizes, loss = planted(HOFFMANN, LAW, noise=0.001, n=100)
    loss[:8] *= 1.3
    fitted = refit_hoffmann(sizes["N"], sizes["D"], loss)
    assert fitted.alpha == pytest.approx(LAW["alpha"], abs=0.02)
    assert fitted.beta == pytest.approx(LAW["beta"], abs=0.02)


def test_profile_interval_ends_where_the_objective_has_risen_by_the_threshold():
    """Found by another optimiser: the constrained minimum at the end equals the allowed objective."""
    sizes, loss = planted(HOFFMANN, LAW, noise=0.004)
    fitted = refit_hoffmann(sizes["N"], sizes["D"], loss)
    low, high = profile_interval(fitted, "A")
    assert low < fitted.A < high
    allowed = fitted.objective + 0.5 * 4.016195 * objective_scale(fitted)  # F(1, 55) at 95 %
    predictor = HOFFMANN.predictor(sizes)
    for end in (low, high):
        shift = (np.log(end) - np.log(fitted.A)) / np.log(sizes["N"]).mean()

        def constrained(t, end=end, shift=shift):
            theta = np.array([t[0], np.log(end), t[1] + t[3] * 22, t[2] + shift, t[3]])
            return 1e6 * huber(predictor(theta[None])[0][0] - np.log(loss), 1e-3).sum()

        e, _, b, alpha, beta = fitted.theta_P
        t = np.array([e, b - beta * 22, alpha, beta])
        for _ in range(4):
            t = minimize(constrained, t, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9}).x
        assert constrained(t) / 1e6 == pytest.approx(allowed, rel=5e-3)


@pytest.fixture(scope="module")
def without_a_floor():
    """Runs of sizes so alike that E = 0 fits them best: N, D, loss."""
    rng = np.random.default_rng(1)
    n = 10 ** rng.uniform(8, 8.6, 30)
    d = n * 10 ** rng.uniform(0.5, 2.5, 30)
    clean = LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]
    return n, d, clean * np.exp(0.01 * rng.standard_normal(30))


@pytest.mark.parametrize("resampling", ["runs", "noise"])
def test_intervals_hold_the_truth_where_the_floor_is_lost(without_a_floor, resampling):
    """With E = 0 the loss does not depend on log E, and a descent from the best fit stays there."""
    fitted = refit_hoffmann(*without_a_floor, resamples=200, resampling=resampling)
    assert fitted.E < 1e-6
    assert sentence(fitted.warnings[0]).startswith("E = ")
    for name in ("E", "A", "alpha"):
        low, high = fitted.intervals[name]
        assert low < LAW[name] < high, name


def test_intervals_of_a_learning_curve_hold_the_truth_where_the_floor_is_lost():
    rng = np.random.default_rng(15)
    c = np.geomspace(1e15, 1e17, 12)
    loss = (2 + 400 / c**0.15) * np.exp(0.01 * rng.standard_normal(12))
    fitted = fit(saturating("C"), {"C": c}, loss, resamples=200)
    assert fitted.E < 1e-6
    for name, value in {"E": 2.0, "B": 400.0, "beta": 0.15}.items():
        low, high = fitted.intervals[name]
        assert low < value < high, name


@pytest.mark.slow
@pytest.mark.parametrize("parameter", ["E", "A"])
def test_profile_intervals_hold_the_truth_where_the_floor_is_lost(without_a_floor, parameter):
    """The lower end of E is none; the upper is where the constrained minimum, of all of the form's starts, is
    allowed."""
    fitted = refit_hoffmann(*without_a_floor)
    low, high = profile_interval(fitted, parameter)
    assert low < LAW[parameter] < high
    assert (low == 0) == (parameter == "E")
    at, free = HOFFMANN.parameters.index(parameter), HOFFMANN.predictor(fitted.sizes)
    starts_SP = HOFFMANN.projected_starts(fitted.sizes, fitted.loss)
    starts_SP[:, at] = np.log(high)

    def held(theta_SP):
        prediction, jacobian = free(theta_SP)
        jacobian[:, at] = 0
        return prediction, jacobian

    least = minimise(held, np.log(fitted.loss), starts_SP, delta=fitted.delta).objective_S.min()
    allowed = fitted.objective + 0.5 * 4.241699 * objective_scale(fitted)  # F(1, 25) at 95 %
    assert least == pytest.approx(allowed, rel=1e-3)


def test_rows_of_one_run_are_drawn_together():
    """Every row twice is no more evidence than once, when the bootstrap is told."""
    sizes, loss = planted(HOFFMANN, LAW, noise=0.004, n=40)
    twice = {letter: np.repeat(x, 2) for letter, x in sizes.items()}
    starts = HOFFMANN.theta(LAW)[None]
    once = fit(HOFFMANN, sizes, loss, resamples=400, starts_SP=starts)
    told = fit(
        HOFFMANN, twice, np.repeat(loss, 2), resamples=400, runs=np.repeat(range(40), 2), starts_SP=starts
    )
    untold = fit(HOFFMANN, twice, np.repeat(loss, 2), resamples=400, starts_SP=starts)
    assert told.standard_errors["alpha"] == pytest.approx(once.standard_errors["alpha"], rel=0.1)
    assert untold.standard_errors["alpha"] < 0.85 * once.standard_errors["alpha"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": float("nan")}, r"loss must be positive and finite: nan in row 3"),
        ({"loss": float("inf")}, r"loss must be positive and finite: inf in row 3"),
        ({"N": -1.0}, r"N must be positive and finite: -1 in row 3"),
    ],
)
def test_wrong_values_are_named(change, message):
    sizes, loss = planted(HOFFMANN, LAW)
    columns = {**sizes, "loss": loss}
    ((name, value),) = change.items()
    columns[name][3] = value
    with pytest.raises(ValueError, match=message):
        fit_hoffmann(columns["N"], columns["D"], columns["loss"])


def test_fewer_runs_than_parameters():
    sizes, loss = planted(HOFFMANN, LAW, n=5)
    with pytest.raises(ValueError, match=r"5 runs cannot determine the 5 parameters .* at least 6"):
        fit(HOFFMANN, sizes, loss)


def test_fewer_runs_than_intervals_need():
    """One residual more than parameters, without its mean, is 0, and so was the width of every interval."""
    sizes, loss = planted(HOFFMANN, LAW, noise=0.004, n=7)
    assert fit(HOFFMANN, sizes, loss, starts_SP=HOFFMANN.theta(LAW)[None]).degrees_of_freedom == 2
    for resampling in ("runs", "noise"):
        with pytest.raises(
            ValueError, match=r"7 runs are too few for intervals of the 5 parameters .* at least 8"
        ):
            fit(HOFFMANN, sizes, loss, resamples=100, resampling=resampling)


def test_drawn_residuals_have_the_spread_of_those_that_the_fit_does_not_pass_through():
    """Of normal noise the mean square, over many fits, of three residuals about their mean is the noise's."""
    rng = np.random.default_rng(0)
    residuals_SN = np.concatenate([np.zeros((2000, 5)), rng.standard_normal((2000, 3))], axis=1)
    squares = [(drawn_residuals(residuals, 5, (50, 8), rng) ** 2).mean() for residuals in residuals_SN]
    assert np.mean(squares) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("degrees", [2, 5, 50])
def test_bounds_of_normal_estimates_are_students(degrees):
    """To the precision of a 2.5 % quantile of these draws, also where t's own tail lies beyond them all."""
    estimates = 10 + np.random.default_rng(0).standard_normal((4000, 2))
    low, high = expanded_percentiles(estimates, level=0.95, degrees_of_freedom=degrees)
    reach = float(t.ppf(0.975, degrees))
    np.testing.assert_allclose(high, 10 + reach, atol=0.05 * reach)
    np.testing.assert_allclose(low, 10 * np.exp(-reach / 10), rtol=0.1)
    below, _ = expanded_percentiles(estimates - 10, level=0.95, degrees_of_freedom=degrees)
    np.testing.assert_allclose(below, -reach, atol=0.05 * reach)
