"""Schedules against nanoGPT's code and values worked out by hand."""

import math
from pathlib import Path

import pytest
import yaml
from hydra.utils import instantiate

from scantling.training.schedule import constant, cosine, linear, warmup_steps, wsd

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "schedule").glob("*.yaml"))


def nanogpt(it: int, *, warmup_iters: int, lr_decay_iters: int, learning_rate: float, min_lr: float) -> float:
    """karpathy/nanoGPT, train.py, `get_lr`."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


@pytest.mark.parametrize(("warmup", "steps"), [(100, 100), (0.05, 100), (0, 0), (1, 1)])
def test_cosine_equals_nanogpts(warmup, steps):
    for step in [*range(0, 2000, 7), 99, 100, 101, 1999, 2000, 2500]:
        expected = nanogpt(step, warmup_iters=steps, lr_decay_iters=2000, learning_rate=1.0, min_lr=0.1)
        assert cosine(step, 2000, warmup=warmup, floor=0.1) == pytest.approx(expected, abs=1e-12), step


def test_warmup_below_one_is_a_share_and_from_one_on_steps():
    assert [warmup_steps(w, 400) for w in (0, 0.05, 0.999, 1, 20)] == [0, 20, 400, 1, 20]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        # total 100, warm-up 9: step 0 is 1/10, step 4 5/10; half of the 91 steps after 9 is at 54.5
        (lambda s: linear(s, 100, warmup=9, floor=0.0), {0: 0.1, 4: 0.5, 9: 1, 9 + 13: 1 - 1 / 7, 100: 0}),
        (lambda s: linear(s, 100, warmup=9, floor=0.5), {0: 0.1, 9: 1, 9 + 13: 1 - 0.5 / 7, 100: 0.5}),
        # the last 20 steps as 1 - √x: a quarter through, half is left
        (
            lambda s: wsd(s, 100, warmup=9, floor=0.0, decay=0.2),
            {0: 0.1, 9: 1, 50: 1, 80: 1, 85: 0.5, 80 + 20 * 0.64: 0.2, 100: 0, 120: 0},
        ),
        (lambda s: wsd(s, 100, warmup=0, floor=0.2, decay=0.2), {0: 1, 80: 1, 85: 0.6, 100: 0.2}),
        (lambda s: constant(s, 100, warmup=9), {0: 0.1, 4: 0.5, 9: 1, 99: 1, 1000: 1}),
        # half a cosine: 1/2 + √3/4 at a third
        (
            lambda s: cosine(s, 90, warmup=0, floor=0.0),
            {0: 1, 15: 0.5 + 3**0.5 / 4, 45: 0.5, 60: 0.25, 90: 0},
        ),
    ],
    ids=["linear", "linear-floor", "wsd", "wsd-floor", "constant", "cosine"],
)
def test_values_by_hand(schedule, values):
    assert {step: schedule(step) for step in values} == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("total", [1, 2, 20, 1000])
def test_every_schedule_stays_in_bounds_and_ends_near_its_floor(composed, name, total):
    schedule = instantiate(composed("model=nano", f"schedule={name}").schedule)
    factors = [schedule(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors), "a rate of 0 would waste a step"
    if total >= 20:
        rise = factors[: warmup_steps(0.05, total) + 1]
        assert rise == sorted(rise)
        assert max(factors) == 1.0
        fall = factors[len(rise) :]
        assert fall == sorted(fall, reverse=True)
    if total == 1000:
        floor = schedule.keywords.get("floor", 1.0)
        assert factors[-1] == pytest.approx(floor, abs=0.01)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_negative_number_is_refused_by_its_name(name):
    settings = yaml.safe_load((CONF / "schedule" / f"{name}.yaml").read_text())
    for key in settings.keys() - {"_target_", "_partial_"}:
        with pytest.raises(ValueError, match=f"schedule.{key}=-1"):
            instantiate(settings | {key: -1.0})(0, 100)
