"""What each token computes by itself: `ffn=`."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.checks import check_whole
from scantling.model.linear import Linear

Activation = Callable[[], nn.Module]


class ReLU2(nn.Module):
    """max(x, 0)². So et al. 2021 (Primer), arXiv:2109.08668, §4."""

    def forward(self, x: Float[Tensor, ...]) -> Float[Tensor, ...]:
        return nn.functional.relu(x).square()


class FeedForward(nn.Module):
    """out(act(up(x))), hidden width F = d_ff. Vaswani et al. 2017, arXiv:1706.03762, §3.3."""

    def __init__(self, d_model: int, d_ff: int, layer: int, *, activation: Activation, bias: bool):
        super().__init__()
        self.activation = activation()
        self.up = Linear(d_model, d_ff, bias=bias)
        self.out = Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.out(self.activation(self.up(x_BTD)))


class GatedFeedForward(nn.Module):
    """out(act(gate(x)) · up(x)). Shazeer 2020, arXiv:2002.05202, eq. 6.

    Three matrices instead of two: the hidden width F is 2/3 of d_ff, rounded to a multiple of `multiple_of`,
    so that parameters match the ungated layer of width d_ff (ibid., §3).
    """

    def __init__(
        self, d_model: int, d_ff: int, layer: int, *, activation: Activation, bias: bool, multiple_of: int
    ):
        super().__init__()
        width = gated_width(d_ff, multiple_of)
        self.activation = activation()
        self.gate = Linear(d_model, width, bias=bias)
        self.up = Linear(d_model, width, bias=bias)
        self.out = Linear(width, d_model, bias=bias)

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.out(self.activation(self.gate(x_BTD)) * self.up(x_BTD))


def gated_width(d_ff: int, multiple_of: int) -> int:
    """Two thirds of `d_ff`, rounded to a multiple of `multiple_of`.

    Raises ValueError unless `multiple_of` is a whole number, at least 1.
    """
    check_whole("multiple_of", multiple_of)
    return max(1, round(2 * d_ff / 3 / multiple_of)) * multiple_of
