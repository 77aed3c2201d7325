"""Planned studies: what they cost, and that their forecast is what real fits of simulated losses then say."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from scantling.analysis.allocation import allocation_exponent
from scantling.analysis.design import Grid, Proportions, Shape, forecast, nearest_shape, optimal_size, porian
from scantling.analysis.isoflop import fit_isoflop
from scantling.analysis.scaling import refit_hoffmann

LAW = {"E": 1.8172, "A": 477.8, "B": 2143.0, "alpha": 0.3473, "beta": 0.3672}
GRID = Grid(budgets=5, ratio=3.0, sizes=7, spread=4.0, seeds=2)


def loss_of(n, d):
    return LAW["E"] + LAW["A"] / n ** LAW["alpha"] + LAW["B"] / d ** LAW["beta"]


def test_the_runs_of_a_grid_take_the_whole_budget_and_lie_around_the_optimum():
    n, d, c = GRID.ideal(LAW, 1e20)
    assert len(n) == GRID.runs == 70
    assert c.sum() == pytest.approx(1e20)
    np.testing.assert_allclose(6 * n * d, c)
    assert np.unique(c)[1:] / np.unique(c)[:-1] == pytest.approx(3)
    for budget in np.unique(c):
        best = minimize_scalar(
            lambda x, c=budget: loss_of(np.exp(x), c / 6 / np.exp(x)), bounds=(5, 35), method="bounded"
        )
        sizes = np.unique(n[c == budget])
        assert np.exp(best.x) == pytest.approx(optimal_size(LAW, budget, 6.0), rel=1e-3)
        assert sizes[[0, 3, 6]] / np.exp(best.x) == pytest.approx([1 / 4, 1, 4], rel=1e-3)


@pytest.mark.slow
def test_the_forecast_widths_are_those_that_fits_then_report():
    """Thirty simulated studies, fitted as report.py would: their mean half-width, and the scatter of their
    estimates."""
    n, d, c = GRID.ideal(LAW, 1e20)
    expected = forecast(LAW, n, d, c, noise=0.004, target=1e21, draws=400, level=0.95, seed=0)
    assert expected.a == pytest.approx(0.3672 / 0.7145)
    assert abs(expected.bias) < 0.002
    rng, isoflop, parametric, found = np.random.default_rng(1), [], [], []
    for seed in range(30):
        loss = loss_of(n, d) * np.exp(0.004 * rng.standard_normal(len(n)))
        law = fit_isoflop(n, c, loss, resamples=300, seed=seed)
        isoflop.append((law.exponent_interval[1] - law.exponent_interval[0]) / 2)
        fitted = refit_hoffmann(n, d, loss, resamples=200, resampling="noise", seed=seed)
        a, interval = allocation_exponent(fitted)
        assert interval is not None
        parametric.append((interval[1] - interval[0]) / 2)
        found.append(a)
    assert np.mean(isoflop) == pytest.approx(expected.a_isoflop, rel=0.15)
    assert np.mean(parametric) == pytest.approx(expected.a_parametric, rel=0.2)
    assert 2 * np.std(found) == pytest.approx(expected.a_parametric, rel=0.4)


def test_four_times_the_seeds_halve_the_width():
    widths = [
        forecast(
            LAW, *grid.ideal(LAW, flops), noise=0.004, target=1e21, draws=400, level=0.95, seed=0
        ).a_isoflop
        for grid, flops in ((GRID, 1e20), (Grid(5, 3.0, 7, 4.0, 8), 4e20))
    ]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.15)


def test_shapes_come_near_their_target_in_the_presets_proportions():
    proportions = Proportions(aspect=32, d_head=32, widening=4.0, kv_share=0.5)

    def parameters(shape: Shape) -> int:
        return 12 * shape.n_layers * shape.d_model**2 + 1000 * shape.d_model

    for target in np.geomspace(1e5, 1e9, 9):
        shape = nearest_shape(target, proportions, parameters)
        assert parameters(shape) == pytest.approx(target, rel=0.15)
        assert 1 / 2.5 < shape.d_model / shape.n_layers / 32 < 2.5
        assert shape.d_model % (2 * shape.n_heads) == 0
        assert shape.n_heads % shape.n_kv_heads == 0
        assert shape.d_ff == 4 * shape.d_model
    with pytest.raises(
        ValueError, match="no model of these parts has as few as 1,000 parameters: the smallest has 8,768"
    ):
        nearest_shape(1e3, proportions, parameters)


def test_porians_rule():
    """The exponent of 3.7·N^-0.36 (figure 3): ten times the parameters, 0.4365 of the rate."""
    assert porian(1e8, 1e7, 3e-3) == pytest.approx(0.4365 * 3e-3, rel=1e-4)
    assert porian(1e9, 1e7, 3.7 * 1e7**-0.36) == pytest.approx(3.7 * 1e9**-0.36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": 1}, "isoflop.budgets=1: 2 are the least"),
        ({"sizes": 3}, "isoflop.sizes=3: 4 are the least"),
        ({"ratio": 1.0}, "isoflop.ratio=1.0 must be at least 1.1"),
    ],
)
def test_grids_without_a_law_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Grid(**(vars(GRID) | change)).check()
