"""Paired comparisons against SciPy's tests and simulated studies, gains against planted multipliers."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from scantling.analysis.ablation import (
    compare,
    compute_equivalent_gain,
    gain_trend,
    holm,
    paired_losses,
    seeds_for_precision,
    seeds_needed,
)
from scantling.analysis.forms import saturating
from scantling.analysis.scaling import fit


def study(rng, shifts, seeds=5, between=0.01, within=0.003):
    """Runs of arms that share the noise of each seed and have some of their own."""
    shared = 3 + between * rng.standard_normal(seeds)
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed, "loss": shared[seed] + shift + within * rng.standard_normal()}
            for arm, shift in shifts.items()
            for seed in range(seeds)
        ]
    )


def test_a_comparison_is_scipys_paired_t_test():
    runs = study(np.random.default_rng(0), {"mha": 0, "gqa": 0.004, "mqa": 0.009})
    table = runs.pivot(index="seed", columns="arm", values="loss")
    found = {c.arm: c for c in compare(runs, "mha")}
    for arm in ("gqa", "mqa"):
        theirs = ttest_rel(table[arm], table["mha"])
        assert found[arm].difference == pytest.approx((table[arm] - table["mha"]).mean())
        assert found[arm].p == pytest.approx(theirs.pvalue)
        assert found[arm].interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
        assert found[arm].effect == pytest.approx(found[arm].difference / table["mha"].std())
    low, high = found["gqa"].bootstrap
    assert found["gqa"].interval[0] < low < found["gqa"].difference < high < found["gqa"].interval[1]


def test_holm_by_hand():
    """Holm 1979: the smallest of m times m, the next times m - 1, never falling, at most 1."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_identical_arms_are_rarely_called_better():
    """Two arms under one truth, 200 studies of five seeds: at most 5 % are called better, and at most 5 % + 2
    s.e. differ."""
    rng = np.random.default_rng(1)
    verdicts = [compare(study(rng, {"one": 0, "two": 0}), "one", resamples=50)[0].verdict for _ in range(200)]
    assert verdicts.count("better") <= 10
    assert 200 - verdicts.count("undecided") <= 16


def test_many_identical_arms_are_rarely_called_different():
    rng = np.random.default_rng(2)
    shifts = dict.fromkeys("abcdef", 0)
    wrong = sum(
        any(c.verdict != "undecided" for c in compare(study(rng, shifts), "a", resamples=50))
        for _ in range(200)
    )
    assert wrong <= 16


def test_a_planted_gain_is_found_with_the_forecast_number_of_seeds():
    """A gain of twice the noise of a difference, at a power of 0.9: found in about 90 % of 200 studies."""
    noise = 0.003 * np.sqrt(2)
    n = seeds_needed(noise, 2 * noise, power=0.9)
    rng = np.random.default_rng(3)
    runs = [study(rng, {"old": 0, "new": -2 * noise}, seeds=n) for _ in range(200)]
    found = sum(compare(each, "old", resamples=50)[0].verdict == "better" for each in runs)
    assert found / 200 >= 0.85
    fewer = [study(rng, {"old": 0, "new": -2 * noise}, seeds=n - 1) for _ in range(200)]
    assert sum(compare(each, "old", resamples=50)[0].verdict == "better" for each in fewer) < found


def test_seeds_for_precision_reach_it():
    n = seeds_for_precision(0.004, 0.002)
    rng = np.random.default_rng(4)
    widths = [
        compare(study(rng, {"a": 0, "b": 0}, seeds=n, within=0.004 / np.sqrt(2)), "a", resamples=50)[
            0
        ].interval
        for _ in range(200)
    ]
    assert np.mean([high - low for low, high in widths]) / 2 == pytest.approx(0.002, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs.drop(3), r"arm mha lacks seed 3 that other arms have \(row 8\)"),
        (
            lambda runs: pd.concat([runs, runs.iloc[[2]]], ignore_index=True),
            "arm mha has seed 2 more than once: rows 2, 10",
        ),
        (lambda runs: runs.assign(loss=runs.loss.where(runs.index != 4)), "loss is not finite in row 4"),
        (lambda runs: runs.rename(columns={"seed": "run"}), "no column seed; it has arm, run, loss"),
        (lambda runs: runs[runs.seed == 0], "one seed only"),
        (lambda runs: runs.replace("mha", "gqa2"), "no runs of the baseline mha: arms are gqa, gqa2"),
    ],
)
def test_what_cannot_be_compared_is_named(change, message):
    runs = study(np.random.default_rng(0), {"mha": 0, "gqa": 0})
    with pytest.raises(ValueError, match=message):
        paired_losses(change(runs), "mha")


@pytest.fixture(scope="module")
def baseline():
    """L = 1.8 + 1000/C^0.16 with little noise."""
    c = np.geomspace(1e16, 1e20, 24)
    loss = (1.8 + 1000 / c**0.16) * np.exp(0.001 * np.random.default_rng(0).standard_normal(24))
    return fit(saturating("C"), {"C": c}, loss, resamples=1000)


def planted_difference(c, multiplier, seeds=5, noise=1e-3, seed=0):
    """Of an arm that does with C what the baseline does with multiplier·C."""
    gain = 1000 / (multiplier * c) ** 0.16 - 1000 / c**0.16
    return gain + noise * np.random.default_rng(seed).standard_normal(seeds)


def test_a_planted_multiplier_comes_back_with_its_interval(baseline):
    hits, multipliers = 0, []
    for seed in range(100):
        gain = compute_equivalent_gain(baseline, 1e19, planted_difference(1e19, 1.12, seed=seed))
        hits += gain.interval[0] <= 1.12 <= gain.interval[1]
        multipliers.append(gain.multiplier)
    assert np.median(multipliers) == pytest.approx(1.12, rel=0.01)
    assert 90 <= hits <= 100


def test_a_worse_arm_has_a_gain_below_one(baseline):
    assert compute_equivalent_gain(baseline, 1e19, planted_difference(1e19, 0.8)).multiplier == pytest.approx(
        0.8, rel=0.02
    )


def test_a_trend_over_scale_is_seen_when_there_is_one(baseline):
    scales = (1e17, 1e18, 1e19)
    same = [
        compute_equivalent_gain(baseline, c, planted_difference(c, 1.2), seed=i) for i, c in enumerate(scales)
    ]
    assert gain_trend(same).interval[0] < 0 < gain_trend(same).interval[1]
    fading = [
        compute_equivalent_gain(baseline, c, planted_difference(c, m), seed=i)
        for i, (c, m) in enumerate(zip(scales, (1.6, 1.3, 1.05), strict=True))
    ]
    assert gain_trend(fading).verdict == "fades with scale"
    assert gain_trend(fading).p < 0.05 < gain_trend(same).p
    assert gain_trend(fading).per_decade == pytest.approx(np.log(1.05 / 1.6) / 2, rel=0.1)


def test_trends_of_gains_without_one_are_seen_as_often_as_they_may(baseline):
    """Of 200 arms without a trend, 5 % at most and two standard errors."""
    seen = 0
    for seed in range(200):
        gains = [
            compute_equivalent_gain(baseline, c, planted_difference(c, 1.2, seed=3 * seed + i), seed=i)
            for i, c in enumerate((1e17, 1e18, 1e19))
        ]
        seen += gain_trend(gains).verdict != "no trend seen"
    assert seen <= 16


def test_a_loss_below_the_laws_E_is_worth_no_multiplier(baseline):
    with pytest.raises(ValueError, match=r"is below E = 1\.8.*no compute reaches it"):
        compute_equivalent_gain(baseline, 1e19, np.array([-2.0, -2.1]))
