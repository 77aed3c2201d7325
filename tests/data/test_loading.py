"""The order of windows is one function of (seed, sample), however it is cut up."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from scantling.data.loading import BatchSizes, TrainBatches, WindowOrder, validation_batches

TOKENS = np.arange(1000, dtype=np.uint16)  # a token is its own offset


def train_batches(**settings) -> TrainBatches:
    everything = {
        "tokens": TOKENS,
        "seq_len": 8,
        "batch_size": 8,
        "micro_batch_size": 8,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "first_step": 0,
    }
    everything |= settings
    return TrainBatches(sizes=BatchSizes(everything.pop("batch_size")), **everything)


def steps(n: int, **settings) -> list[torch.Tensor]:
    """The inputs of n optimiser steps [batch_size, seq_len], put together from all ranks."""
    per_rank = []
    for rank in range(settings.get("world_size", 1)):
        batches = train_batches(rank=rank, **settings)
        per_step = batches.micro_batches_per_step
        inputs = [batch["inputs"] for batch in islice(batches, n * per_step)]
        per_rank.append([torch.cat(inputs[s * per_step :][:per_step]) for s in range(n)])
    return [torch.cat(parts) for parts in zip(*per_rank, strict=True)]


@pytest.mark.parametrize("n_tokens", [9, 10, 16, 17, 18, 24, 25, 26, 100, 1000, 1001])
def test_an_epoch_covers_each_token_at_most_once_and_nearly_all(n_tokens):
    order = WindowOrder(n_tokens, 8, seed=1)
    n = order.windows_per_epoch
    assert n == max(1, (n_tokens - 1) // 8 - 1)
    shifts = set()
    for epoch in range(40):
        starts = order.starts(np.arange(epoch * n, (epoch + 1) * n))
        covered = (starts[:, None] + np.arange(8)).ravel()
        assert len(np.unique(covered)) == n * 8
        assert covered.min() >= 0
        assert covered.max() + 1 <= n_tokens - 1  # the last target exists
        shifts.add(int(starts.min()))
    room = n_tokens - 1 - n * 8
    assert shifts <= set(range(min(room, 7) + 1))
    if n_tokens > 100:
        assert len(shifts) == 8  # every border comes up


def test_epochs_and_seeds_differ_and_repeat():
    n = WindowOrder(1000, 8, seed=1).windows_per_epoch

    def epoch(seed: int, number: int) -> list[int]:
        return WindowOrder(1000, 8, seed).starts(np.arange(n) + number * n).tolist()

    orders = [epoch(seed, number) for seed in (1, 2) for number in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert epoch(1, 1) == orders[1]
    assert sorted(orders[0]) != orders[0]


def test_the_order_is_uniform():
    """Each window is first in an epoch about equally often: chi-squared over 4,000 seeds."""
    order_of = [WindowOrder(8 * 11 + 1, 8, seed).starts(np.arange(10)) for seed in range(4000)]
    counts = np.bincount([int(starts[0] - starts.min()) // 8 for starts in order_of], minlength=10)
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 27.9  # the 0.999 quantile with 9 degrees of freedom


def test_starts_across_epochs_equal_one_by_one():
    order = WindowOrder(100, 8, seed=7)
    indices = np.array([3, 10, 11, 9, 40, 12, 0])
    assert order.starts(indices).tolist() == [WindowOrder(100, 8, seed=7).start(int(i)) for i in indices]


def test_targets_are_the_next_tokens_and_the_step_is_counted():
    batch = next(iter(train_batches(micro_batch_size=4)))
    assert batch["inputs"].dtype == batch["targets"].dtype == torch.int64
    assert batch["inputs"].shape == (4, 8)
    assert torch.equal(batch["targets"], batch["inputs"] + 1)
    assert batch["inputs"].is_contiguous()
    assert batch["step_targets"] == 8 * 8


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_and_micro_batches_do_not_change_the_order(world_size, micro_batch_size):
    """40 steps of 8 windows are more than two epochs of 123."""
    cut_up = steps(40, world_size=world_size, micro_batch_size=micro_batch_size)
    for ours, whole in zip(cut_up, steps(40), strict=True):
        assert torch.equal(ours, whole)


def test_the_global_order_is_the_window_order():
    expected = WindowOrder(1000, 8, seed=3).starts(np.arange(40 * 8))
    assert torch.cat(steps(40))[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("first_step", [1, 15, 16, 31])
def test_starting_at_a_step_equals_the_uninterrupted_tail(first_step):
    resumed = steps(8, first_step=first_step, world_size=2, micro_batch_size=1)
    uninterrupted = steps(first_step + 8)[first_step:]
    assert all(torch.equal(a, b) for a, b in zip(resumed, uninterrupted, strict=True))


def test_a_batch_that_does_not_divide_names_what_would():
    with pytest.raises(ValueError, match=r"batch_size 10 .* 4 x 2 ranks = 8; .* 8 or 16"):
        train_batches(batch_size=10, micro_batch_size=4, world_size=2)
    with pytest.raises(ValueError, match="the nearest that fits is 8"):
        train_batches(batch_size=3, micro_batch_size=4, world_size=2)
    with pytest.raises(ValueError, match="micro_batch_size=0 must"):
        train_batches(micro_batch_size=0)


def test_too_little_text_names_both_numbers():
    WindowOrder(9, 8, seed=0)
    with pytest.raises(ValueError, match="8 tokens, but seq_len 8 needs 9; a seq_len of at most 7"):
        WindowOrder(8, 8, seed=0)
    with pytest.raises(ValueError, match="8 tokens"):
        validation_batches(TOKENS[:8], 8, None, 4)
    with pytest.raises(ValueError, match="seed=-1 must"):
        WindowOrder(9, 8, seed=-1)


@pytest.mark.parametrize("n_windows", [None, 124, 500])
def test_validation_on_everything_reads_the_split_in_order(n_windows):
    batches = validation_batches(TOKENS, 8, n_windows, batch_size=50)
    assert [len(batch["inputs"]) for batch in batches] == [50, 50, 24]
    inputs = torch.cat([batch["inputs"] for batch in batches]).flatten()
    targets = torch.cat([batch["targets"] for batch in batches]).flatten()
    assert inputs.tolist() == list(range(124 * 8))  # (1000 - 1) // 8 windows
    assert targets.tolist() == list(range(1, 124 * 8 + 1))


@pytest.mark.parametrize("n_windows", [1, 7, 31, 100, 123])
def test_validation_on_some_is_evenly_spaced(n_windows):
    [batch] = validation_batches(TOKENS, 8, n_windows, batch_size=1000)
    starts = batch["inputs"][:, 0].numpy()
    gaps = np.diff(np.append(starts, 124 * 8))
    assert len(starts) == n_windows
    assert starts[0] == 0
    assert gaps.min() >= 8  # none overlaps
    assert gaps.max() - gaps.min() <= 8


@pytest.mark.parametrize(
    ("full", "start", "steps"), [(16, 4, 9), (16, 2, 3), (12, 12, 5), (8, None, 0), (64, 8, 100)]
)
def test_sizes_of_growing_steps(full, start, steps):
    """Counted one by one: from `start` to `full` by `start` at a time, never down, as many before as they add
    up to.
    """
    sizes = BatchSizes(full, start, steps)
    each = [sizes.of(step) for step in range(steps + 20)]
    assert each[0] == (start or full)
    assert each == sorted(each)
    assert set(each[steps:]) == {full}
    assert all(size % (start or full) == 0 for size in each)
    if start and steps >= full // start:
        assert set(each) == set(range(start, full + 1, start))
    for step in range(steps + 20):
        assert sizes.before(step) == sum(each[:step])
        assert sizes.steps_within(sum(each[:step])) == step
        if step:
            assert sizes.steps_within(sum(each[:step]) - 1) == step - 1


def test_growing_steps_take_up_the_order_without_a_gap():
    """On two ranks with two micro-batches as on one; from any step on."""
    sizes, whole = BatchSizes(8, 4, 6), WindowOrder(len(TOKENS), 8, 3)
    settings = {"tokens": TOKENS, "seq_len": 8, "sizes": sizes, "seed": 3}
    for first_step in (0, 3, 7):
        ranks = [
            iter(TrainBatches(**settings, micro_batch_size=2, rank=rank, world_size=2, first_step=first_step))
            for rank in range(2)
        ]
        for step in range(first_step, 10):
            batches = [next(rank) for rank in ranks for _ in range(2)]
            found = torch.cat([batch["inputs"] for batch in batches])[:, 0].tolist()
            places = np.arange(sizes.before(step), sizes.before(step + 1))
            assert found == whole.starts(places).tolist()
            assert {batch["step_targets"] for batch in batches} == {sizes.of(step) * 8}


def test_batch_warmup_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="start=3 must divide batch_size=8"):
        BatchSizes(8, 3, 10)
    with pytest.raises(ValueError, match="batch_warmup needs both"):
        BatchSizes(8, 4, 0)
    with pytest.raises(ValueError, match="start=2 is not a multiple of the 4 micro-batches"):
        TrainBatches(
            tokens=TOKENS,
            seq_len=8,
            sizes=BatchSizes(8, 2, 9),
            micro_batch_size=2,
            rank=0,
            world_size=1,
            seed=0,
            first_step=0,
        )
