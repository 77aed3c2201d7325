"""What a decoder remembers of past tokens, passed to it as an argument while it generates.

A row's token at position p always stands at the same place, whatever the other rows hold. Rows of different
length are padded on the right: a pad's key is later than every real query, so that causality hides it, and
the row's next token takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scantling.model.pattern import Pattern


@dataclass
class Placement:
    """Where the tokens of one forward pass stand."""

    positions_BT: Int[Tensor, "_ T"]
    """One row when all rows stand alike."""
    start: int | None
    """Position of the first token, when all rows have the same."""
    end: int
    """One past the last position of the longest row."""
    valid_BT: Bool[Tensor, "B T"] | None = None
    """False for padding; None where there is none."""
    documents_BT: Int[Tensor, "B T"] | None = None
    """The document of each token, where none sees another's; None: all tokens of a row see each other."""

    @property
    def before(self) -> Tensor:
        """Tokens that each row had before this pass, [B or 1, 1]."""
        return self.positions_BT[:, :1]

    @property
    def after(self) -> Tensor:
        """Tokens that each row has after this pass, [B or 1, 1]; padding does not count."""
        new = self.positions_BT.shape[1] if self.valid_BT is None else self.valid_BT.sum(1, keepdim=True)
        return self.before + new

    @classmethod
    def whole(cls, tokens_BT: Tensor, first_of_document: int | None = None) -> Placement:
        """Tokens from position 0, with nothing before them.

        `first_of_document` is the token that opens a document, which then sees itself alone.
        """
        T = tokens_BT.shape[1]
        documents = None if first_of_document is None else (tokens_BT == first_of_document).cumsum(1)
        return cls(torch.arange(T, device=tokens_BT.device)[None], 0, T, documents_BT=documents)


@dataclass
class Keys:
    """Where the keys stand that a layer attends to."""

    positions: Callable[[], Tensor]
    """[B or 1, S]; negative where a place is empty."""
    all_seen: bool
    """Whether every query sees every key, so that no mask is needed."""


def slots(n_slots: int, like_BTKE: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n_slots, K, E]; a head's slots lie side by side in memory, which is how attention reads them."""
    B, _, K, E = like_BTKE.shape
    return torch.zeros(B, K, n_slots, E, dtype=dtype, device=like_BTKE.device).transpose(1, 2)


def taken(data_BSKE: Tensor, rows: Tensor) -> Tensor:
    """These rows of the slots, in this order and with the memory layout of `slots`."""
    return data_BSKE.transpose(1, 2)[rows].transpose(1, 2)


class Buffer:
    """Room for `n_slots` tokens of keys or values, in the precision of the computation."""

    def __init__(self, n_slots: int, like_BTKE: Tensor):
        self.data_BSKE = slots(n_slots, like_BTKE, like_BTKE.dtype)

    def write(self, index: Any, x: Tensor) -> None:
        """Put vectors, [..., K, E], where `index` says: an index of rows and slots as PyTorch reads it."""
        self.data_BSKE[index] = x

    def read(self, n_slots: int) -> Tensor:
        """The first `n_slots` slots of every row, [B, n_slots, K, E]."""
        return self.data_BSKE[:, :n_slots]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken twice."""
        self.data_BSKE = taken(self.data_BSKE, rows)

    @property
    def nbytes(self) -> int:
        """Memory of all slots, also of those that are empty."""
        return self.data_BSKE.nbytes


class QuantisedBuffer(Buffer):
    """x ≈ scale · q with q in `dtype`.

    Each token and head has one float32 scale, by which the largest |x| is kept.
    """

    dtype: torch.dtype
    largest: float

    def __init__(self, n_slots: int, like_BTKE: Tensor):
        self.computes_in = like_BTKE.dtype
        self.data_BSKE = slots(n_slots, like_BTKE, self.dtype)
        self.scale_BSK1 = slots(n_slots, like_BTKE[..., :1], torch.float32)

    def write(self, index: Any, x: Tensor) -> None:
        if not x.shape[-1]:  # the rotated part of a key that has none
            return
        scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / self.largest
        self.scale_BSK1[index] = scale
        self.data_BSKE[index] = self.rounded(x.float() / scale).to(self.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """What is cast to `dtype`: x itself, as a cast to a float rounds; Int8Buffer rounds first."""
        return x

    def read(self, n_slots: int) -> Tensor:
        return (self.data_BSKE[:, :n_slots].float() * self.scale_BSK1[:, :n_slots]).to(self.computes_in)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.scale_BSK1 = taken(self.scale_BSK1, rows)

    @property
    def nbytes(self) -> int:
        return self.data_BSKE.nbytes + self.scale_BSK1.nbytes


class Int8Buffer(QuantisedBuffer):
    """Integers from -127 to 127, rounded to the nearest."""

    dtype, largest = torch.int8, 127.0

    def rounded(self, x: Tensor) -> Tensor:
        return x.round()


class Float8Buffer(QuantisedBuffer):
    """Four bits of exponent, three of fraction (e4m3)."""

    dtype, largest = torch.float8_e4m3fn, 448.0


BUFFERS: dict[str, type[Buffer]] = {"full": Buffer, "int8": Int8Buffer, "fp8": Float8Buffer}
"""Precisions of a cache; `full` is that of the computation."""


class LayerCache:
    """Keys and values of one layer.

    A pattern with a limited reach needs no more than its first tokens and the last `reach`: the cache rolls,
    and token p stands at place n_first + (p - n_first) mod reach.
    """

    def __init__(self, max_len: int, pattern: Pattern, buffer: type[Buffer]):
        self.max_len, self.is_full = max_len, pattern.is_full
        self.first, self.window = pattern.n_first, max_len if pattern.reach is None else pattern.reach
        self.n_slots = min(max_len, self.first + self.window)
        self.rolls = self.first + self.window < max_len
        self.holds_what_is_seen = pattern.is_full or pattern.reach is not None
        self.buffer = buffer
        self.k: Buffer | None = None
        self.v: Buffer | None = None
        self.length = 0
        """Tokens of the longest row."""

    def keep_all(self) -> None:
        """Keep every token, even those that the pattern no longer needs; call it before the first token."""
        assert self.k is None
        self.n_slots, self.rolls, self.holds_what_is_seen = self.max_len, False, self.is_full

    def append(
        self, k_BTKE: Float[Tensor, "B T K E"], v_BTKE: Float[Tensor, "B T K _"], placement: Placement
    ) -> tuple[Tensor, Tensor, Keys]:
        """Keys and values that the new tokens may see, [B, S, K, E] each, and where they stand."""
        assert placement.end <= self.n_slots or self.rolls, "the cache is full"
        if self.k is None or self.v is None:
            self.k, self.v = self.buffer(self.n_slots, k_BTKE), self.buffer(self.n_slots, v_BTKE)
        before = self.length
        one_more = k_BTKE.shape[1] == 1 and placement.valid_BT is None
        old = None
        if self.rolls and not one_more and before:
            filled = min(before, self.n_slots)
            old = (
                self.k.read(filled).clone(),
                self.v.read(filled).clone(),
                self.held(placement.before, filled),
            )
        self.write(k_BTKE, v_BTKE, placement, one_more)
        self.length = placement.end
        filled = min(placement.end, self.n_slots)
        if not self.rolls or one_more:
            all_seen = one_more and placement.start is not None and self.holds_what_is_seen
            keys = Keys(lambda: self.held(placement.after, filled), all_seen)
            return self.k.read(filled), self.v.read(filled), keys
        B, new = k_BTKE.shape[0], placement.positions_BT
        if old is None:
            return k_BTKE, v_BTKE, Keys(lambda: new, all_seen=False)
        k, v, positions = old
        return (
            torch.cat((k, k_BTKE), 1),
            torch.cat((v, v_BTKE), 1),
            Keys(lambda: torch.cat((positions.expand(B, -1), new.expand(B, -1)), 1), all_seen=False),
        )

    def write(self, k_BTKE: Tensor, v_BTKE: Tensor, placement: Placement, one_more: bool) -> None:
        """Store new keys and values [B, T, K, E]: no padding, and of a window only what it still reaches.

        `one_more`: each row has a single token, and none is padding.
        """
        assert self.k is not None
        assert self.v is not None
        B, T = k_BTKE.shape[:2]
        index: Any
        if placement.start is not None and placement.valid_BT is None and (not self.rolls or one_more):
            slot = self.slot_of(placement.start)
            index = (slice(None), slice(slot, slot + T))
        elif placement.valid_BT is None and not self.rolls:
            index = (torch.arange(B, device=k_BTKE.device)[:, None], placement.positions_BT)
        else:
            positions = placement.positions_BT.expand(B, T)
            kept = (
                torch.ones_like(positions, dtype=torch.bool)
                if placement.valid_BT is None
                else placement.valid_BT
            )
            if self.rolls:
                kept = kept & ((positions < self.first) | (positions >= placement.after - self.window))
            rows, columns = kept.nonzero(as_tuple=True)
            index = (rows, self.slot_of(positions[rows, columns]))
            k_BTKE, v_BTKE = k_BTKE[rows, columns], v_BTKE[rows, columns]
        self.k.write(index, k_BTKE)
        self.v.write(index, v_BTKE)

    def slot_of(self, position: Any) -> Any:
        """The place of a position, an integer or a tensor: itself, or where the rolling cache has it."""
        if not self.rolls:
            return position
        wrapped = self.first + (position - self.first) % self.window
        if isinstance(position, int):
            return position if position < self.first else wrapped
        return torch.where(position < self.first, position, wrapped)

    def held(self, lengths_B1: Tensor, filled: int) -> Tensor:
        """The position that each of the first `filled` places holds, [B or 1, filled]; -1 in empty ones."""
        slots = torch.arange(filled, device=lengths_B1.device)[None]
        if not self.rolls:
            return slots
        newest = lengths_B1 - 1 - self.first
        rolled = newest - (newest - (slots - self.first)) % self.window
        position = torch.where(slots < self.first, slots, self.first + rolled)
        filled_already = (position < lengths_B1) & ((slots < self.first) | (rolled >= 0))
        return torch.where(filled_already, position, -1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken twice."""
        for buffer in (self.k, self.v):
            if buffer is not None:
                buffer.select(rows)

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values; 0 before the first token."""
        return sum(buffer.nbytes for buffer in (self.k, self.v) if buffer is not None)


class KVCache:
    """One cache for each layer, and how many tokens each row has."""

    def __init__(self, layers: list[Any], max_len: int):
        self.layers, self.max_len = layers, max_len
        self.length = 0
        """Tokens of the longest row."""
        self.lengths_B: Tensor | None = None
        """Tokens of each row, where they differ."""

    def advance(self, tokens_BT: Tensor, lengths_B: Int[Tensor, " B"] | None) -> Placement:
        """Where new tokens stand; `lengths_B` says how many of each row are real, the rest being padding."""
        (B, T), device = tokens_BT.shape, tokens_BT.device
        offsets = torch.arange(T, device=device)[None]
        if lengths_B is None and self.lengths_B is None:
            start = self.length
            self.length += T
            return Placement(start + offsets, start, self.length)
        before = self.lengths_B
        if before is None:
            before = torch.full((B,), self.length, device=device)
        valid = None if lengths_B is None else offsets < lengths_B[:, None]
        start = self.length
        if lengths_B is None:
            self.lengths_B, self.length = before + T, start + T
        else:
            self.lengths_B = before + lengths_B
            self.length = int(self.lengths_B.max())
        return Placement(before[:, None] + offsets, None, start + T, valid)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; beam search drops and doubles them."""
        for layer in self.layers:
            layer.select(rows)
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B[rows]

    def keep_all(self) -> None:
        """Let `rewind` take tokens back: layers that would roll keep them all.

        To be called before the first token. Raises ValueError where a layer sums its tokens up.
        """
        for layer in self.layers:
            if not isinstance(layer, LayerCache):
                raise ValueError(
                    "this model sums up the tokens it has read and cannot take one back, "
                    "as a draft needs it to: "
                    "speculative decoding takes models that attend to cached keys"
                )
            layer.keep_all()

    def rewind(self, n: int) -> None:
        """Take the last `n` tokens of every row back; what is written next takes their places."""
        assert not any(layer.rolls for layer in self.layers)
        self.length -= n
        if self.lengths_B is not None:
            self.lengths_B = self.lengths_B - n

    @property
    def nbytes(self) -> int:
        """Memory of all layers together."""
        return sum(layer.nbytes for layer in self.layers)
