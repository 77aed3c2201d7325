"""Keys and values of past tokens, passed to the decoder as an argument while it generates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in room for `max_len` tokens set aside at the first append."""

    def __init__(self, max_len: int):
        self.max_len = max_len
        self.length = 0
        self.k_BSKE = self.v_BSKE = torch.empty(0)

    def append(
        self, k_BTKE: Float[Tensor, "B T K E"], v_BTKE: Float[Tensor, "B T K E"]
    ) -> tuple[Tensor, Tensor]:
        """All keys and values so far, [B, S, K, E] each, the new ones last."""
        B, T, K, E = k_BTKE.shape
        if self.length == 0:
            self.k_BSKE = k_BTKE.new_empty(B, self.max_len, K, E)
            self.v_BSKE = v_BTKE.new_empty(B, self.max_len, K, E)
        assert self.length + T <= self.max_len, "the cache is full"
        new = slice(self.length, self.length + T)
        self.k_BSKE[:, new], self.v_BSKE[:, new] = k_BTKE, v_BTKE
        self.length += T
        return self.k_BSKE[:, : self.length], self.v_BSKE[:, : self.length]


class KVCache:
    """A `LayerCache` for each layer."""

    def __init__(self, n_layers: int, max_len: int):
        self.max_len = max_len
        self.layers = [LayerCache(max_len) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length
