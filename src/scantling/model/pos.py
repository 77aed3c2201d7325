"""Where a token stands: `pos=`.

A position is one object with three hooks that do nothing by default. The decoder calls all three, so that an
option overrides the one it needs: `embed` adds to the token embeddings, `rotate` turns queries and keys, `bias`
adds to the attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Rotation = Callable[[Tensor], Tensor]
ScoreBias = Callable[[Tensor, Tensor, Tensor], Tensor]


def unrotated(x_BTHE: Tensor) -> Tensor:
    return x_BTHE


class Position(nn.Module):
    """No position at all (NoPE, Kazemnejad et al. 2023, arXiv:2305.19466), and the base of every other option.

    A causal decoder can still tell order, because later tokens see more keys.
    """

    max_len: int | None = None
    """The longest context the option can address; None when there is no limit."""

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__()

    def embed(self, x_BTD: Float[Tensor, "B T D"], positions_T: Int[Tensor, " T"]) -> Float[Tensor, "B T D"]:
        """Token embeddings with the position added."""
        return x_BTD

    def rotate(self, positions_T: Int[Tensor, " T"]) -> Rotation:
        """A function of queries or keys [B, T, heads, E] at these positions; computed once, used by every layer."""
        return unrotated

    @property
    def bias(self) -> ScoreBias | None:
        """A function of (head, query position, key position), elementwise over tensors that broadcast.

        One definition serves the dense mask and FlexAttention's `score_mod` alike.
        """
        return None


class Sinusoidal(Position):
    """x + P; P[t, 2i] = sin(t / θ^(2i/D)), P[t, 2i+1] = cos(t / θ^(2i/D)). Vaswani et al. 2017, arXiv:1706.03762, §3.5.

    The paper multiplies token embeddings by √D before it adds P, whose entries are of order 1. Ours start at
    standard deviation 0.02, so P is scaled by `scale` instead; 1 is the paper's P over unscaled embeddings.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, theta: float, scale: float):
        super().__init__(d_model, n_heads, d_head)
        if d_model % 2:
            raise ValueError(f"pos=sinusoidal pairs sines with cosines: d_model={d_model} must be even")
        self.theta, self.scale = theta, scale

    def embed(self, x_BTD: Float[Tensor, "B T D"], positions_T: Int[Tensor, " T"]) -> Float[Tensor, "B T D"]:
        angles = positions_T[:, None] * inverse_frequencies(x_BTD.shape[-1], self.theta, x_BTD.device)
        table_TD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
        return x_BTD + (self.scale * table_TD).type_as(x_BTD)


class Learned(Position):
    """x + W[t] with W a parameter of `max_len` rows. Gehring et al. 2017, arXiv:1705.03122; GPT-1, GPT-2, GPT-3."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, max_len: int):
        super().__init__(d_model, n_heads, d_head)
        self.weight = nn.Parameter(torch.empty(max_len, d_model))
        self.max_len = max_len

    def embed(self, x_BTD: Float[Tensor, "B T D"], positions_T: Int[Tensor, " T"]) -> Float[Tensor, "B T D"]:
        return x_BTD + self.weight[positions_T]


class RoPE(Position):
    """Pairs (x_i, x_{i+E/2}) of queries and keys turned by the angle t·θ^(-2i/E). Su et al. 2021, arXiv:2104.09864, eq. 34.

    The pairing of halves is GPT-NeoX's and Llama's in `transformers`; the paper pairs neighbours, which is the
    same function up to a permutation of each head's rows in W_q and W_k.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, theta: float):
        super().__init__(d_model, n_heads, d_head)
        if d_head % 2:
            raise ValueError(f"pos=rope turns pairs of channels: d_head={d_head} must be even")
        self.d_head, self.theta = d_head, theta

    def rotate(self, positions_T: Int[Tensor, " T"]) -> Rotation:
        angles_TF = positions_T[:, None] * inverse_frequencies(self.d_head, self.theta, positions_T.device)
        cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
        cos_T1E = torch.cat((cos_TF, cos_TF), dim=-1)[:, None]
        sin_T1E = torch.cat((-sin_TF, sin_TF), dim=-1)[:, None]

        def turn(x_BTHE: Tensor) -> Tensor:
            swapped_BTHE = x_BTHE.roll(self.d_head // 2, dims=-1)
            return x_BTHE * cos_T1E.type_as(x_BTHE) + swapped_BTHE * sin_T1E.type_as(x_BTHE)

        return turn


class ALiBi(Position):
    """score(t, s) - m_h·(t - s), m_h a geometric sequence over heads. Press et al. 2021, arXiv:2108.12409, §3.

    For H a power of two m_h = 2^(-8h/H), h = 1 … H. Otherwise the slopes of the next lower power of two, then
    every second one of the next higher, as in the authors' code.
    """

    slopes_H: Tensor

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__(d_model, n_heads, d_head)
        self.register_buffer("slopes_H", torch.tensor(alibi_slopes(n_heads)), persistent=False)

    @property
    def bias(self) -> ScoreBias:
        slopes_H = self.slopes_H
        return lambda head, query, key: -slopes_H[head] * (query - key)


def inverse_frequencies(width: int, theta: float, device: torch.device) -> Float[Tensor, " F"]:
    """θ^(-2i/width) for i = 0 … width/2 - 1."""
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def alibi_slopes(n_heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return slopes + finer[: n_heads - power]
