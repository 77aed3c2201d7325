"""Batches out of a flat array of token ids, in an order that restarts anywhere.

Which window of text is sample i is a function of (seed, i) and of nothing else: not of the number
of ranks, the micro-batch size, or how often the run was interrupted. The scheme is OLMo-core's:
one global order, of which each rank takes its slice.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
import torch


class Batch(TypedDict):
    """`inputs`, `targets`: int64 [B, T]; targets are the inputs one token later."""

    inputs: torch.Tensor
    targets: torch.Tensor


class TrainBatch(Batch):
    """`step_targets`: targets in the whole optimiser step, over all ranks and micro-batches.

    A sum of losses divided by it gives gradients that do not depend on how the step was cut up.
    """

    step_targets: int


class WindowOrder:
    """The order in which windows of `seq_len` tokens are visited, epoch after epoch.

    An epoch is `windows_per_epoch` = max(1, (n_tokens - 1) // seq_len - 1) windows side by side,
    behind a random shift of less than `seq_len` tokens, in a random order. The shift moves the
    borders from epoch to epoch; the window given up to make room for it keeps the number constant.

    Random numbers come raw from Philox with the key (seed, epoch) and are put in order by a stable sort:
    NumPy promises that raw streams never change, which it does not for `permutation`.

    Raises ValueError when there are fewer than `seq_len` + 1 tokens.
    """

    def __init__(self, n_tokens: int, seq_len: int, seed: int) -> None:
        check_length(n_tokens, seq_len, "train")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must be a whole number, at least 0 and below 2**64")
        self.n_tokens = n_tokens
        self.seq_len = seq_len
        self.seed = seed
        self.windows_per_epoch = max(1, (n_tokens - 1) // seq_len - 1)
        self.epoch = -1
        self.epoch_starts = np.empty(0, np.int64)

    def start(self, i: int) -> int:
        """The offset of sample i's first token; i counts over all epochs."""
        return int(self.starts(np.array([i]))[0])

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """int64 offsets of many samples, in any order and over any epochs."""
        epochs, within = np.divmod(np.asarray(indices, np.int64), self.windows_per_epoch)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:  # nearly always: a batch inside one epoch
            return self.starts_of_epoch(first)[within]
        starts = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            starts[chosen] = self.starts_of_epoch(int(epoch))[within[chosen]]
        return starts

    def starts_of_epoch(self, epoch: int) -> np.ndarray:
        """int64 [windows_per_epoch]: the offset of each window in the order of the epoch."""
        if epoch != self.epoch:
            assert epoch >= 0, epoch
            n = self.windows_per_epoch
            raw = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(n + 1)
            slack = self.n_tokens - 1 - n * self.seq_len
            # A shift by seq_len would give the borders of a shift by 0 again.
            shift = int(raw[n]) % min(slack + 1, self.seq_len)
            self.epoch_starts = np.argsort(raw[:n], kind="stable") * self.seq_len + shift
            self.epoch = epoch
        return self.epoch_starts


@dataclass(frozen=True)
class BatchSizes:
    """Sequences of each optimiser step: `full`, after `steps` steps that grow evenly from `start`.

    A function of the step alone, so that nothing need be remembered. As in GPT-3, Brown et al. 2020,
    arXiv:2005.14165, §2.1, where it grows over the first tokens of training. `start` null is `full`.

    Raises ValueError when `full` is not a multiple of `start`.
    """

    full: int
    start: int | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        if (self.start is None) != (self.steps == 0):
            raise ValueError(
                "batch_warmup needs both: start, sequences of the first step, and steps, how many grow"
            )
        if self.steps < 0 or not 0 < self.first <= self.full or self.full % self.first:
            raise ValueError(
                f"batch_warmup.start={self.start} must divide batch_size={self.full}, "
                f"and steps={self.steps} be 0 or more"
            )

    @property
    def first(self) -> int:
        """Sequences of the first step."""
        return self.full if self.start is None else self.start

    def of(self, step: int) -> int:
        """Sequences of the step that comes after `step` others."""
        return int(self.growing[step]) if step < self.steps else self.full

    def before(self, step: int) -> int:
        """Sequences of the first `step` steps."""
        return int(self.growing[:step].sum()) + self.full * max(0, step - self.steps)

    def steps_within(self, sequences: int) -> int:
        """The most steps that take at most so many sequences."""
        left = sequences - self.before(self.steps)
        if left >= 0:
            return self.steps + left // self.full
        return int(np.searchsorted(self.growing.cumsum(), sequences, side="right"))

    @cached_property
    def growing(self) -> np.ndarray:
        """int64 [steps]: sequences of each step of the warm-up."""
        multiples = 1 + np.arange(self.steps) * (self.full // self.first - 1) // max(1, self.steps)
        return self.first * multiples


class TrainBatches:
    """The training batches of one rank, without end; each iteration begins at `first_step`.

    Step s takes samples `sizes.before(s)` to `sizes.before(s + 1)` of the global order. A rank takes
    a contiguous slice of them, a micro-batch a contiguous slice of that: each step yields
    `sizes.full / (micro_batch_size * world_size)` batches. To resume, start at the step to do.

    `tokens`: integers [n_tokens]. `sizes`: sequences of optimiser steps, over all ranks.
    `micro_batch_size`: sequences per rank and forward pass, of a full step. `pin`: page-locked memory, for
    copies to a GPU. `left_out`: steps of that order that are passed over; those behind move up.

    Raises ValueError when a step does not divide evenly, or the text is too short.
    """

    def __init__(
        self,
        *,
        tokens: np.ndarray,
        seq_len: int,
        sizes: BatchSizes,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int,
        left_out: Collection[int] = (),
        pin: bool = False,
    ) -> None:
        check_batch_size(sizes, micro_batch_size, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        assert first_step >= 0, first_step
        self.order = WindowOrder(len(tokens), seq_len, seed)
        self.seq_len = seq_len
        self.sizes = sizes
        self.micro_batches_per_step = sizes.full // (micro_batch_size * world_size)
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.left_out = frozenset(left_out)
        self.pin = pin
        self.tokens = np.asarray(tokens)  # a plain view: memmap's own indexing is slower

    def __iter__(self) -> Iterator[TrainBatch]:
        for step in itertools.count(place_in_order(self.first_step, self.left_out)):
            if step in self.left_out:
                continue
            size = self.sizes.of(step)
            per_rank = size // self.world_size
            per_micro_batch = per_rank // self.micro_batches_per_step
            begin = self.sizes.before(step) + self.rank * per_rank
            starts = self.order.starts(np.arange(begin, begin + per_rank))
            for micro in range(self.micro_batches_per_step):
                of_micro = starts[micro * per_micro_batch :][:per_micro_batch]
                batch = gather_windows(self.tokens, of_micro, self.seq_len)
                yield {
                    "inputs": batch["inputs"].pin_memory() if self.pin else batch["inputs"],
                    "targets": batch["targets"].pin_memory() if self.pin else batch["targets"],
                    "step_targets": size * self.seq_len,
                }


def place_in_order(step: int, left_out: Collection[int]) -> int:
    """The place in the order of data of step number `step`, counted from 0, some places being left out."""
    for place in sorted(left_out):
        step += place <= step
    return step


def validation_batches(
    tokens: np.ndarray, seq_len: int, n_windows: int | None, batch_size: int, *, split: str = "val"
) -> list[Batch]:
    """A fixed set of `n_windows` windows, side by side or evenly apart, none overlapping.

    All windows of the split, which `split` names, when `n_windows` is None or more than there are. The last
    batch may be smaller. Raises ValueError when the split is shorter than one window.
    """
    check_length(len(tokens), seq_len, split)
    if batch_size < 1 or (n_windows is not None and n_windows < 1):
        raise ValueError(
            f"validation needs a batch and at least one window, not batch_size={batch_size} "
            f"and n_windows={n_windows}"
        )
    available = (len(tokens) - 1) // seq_len
    chosen = available if n_windows is None else min(n_windows, available)
    starts = np.arange(chosen, dtype=np.int64) * available // chosen * seq_len
    plain = np.asarray(tokens)
    return [
        gather_windows(plain, starts[first : first + batch_size], seq_len)
        for first in range(0, chosen, batch_size)
    ]


def check_batch_size(sizes: BatchSizes, micro_batch_size: int, world_size: int) -> None:
    """Raise ValueError unless every step is the same whole number of micro-batches on every rank."""
    batch_size = sizes.full
    for name, value in (
        ("batch_size", batch_size),
        ("micro_batch_size", micro_batch_size),
        ("world_size", world_size),
    ):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    unit = micro_batch_size * world_size
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        nearest = f"{below} or {above}" if below else f"{above}"
        ranks = f"{world_size} ranks"
        if micro_batch_size > 1:
            ranks = f"micro_batch_size {micro_batch_size} x {ranks} = {unit}"
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of {ranks}; the nearest that fits is {nearest}"
        )
    micro_batches = batch_size // micro_batch_size
    if sizes.first % micro_batches:
        raise ValueError(
            f"batch_warmup.start={sizes.first} is not a multiple of the {micro_batches} micro-batches "
            f"of a step, over all ranks: use one, or a larger micro_batch_size"
        )


def check_length(n_tokens: int, seq_len: int, split: str) -> None:
    """Raise ValueError unless the split has a window of `seq_len` inputs with their targets."""
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    if n_tokens < seq_len + 1:
        fits = f"a seq_len of at most {n_tokens - 1}" if n_tokens > 1 else "more text"
        raise ValueError(
            f"the {split} split has {n_tokens:,} tokens, but seq_len {seq_len:,} needs "
            f"{seq_len + 1:,}; {fits} would fit"
        )


def gather_windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> Batch:
    """The windows at `starts`, and their targets one token on, as contiguous int64 tensors."""
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)]
    return {
        "inputs": torch.from_numpy(windows[:, :-1].astype(np.int64)),
        "targets": torch.from_numpy(windows[:, 1:].astype(np.int64)),
    }
