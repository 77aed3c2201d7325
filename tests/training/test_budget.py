"""The four currencies of a budget, by hand."""

import math

import pytest

from scantling.training.budget import steps_between_validations, steps_for

SHAPE = {"tokens_per_step": 4096, "n_params": 1_000_000, "flops_per_token": 6e6}
"""A step takes 4,096 tokens, 2.4576e10 FLOPs and 0.004096 tokens per parameter."""


@pytest.mark.parametrize(
    ("amount", "steps"),
    [
        ({"steps": 1}, 1),
        ({"steps": 1000}, 1000),
        ({"tokens": 4096}, 1),
        ({"tokens": 1_200_000}, 292),  # 292.97
        ({"tokens": 4096 * 293}, 293),
        ({"flops": 1e14}, 4069),  # 4069.01
        ({"flops": 2.4576e10 * 7}, 7),
        ({"tokens_per_param": 20}, 4882),  # 20 M tokens, 4882.8 steps
        ({"tokens_per_param": 0.004096 * 3}, 3),
    ],
)
def test_an_amount_pays_for_whole_steps(amount, steps):
    assert steps_for(**SHAPE, **amount) == steps


def test_currencies_agree():
    """20 tokens a parameter, in each currency."""
    equal = [{"tokens_per_param": 20}, {"tokens": 20e6}, {"flops": 20e6 * 6e6}]
    assert {steps_for(**SHAPE, **amount) for amount in equal} == {4882}


@pytest.mark.parametrize("n", range(1, 400, 7))
def test_an_amount_that_is_exact_loses_no_step_to_rounding(n):
    shape = SHAPE | {"flops_per_token": 1e14 / 3, "n_params": 1_234_567}
    assert steps_for(**shape, flops=n * 4096 * (1e14 / 3)) == n
    assert steps_for(**shape, tokens_per_param=n * 4096 / 1_234_567) == n


@pytest.mark.parametrize("name", ["steps", "tokens", "flops", "tokens_per_param"])
@pytest.mark.parametrize("amount", [0, -1, math.nan, math.inf])
def test_an_amount_that_is_no_amount_is_refused(name, amount):
    with pytest.raises(ValueError, match=rf"budget\.{name}={amount:g} must be positive"):
        steps_for(**SHAPE, **{name: amount})


def test_a_part_of_a_step_is_refused():
    with pytest.raises(ValueError, match=r"budget\.steps=10\.9 must be a whole number"):
        steps_for(**SHAPE, steps=10.9)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"steps": 0.5}, "takes 1 steps"),
        ({"tokens": 4095}, "takes 4,096 tokens: raise"),
        ({"flops": 2e10}, r"takes 2.458e\+10 flops"),
        ({"tokens_per_param": 0.004}, "takes 0.004096 tokens_per_param"),
    ],
)
def test_less_than_a_step_is_refused(amount, message):
    ((name, _),) = amount.items()
    with pytest.raises(ValueError, match=rf"budget\.{name}=.* is below one optimiser step, which {message}"):
        steps_for(**SHAPE, **amount)


@pytest.mark.parametrize(
    "amounts", [{}, {"steps": 10, "tokens": 1e6}, {"flops": 1e15, "tokens_per_param": 20}]
)
def test_none_or_two_are_refused(amounts):
    with pytest.raises(ValueError, match=f"a budget is one of .*; {len(amounts)} are given"):
        steps_for(**SHAPE, **amounts)


@pytest.mark.parametrize(
    ("val_every", "steps"),
    [(0.1, 100), (0.5, 500), (0.0001, 1), (1.0, 1000), (1, 1), (250, 250), (250.0, 250), (5000, 5000)],
)
def test_validations_come_by_a_share_of_the_run_or_by_steps(val_every, steps):
    """A float up to 1.0 is a share, so that 1.0 is once, at the end; a whole number counts steps."""
    assert steps_between_validations(val_every, 1000) == steps


@pytest.mark.parametrize("val_every", [0, 0.0, -1, -0.5, 1.5, 2.5, math.nan, math.inf])
def test_a_period_that_is_none_is_refused(val_every):
    with pytest.raises(
        ValueError, match=rf"val_every={val_every} is neither a share of the run, up to 1\.0, nor"
    ):
        steps_between_validations(val_every, 1000)
