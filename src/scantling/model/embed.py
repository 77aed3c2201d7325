"""Token embedding and output head: `embed=`."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor, nn


class Embedding(nn.Module, ABC):
    """Base of both options: tokens_BT -> x_BTD by a table of V rows."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)

    def forward(self, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return self.tokens(tokens_BT)

    @abstractmethod
    def logits(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Scores of every vocabulary entry as the next token."""


class Tied(Embedding):
    """logits = x·Wᵀ with W the embedding table. Press & Wolf 2017, arXiv:1608.05859; GPT-2."""

    def logits(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return nn.functional.linear(x_BTD, self.tokens.weight)


class Untied(Embedding):
    """logits = x·Hᵀ with a matrix H of the head's own. LLaMA."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__(vocab_size, d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def logits(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        return self.head(x_BTD)
