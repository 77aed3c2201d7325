"""How a layer joins attention, feed-forward, norms and the residual stream: `block=`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.attn import Mixer

NormFactory = Callable[[int], nn.Module]


class Block(nn.Module):
    """Base of every option: builds two norms, keeps attention and feed-forward, drops out each branch."""

    final_norm: ClassVar[bool]
    """Whether the last block's output still needs a norm before the output head."""

    def __init__(self, d_model: int, *, attn: Mixer, ffn: nn.Module, norm: NormFactory, dropout: float):
        super().__init__()
        self.attn_norm, self.attn = norm(d_model), attn
        self.ffn_norm, self.ffn = norm(d_model), ffn
        self.dropout = nn.Dropout(dropout)


class PreNorm(Block):
    """x + attn(norm(x)), then x + ffn(norm(x)); a final norm before the head. Xiong et al. 2020, arXiv:2002.04745, fig. 1b."""

    final_norm = True

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.dropout(self.attn(self.attn_norm(x_BTD), *shared))
        return x_BTD + self.dropout(self.ffn(self.ffn_norm(x_BTD)))


class PostNorm(Block):
    """norm(x + attn(x)), then norm(x + ffn(x)). Vaswani et al. 2017, arXiv:1706.03762, §3.1; GPT-1.

    Needs warm-up where pre-norm does not (Xiong et al. 2020, §3).
    """

    final_norm = False

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = self.attn_norm(x_BTD + self.dropout(self.attn(x_BTD, *shared)))
        return self.ffn_norm(x_BTD + self.dropout(self.ffn(x_BTD)))
