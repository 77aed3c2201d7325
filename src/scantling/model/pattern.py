"""Which earlier positions a query sees: `attn/pattern=`.

A pattern is an elementwise rule over (query position, key position), on top of causality. The same rule makes
the dense mask, FlexAttention's block mask, the count of FLOPs, and says what a key/value cache may forget.

Every option is called with the layer's index, so that layers can differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from scantling.model.checks import check_whole


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of every option."""

    layer: int = field(compare=False)  # layers that see alike share a mask
    counts: ClassVar[dict[str, int]] = {}
    """The least that a count may be: 1 where without it a query would not even see itself."""

    def __post_init__(self):
        for name, least in self.counts.items():
            check_whole(name, getattr(self, name), least=least)

    @property
    def reach(self) -> int | None:
        """The distance from which on only the first `n_first` keys are seen; None: there is no such limit."""
        return None

    @property
    def n_first(self) -> int:
        """How many tokens at the start of the text every query sees."""
        return 0

    @property
    def is_full(self) -> bool:
        """Whether causality alone hides keys, so that a kernel needs no mask of the pattern's."""
        return False

    @abstractmethod
    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query at one position sees a key at another that is not later; tensors that broadcast."""

    def mean_keys(self, seq_len: int) -> float:
        """Keys that a query of a sequence sees on average, itself among them."""
        keys, seen = torch.arange(seq_len), 0
        for queries in keys.split(max(1, 2**24 // seq_len)):
            query = queries[:, None]
            seen += int(((keys <= query) & self.sees(query, keys)).sum())
        return seen / seq_len


@dataclass(frozen=True)
class Full(Pattern):
    """All of them."""

    @property
    def is_full(self) -> bool:
        return True

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def mean_keys(self, seq_len: int) -> float:
        return (seq_len + 1) / 2


@dataclass(frozen=True)
class Sliding(Pattern):
    """The last `window` positions, the query's own among them.

    Beltagy et al. 2020 (Longformer), arXiv:2004.05150, §3.1; Mistral 7B, arXiv:2310.06825, §2. A cache rolls:
    it keeps `window` tokens whatever the length of the text.
    """

    window: int
    counts: ClassVar = {"window": 1}

    @property
    def reach(self) -> int:
        return self.window

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return query - key < self.window

    def mean_keys(self, seq_len: int) -> float:
        w = min(self.window, seq_len)
        return (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len


@dataclass(frozen=True)
class Sinks(Sliding):
    """The first `n_sinks` tokens and the last `window`.

    Xiao et al. 2023 (StreamingLLM), arXiv:2309.17453, §3.2. Positions are those in the text, as in training,
    and not those in the cache.
    """

    n_sinks: int
    counts: ClassVar = {"window": 1, "n_sinks": 0}

    @property
    def n_first(self) -> int:
        return self.n_sinks

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key < self.window) | (key < self.n_sinks)

    def mean_keys(self, seq_len: int) -> float:
        seen = torch.arange(1, seq_len + 1)
        return (
            int((seen.clamp(max=self.window) + (seen - self.window).clamp(0, self.n_sinks)).sum()) / seq_len
        )


@dataclass(frozen=True)
class Dilated(Pattern):
    """`window` positions, `dilation` apart, ending at the query's own. Longformer, §3.1."""

    window: int
    dilation: int
    counts: ClassVar = {"window": 1, "dilation": 1}

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return (distance < self.window * self.dilation) & (distance % self.dilation == 0)

    def mean_keys(self, seq_len: int) -> float:
        return int((torch.arange(seq_len) // self.dilation + 1).clamp(max=self.window).sum()) / seq_len


@dataclass(frozen=True)
class BlockGlobal(Pattern):
    """The last `window` positions, and every `every`-th token is global: it sees all and is
    seen by all. Longformer, §3.1, made causal; there the global tokens are those of the task,
    and a language model has none.
    """

    window: int
    every: int
    counts: ClassVar = {"window": 1, "every": 1}

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return (query - key < self.window) | (key % self.every == 0) | (query % self.every == 0)

    def mean_keys(self, seq_len: int) -> float:
        query = torch.arange(seq_len)
        beyond = ((query - self.window) // self.every + 1).clamp(min=0)
        local = (query + 1).clamp(max=self.window) + beyond
        return int(torch.where(query % self.every == 0, query + 1, local).sum()) / seq_len


@dataclass(frozen=True)
class Random(Pattern):
    """Blocks of `block` positions: a query sees its own block and the `n_local` - 1 before it, the first
    `n_global`, and `n_random` others drawn for its block and layer. Zaheer et al. 2020 (BigBird),
    arXiv:2007.14062, §2, made causal.
    """

    layer: int
    block: int
    n_local: int
    n_global: int
    n_random: int
    counts: ClassVar = {"block": 1, "n_local": 1, "n_global": 0, "n_random": 0}

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        own, other = query // self.block, key // self.block
        seen = (own - other < self.n_local) | (other < self.n_global)
        for draw in range(self.n_random):
            # A multiplicative hash in 31 bits (Knuth, TAOCP 3, §6.4): alike on every device and run.
            number = (own * 40503 + self.layer * 7919 + draw * 104729 + 1) * 48271 % 2147483647
            seen = seen | (other == number % (own + 1))
        return seen

    def mean_keys(self, seq_len: int) -> float:
        """By blocks: a query sees all of some earlier ones, and of its own the keys up to itself."""
        starts = torch.arange(0, seq_len, self.block)
        earlier = ((starts < starts[:, None]) & self.sees(starts[:, None], starts)).sum(1)
        queries = (seq_len - starts).clamp(max=self.block)
        return float((queries * self.block * earlier + queries * (queries + 1) / 2).sum()) / seq_len


def local_global(layer: int, *, window: int, every: int) -> Pattern:
    """Every `every`-th layer sees all positions, the others the last `window`. Gemma 2,
    arXiv:2408.00118, §2 (every = 2); Gemma 3, arXiv:2503.19786, §2 (6). Raises ValueError unless `every`
    is a whole number, at least 1.
    """
    check_whole("attn.pattern.every", every)
    return Full(layer) if (layer + 1) % every == 0 else Sliding(layer, window=window)
