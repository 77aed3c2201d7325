"""Texts that grow side by side over one cache of keys and values."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scantling.inference.sampling import Ids
from scantling.model.attn import PatternedAttention
from scantling.model.cache import KVCache
from scantling.model.decoder import Decoder


def largest_context(decoder: Decoder, asked: int | None) -> int:
    """How many tokens the model can see: `asked`, else its `seq_len`.

    There is no limit (sys.maxsize) where every layer sees a window and positions have no table. Raises
    ValueError where more is asked than that table has.
    """
    limit = decoder.pos.max_len
    if asked is not None:
        if limit is not None and asked > limit:
            raise ValueError(
                f"context={asked}: this model has a table of {limit} positions, so at most {limit}"
            )
        return asked
    mixers = [block.attn for block in decoder.layers]
    rolls = all(isinstance(mixer, PatternedAttention) and mixer.pattern.reach is not None for mixer in mixers)
    return sys.maxsize if rolls and limit is None else decoder.seq_len


class CachedTexts:
    """Texts that grow side by side over one cache.

    The model sees at most `context` tokens of each: one that gets longer goes on from its last half, as a
    longer prompt goes on from its last `context`.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Ids],
        *,
        context: int,
        room: int,
        precision: str,
        rewinds: bool = False,
    ) -> None:
        self.decoder, self.context, self.room = decoder, context, room
        self.precision, self.rewinds = precision, rewinds
        self.ids = [ids[-context:] for ids in prompts]
        self.cache: KVCache
        self.device = decoder.embed.tokens.weight.device

    def begin(self) -> Float[Tensor, "B 1 V"]:
        """Logits of what follows each text, read anew."""
        lengths = [len(ids) for ids in self.ids]
        self.longest = max(lengths)
        self.cache = self.decoder.new_cache(min(self.context, self.longest + self.room), self.precision)
        if self.rewinds:
            self.cache.keep_all()
        padded = [ids + [0] * (self.longest - len(ids)) for ids in self.ids]
        tokens_BT = torch.tensor(padded, device=self.device)
        if min(lengths) == self.longest:
            return self.decoder.forward(tokens_BT, self.cache)[:, -1:]
        lengths_B = torch.tensor(lengths, device=self.device)
        logits_BTV = self.decoder.forward(tokens_BT, self.cache, lengths_B=lengths_B)
        return logits_BTV[torch.arange(len(lengths)), lengths_B - 1][:, None]

    def read(self, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B _ V"]:
        """Logits of what follows each of these tokens.

        Where a full context makes a new start they are those of the last token only.
        """
        for ids, new in zip(self.ids, tokens_BT.tolist(), strict=True):
            ids += new
        self.longest += tokens_BT.shape[1]
        if self.longest <= self.context:
            # `forward` and not the call: a compiled call would be compiled anew for every length.
            return self.decoder.forward(tokens_BT, self.cache)
        half = max(1, self.context // 2)
        self.ids = [ids[-half:] if len(ids) > self.context else ids for ids in self.ids]
        return self.begin()

    def forget(self, n: int) -> None:
        """Take the last `n` tokens of every text back."""
        if n:
            self.ids = [ids[:-n] for ids in self.ids]
            self.longest -= n
            self.cache.rewind(n)

    def select(self, rows: list[int]) -> None:
        """Go on with these texts, in this order; a text may be taken twice."""
        if rows != list(range(len(self.ids))):
            self.ids = [list(self.ids[row]) for row in rows]
            self.longest = max(len(ids) for ids in self.ids)
            self.cache.select(torch.tensor(rows, device=self.device))
