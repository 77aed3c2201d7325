"""Where a token stands: `pos=`.

A position is one object with three hooks that do nothing by default. The decoder calls all three, so that an
option overrides the one it needs: `embed` adds to the token embeddings, `rotate` turns queries and keys,
`bias` adds to the attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scantling.model.checks import check_positive, check_whole
from scantling.model.rope_scaling import FrequencyScaling

Rotation = Callable[[Tensor], Tensor]
ScoreBias = Callable[[Tensor, Tensor, Tensor], Tensor]


def unrotated(x_BTHE: Tensor) -> Tensor:
    """The rotation of positions that turn nothing."""
    return x_BTHE


class Position(nn.Module):
    """Nothing is added and nothing turned. No position (NoPE): the base of every other option.

    Kazemnejad et al. 2023, arXiv:2305.19466. A causal decoder can still tell order, because
    later tokens see more keys.
    """

    max_len: int | None = None
    """The longest context the option can address; None when there is no limit."""

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__()

    def embed(
        self, x_BTD: Float[Tensor, "B T D"], positions_BT: Int[Tensor, "_ T"]
    ) -> Float[Tensor, "B T D"]:
        """Token embeddings with the position added."""
        return x_BTD

    def rotate(self, positions_BT: Int[Tensor, "_ T"]) -> Rotation:
        """A function of queries or keys [B, T, heads, E] at these positions."""
        return unrotated

    def rotations(self, positions_BT: Int[Tensor, "_ T"], n_layers: int) -> list[Rotation]:
        """One for each layer, computed once where layers are alike."""
        return [self.rotate(positions_BT)] * n_layers

    @property
    def bias(self) -> ScoreBias | None:
        """A function of (head, query position, key position), elementwise over tensors that broadcast.

        One definition serves the dense mask and FlexAttention's `score_mod` alike.
        """
        return None


class Sinusoidal(Position):
    """x + P; P[t, 2i] = sin(t / θ^(2i/D)), P[t, 2i+1] = cos(t / θ^(2i/D)).

    Vaswani et al. 2017, arXiv:1706.03762, §3.5. They multiply token embeddings by √D before they add P, whose
    entries are of order 1. Here embeddings start at standard deviation 0.02, so P is scaled by `scale`
    instead; 1 is the paper's P over unscaled embeddings.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, theta: float, scale: float):
        super().__init__(d_model, n_heads, d_head)
        if d_model % 2:
            raise ValueError(f"pos=sinusoidal pairs sines with cosines: d_model={d_model} must be even")
        check_positive("theta", theta)
        self.theta, self.scale = theta, scale

    def embed(
        self, x_BTD: Float[Tensor, "B T D"], positions_BT: Int[Tensor, "_ T"]
    ) -> Float[Tensor, "B T D"]:
        angles = positions_BT[..., None] * inverse_frequencies(x_BTD.shape[-1], self.theta, x_BTD.device)
        table_BTD = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
        return x_BTD + (self.scale * table_BTD).type_as(x_BTD)


class Learned(Position):
    """x + W[t] with W a parameter of `max_len` rows.

    Gehring et al. 2017, arXiv:1705.03122; GPT-1, GPT-2, GPT-3.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, max_len: int):
        super().__init__(d_model, n_heads, d_head)
        check_whole("pos.max_len", max_len)
        self.weight = nn.Parameter(torch.empty(max_len, d_model))
        self.max_len = max_len

    def embed(
        self, x_BTD: Float[Tensor, "B T D"], positions_BT: Int[Tensor, "_ T"]
    ) -> Float[Tensor, "B T D"]:
        return x_BTD + nn.functional.embedding(positions_BT, self.weight)


class RoPE(Position):
    """Pairs (x_i, x_{i+R/2}) of queries and keys turned by the angle t·θ^(-2i/R).

    Su et al. 2021, arXiv:2104.09864, eq. 34. R is the first `fraction` of a head's channels; the others
    stay (GPT-NeoX, arXiv:2204.06745, §2.1.1). Halves are paired as in GPT-NeoX's and Llama's code;
    `interleaved` pairs neighbours (x_2i, x_{2i+1}) as the paper, GPT-J and DeepSeek do, which is the same
    function up to a permutation of each head's rows in W_q and W_k. `scaling` changes the frequencies for
    contexts longer than those of training.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        *,
        theta: float,
        fraction: float,
        interleaved: bool,
        scaling: FrequencyScaling,
    ):
        super().__init__(d_model, n_heads, d_head)
        width = round(d_head * fraction)
        if width % 2 or not 0 < width <= d_head:
            raise ValueError(
                f"pos=rope turns pairs of channels: fraction={fraction:g} of d_head={d_head} "
                "must be even and more than 0; "
                "with attn=mla it is of attn.d_rotated"
            )
        check_positive("theta", theta)
        self.width, self.theta, self.interleaved, self.scaling = width, theta, interleaved, scaling
        self.frequencies(torch.device("cpu"))  # raises for settings of the scaling that are out of range

    def frequencies(self, device: torch.device) -> tuple[Float[Tensor, " F"], float]:
        """The frequency of each pair, and the factor on turned queries and keys."""
        return self.scaling(inverse_frequencies(self.width, self.theta, device), self.theta)

    def rotate(self, positions_BT: Int[Tensor, "_ T"]) -> Rotation:
        frequencies_F, factor = self.frequencies(positions_BT.device)
        angles_BTF = positions_BT[..., None] * frequencies_F
        cos_BT1F, sin_BT1F = (angles_BTF.cos() * factor)[:, :, None], (angles_BTF.sin() * factor)[:, :, None]
        cos_BT1R = (
            cos_BT1F.repeat_interleave(2, -1) if self.interleaved else torch.cat((cos_BT1F, cos_BT1F), -1)
        )
        return partial(self.turn, cos_BT1R=cos_BT1R, sin_BT1F=sin_BT1F)

    def turn(self, x_BTHE: Tensor, cos_BT1R: Tensor, sin_BT1F: Tensor) -> Tensor:
        """The first `width` channels of each head turned, the others as they are."""
        whole = self.width == x_BTHE.shape[-1]
        x_BTHR = x_BTHE if whole else x_BTHE[..., : self.width]
        cos, sin = cos_BT1R.type_as(x_BTHE), sin_BT1F.type_as(x_BTHE)
        if torch.is_grad_enabled():
            turned = Turn.apply(x_BTHR, cos, sin, self.interleaved)
        else:
            turned = turned_by(x_BTHR, cos, sin, self.interleaved)
        return turned if whole else torch.cat((turned, x_BTHE[..., self.width :]), -1)


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second channel of each pair."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def turned_by(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(a·cos - b·sin, b·cos + a·sin) for each pair (a, b) of x; `cos` is as wide as x, `sin` half as wide."""
    y = x * cos
    (a, b), (turned_a, turned_b) = pairs(x, interleaved), pairs(y, interleaved)
    turned_a.addcmul_(b, sin, value=-1)
    turned_b.addcmul_(a, sin)
    return y


class Turn(torch.autograd.Function):
    """`turned_by`, whose gradient turns back: three calls each way, 2 % off a small Llama's step on a CPU."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):  # type: ignore[override]
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return turned_by(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return turned_by(g, cos, -sin, ctx.interleaved), None, None, None


class EveryNth(Position):
    """The position `others` in most layers, and `nth` in every `every`-th; both may only rotate.

    With `nth` no position: NoPE in chosen layers (SmolLM3; Yang et al. 2025, arXiv:2501.18795). With
    another base: Gemma 3's global layers (arXiv:2503.19786, §2). Raises ValueError unless `every` is
    a whole number, at least 1.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        *,
        nth: Callable[..., Position],
        others: Callable[..., Position],
        every: int,
    ):
        super().__init__(d_model, n_heads, d_head)
        check_whole("pos.every", every)
        self.nth, self.others = nth(d_model, n_heads, d_head), others(d_model, n_heads, d_head)
        self.every = every

    def rotations(self, positions_BT: Int[Tensor, "_ T"], n_layers: int) -> list[Rotation]:
        nth, others = self.nth.rotate(positions_BT), self.others.rotate(positions_BT)
        return [others if (layer + 1) % self.every else nth for layer in range(n_layers)]


class ALiBi(Position):
    """score(t, s) - m_h·(t - s), m_h a geometric sequence over heads.

    Press et al. 2021, arXiv:2108.12409, §3. For H a power of two m_h = 2^(-8h/H), h = 1 … H. Otherwise the
    slopes of the next lower power of two, then every second one of the next higher, as in the authors' code.
    """

    slopes_H: Tensor

    def __init__(self, d_model: int, n_heads: int, d_head: int):
        super().__init__(d_model, n_heads, d_head)
        self.register_buffer("slopes_H", torch.tensor(alibi_slopes(n_heads)), persistent=False)

    @property
    def bias(self) -> ScoreBias:
        slopes_H = self.slopes_H
        return lambda head, query, key: -slopes_H[head] * (query - key)


class T5Relative(Position):
    """score(t, s) + W[bucket(t - s), head], one table for all layers.

    Raffel et al. 2020, arXiv:1910.10683, §2.1. Half of the buckets are single distances, the others grow with
    the logarithm of the distance up to `max_distance`, beyond which all share the last.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, *, n_buckets: int, max_distance: int):
        super().__init__(d_model, n_heads, d_head)
        if n_buckets < 2 or max_distance <= n_buckets // 2:
            raise ValueError(
                f"pos.n_buckets={n_buckets} must be at least 2, "
                f"and max_distance={max_distance} more than half of them"
            )
        self.weight = nn.Parameter(torch.empty(n_buckets, n_heads))
        self.n_buckets, self.max_distance = n_buckets, max_distance

    def bucket(self, distance: Tensor) -> Tensor:
        """The row of the table for each distance, 0 or more."""
        exact = self.n_buckets // 2
        growth = math.log(self.max_distance / exact)
        far = torch.log(distance.clamp(min=1).float() / exact) / growth * (self.n_buckets - exact)
        return torch.where(distance < exact, distance, (exact + far.long()).clamp(max=self.n_buckets - 1))

    @property
    def bias(self) -> ScoreBias:
        # A key later than its query is hidden anyway; distance 0 keeps the table's index in range.
        return lambda head, query, key: self.weight[self.bucket((query - key).clamp(min=0)), head]


def inverse_frequencies(width: int, theta: float, device: torch.device) -> Float[Tensor, " F"]:
    """θ^(-2i/width) for i = 0 … width/2 - 1."""
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def alibi_slopes(n_heads: int) -> list[float]:
    """m_h of each head, as `ALiBi` says."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-8 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)]
    return slopes + finer[: n_heads - power]
