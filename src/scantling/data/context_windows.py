"""Windows of several lengths that score the same tokens, so that losses by length of context compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class ContextWindows:
    """The windows of a text for each of `lengths`: side by side, and sliding by `stride` where one is given.

    A window of L tokens that slides by S scores its last S targets, each with at least L - S + 1 tokens of
    context; side by side is S = L. Press et al. 2021, arXiv:2108.12409, §2 and appendix B. Targets scored are
    the same at every length and stride, each once: those of `n_windows` windows of the longest length, spread
    evenly (None: all), in stretches that every length and the stride divide.

    Raises ValueError for lengths and strides that cannot be, or need more text than there is.
    """

    def __init__(
        self, tokens: np.ndarray, lengths: Sequence[int], *, stride: int | None, n_windows: int | None
    ) -> None:
        if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
            raise ValueError(
                f"lengths={list(lengths)} must be whole numbers of tokens, at least 1, as [64,128,256]"
            )
        self.tokens, self.lengths = np.asarray(tokens), sorted(set(lengths))
        shortest, longest = self.lengths[0], self.lengths[-1]
        if stride is not None and not 1 <= stride <= shortest:
            raise ValueError(f"stride={stride} must be between 1 and the shortest length, {shortest}")
        if n_windows is not None and n_windows < 1:
            raise ValueError(f"n_windows={n_windows} must be at least 1; null takes all")
        self.stride, strides = stride, self.lengths if stride is None else [*self.lengths, stride]
        self.stretch = math.lcm(*strides)
        first = longest - min(strides[-1], longest)
        available = (len(self.tokens) - 1 - first) // self.stretch
        if available < 1:
            raise ValueError(
                f"lengths={self.lengths}{'' if stride is None else f' and stride={stride}'} score the same "
                f"tokens in stretches of {self.stretch:,}, and the split has {len(self.tokens):,} tokens: "
                f"take shorter lengths that divide each other, as [64,128,256]"
            )
        wanted = available if n_windows is None else max(1, n_windows * longest // self.stretch)
        chosen = min(wanted, available)
        self.starts = first + np.arange(chosen, dtype=np.int64) * available // chosen * self.stretch

    @property
    def cuts(self) -> list[tuple[int, int]]:
        """(length, stride), side by side for each length and then sliding."""
        side_by_side = [(length, length) for length in self.lengths]
        sliding = [(length, self.stride) for length in self.lengths if self.stride is not None]
        return list(dict.fromkeys(side_by_side + sliding))

    @property
    def n_targets(self) -> int:
        """Tokens that are scored at each length and stride."""
        return len(self.starts) * self.stretch

    @property
    def n_inputs(self) -> int:
        """Tokens that go through the model, over all cuts."""
        return sum(self.n_targets // stride * length for length, stride in self.cuts)

    def batches(self, length: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets, int64 [B, length]; of a row's targets the last `stride` are to be scored."""
        within = np.arange(0, self.stretch, stride) - (length - stride)
        starts = (self.starts[:, None] + within).ravel()
        for i in range(0, len(starts), batch_size):
            rows = starts[i : i + batch_size, None] + np.arange(length + 1)
            windows = torch.from_numpy(self.tokens[rows].astype(np.int64))
            yield windows[:, :-1].clone(), windows[:, 1:].clone()
