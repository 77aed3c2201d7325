"""Token embedding and output matrix: `embed=`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model.checks import check_whole
from scantling.model.linear import Linear
from scantling.model.norm import NormFactory


class Embedding(nn.Module, ABC):
    """Base of every option: tokens_BT -> norm(scale · D^width_exponent · table[tokens]).

    The output head multiplies by `output`, after `narrowed`: logits = narrowed(x)·outputᵀ +
    output_bias. Gemma has a `width_exponent` of ½, Granite a `scale`. `norm` null is none, a LayerNorm
    in BLOOM (arXiv:2211.05100, §3.2.2).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        width: int,
        scale: float,
        width_exponent: float,
        norm: NormFactory | None,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.scale = scale * d_model**width_exponent
        self.norm = nn.Identity() if norm is None else norm(d_model)

    def forward(self, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x_BTD = self.widened(self.tokens(tokens_BT))
        return self.norm(x_BTD if self.scale == 1.0 else x_BTD * self.scale)

    def widened(self, x_BTR: Float[Tensor, "B T _"]) -> Float[Tensor, "B T D"]:
        """A table row as a vector of the model's width."""
        return x_BTR

    def narrowed(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B _"]:
        """The last hidden vector in the width of `output`."""
        return x_BTD

    @property
    @abstractmethod
    def output(self) -> Float[Tensor, "V _"]:
        """One row a vocabulary entry."""

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits, one number a vocabulary entry; None: nothing."""
        return None


class Tied(Embedding):
    """logits = x·Wᵀ with W the embedding table. Press & Wolf 2017, arXiv:1608.05859; GPT-2."""

    def __init__(
        self, vocab_size: int, d_model: int, *, scale: float, width_exponent: float, norm: NormFactory | None
    ):
        super().__init__(
            vocab_size, d_model, width=d_model, scale=scale, width_exponent=width_exponent, norm=norm
        )

    @property
    def output(self) -> Float[Tensor, "V _"]:
        return self.tokens.weight


class Untied(Embedding):
    """logits = x·Hᵀ + b with a matrix H of the head's own. LLaMA (without b), GPT-J (with)."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        scale: float,
        width_exponent: float,
        norm: NormFactory | None,
        bias: bool,
    ):
        super().__init__(
            vocab_size, d_model, width=d_model, scale=scale, width_exponent=width_exponent, norm=norm
        )
        self.head = Linear(d_model, vocab_size, bias=bias)

    @property
    def output(self) -> Float[Tensor, "V _"]:
        return self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        return self.head.bias


class Factorised(Embedding):
    """A table of narrow rows, V×R, and a matrix R×D; logits = (x·U)·Wᵀ with U of its own.

    Lan et al. 2019 (ALBERT), arXiv:1909.11942, §3.1.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rank: int,
        scale: float,
        width_exponent: float,
        norm: NormFactory | None,
    ):
        check_whole("embed.rank", rank)
        super().__init__(
            vocab_size, d_model, width=rank, scale=scale, width_exponent=width_exponent, norm=norm
        )
        self.wide = Linear(rank, d_model, bias=False)
        self.narrow = Linear(d_model, rank, bias=False)

    def widened(self, x_BTR: Float[Tensor, "B T _"]) -> Float[Tensor, "B T D"]:
        return self.wide(x_BTR)

    def narrowed(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B _"]:
        return self.narrow(x_BTD)

    @property
    def output(self) -> Float[Tensor, "V _"]:
        return self.tokens.weight
