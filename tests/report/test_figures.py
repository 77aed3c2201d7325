"""Figures for print: what they draw lies within their frame, and no label upon another."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scantling.analysis.forms import HOFFMANN
from scantling.analysis.scaling import refit_hoffmann
from scantling.report import figures

LAW = {"E": 1.8, "A": 480.0, "B": 2100.0, "alpha": 0.34, "beta": 0.37}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(draw, …)` is the figure that `draw(…, path, …)` saved, laid out."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))

    def drawn(draw, *arguments, **settings) -> Figure:
        draw(*arguments, tmp_path / "figure.png", **settings)
        FigureCanvasAgg(saved[0]).draw()
        return saved[0]

    return drawn


def test_the_bands_of_arms_lie_within_the_frame(drawn):
    """Two seeds so far apart that the mean less two standard errors is below 0.98 of it."""
    losses = {("a", 0): 2.6, ("a", 1): 3.4, ("b", 0): 3.1, ("b", 1): 3.1}
    names = [f"{arm}{seed}" for arm, seed in losses]
    curves = pd.DataFrame(
        [
            {"run": f"{arm}{seed}", "step": step, "tokens": 1e6 * step, "val/loss": loss + 1 / step}
            for (arm, seed), loss in losses.items()
            for step in range(1, 200)
        ]
    )
    runs = pd.DataFrame({"run": names, "arm": [arm for arm, _ in losses], "scale": ""})
    arms = pd.DataFrame({"arm": ["a", "b"], "scale": "", "loss": [3.0, 3.1]})
    arms = arms.assign(difference=[np.nan, 0.1], low=[np.nan, -0.9], high=[np.nan, 1.1])
    colours = {"a": "#111111", "b": "#222222"}
    shown = {"metric": "loss", "baseline": "a", "colours": colours}
    left, _ = drawn(figures.draw_arms, curves, runs, arms, **shown).axes
    low, high = left.get_ylim()
    error = (3.4 - 2.6) / 2
    assert low < 3.0 - 2 * error
    assert 3.0 + 2 * error < high < 4.1  # not up to where training began


@pytest.mark.parametrize("decades", [0.3, 1, 2, 4.5])
def test_labels_of_compute_do_not_overlap(drawn, decades):
    rng = np.random.default_rng(0)
    n, c = 10 ** rng.uniform(6, 7, 30), 10 ** (11.45 + np.linspace(0, decades, 30))
    loss = np.exp(HOFFMANN.predictor({"N": n, "D": c / 6 / n})(HOFFMANN.theta(LAW)[None])[0][0])
    fit = refit_hoffmann(n, c / 6 / n, loss * np.exp(0.002 * rng.standard_normal(30)), resamples=20)
    law = drawn(figures.draw_law, fit, c, k=6.0, title="", cutoff=None, caution=None)
    assert_apart(law)
    assert len(shown_labels(law.axes[1].xaxis)) > 1


@pytest.mark.parametrize("budgets", [2, 4])
@pytest.mark.parametrize("ratio", [2, 10])
def test_labels_of_a_plan_do_not_overlap(drawn, budgets, ratio):
    cells = [
        {
            "parameters": 1e5 * share * budget**0.5,
            "budget": 3e11 * budget,
            "tokens": 5e5 * budget**0.5 / share,
        }
        for budget in ratio ** np.arange(budgets)
        for share in np.geomspace(0.4, 2.5, 5)
    ]
    plan = drawn(figures.draw_design, cells, LAW, title="")
    assert_apart(plan)
    assert len(shown_labels(plan.axes[1].xaxis)) > 1


def shown_labels(axis):
    """Of ticks within the frame."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    labels = [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    return sorted((label for label in labels if label.get_text()), key=lambda label: label.get_position()[0])


def assert_apart(figure):
    """Labels of each x axis, by a gap of two points at least."""
    for axes in figure.axes[:2]:
        boxes = [label.get_window_extent() for label in shown_labels(axes.xaxis)]
        gap = 2 * figure.dpi / 72
        assert all(one.x1 + gap < other.x0 for one, other in itertools.pairwise(boxes)), [
            label.get_text() for label in shown_labels(axes.xaxis)
        ]
