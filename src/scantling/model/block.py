"""How a layer joins attention, feed-forward, norms and the residual stream: `block=`."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.attn import Mixer
from scantling.model.checks import check_below_one
from scantling.model.norm import NormFactory


class Residual(nn.Module):
    """What happens to a branch before it joins the residual stream: it is scaled, dropped out or left out.

    Stochastic depth leaves the branch out for a whole sequence with a probability that grows
    linearly with depth up to `drop_path`, and divides by the probability of staying. Huang et
    al. 2016, arXiv:1603.09382, §3.
    """

    def __init__(self, layer: int, n_layers: int, *, scale: float, dropout: float, drop_path: float):
        super().__init__()
        check_below_one("block.drop_path", drop_path)
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.drop_path = drop_path * (layer + 1) / n_layers

    def forward(self, branch_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if self.dropout.p:
            branch_BTD = self.dropout(branch_BTD)
        if self.scale != 1.0:
            branch_BTD = branch_BTD * self.scale
        if self.training and self.drop_path:
            stays = 1 - self.drop_path
            kept_B11 = torch.rand(len(branch_BTD), 1, 1, device=branch_BTD.device) < stays
            branch_BTD = branch_BTD * kept_B11 / stays
        return branch_BTD


class Block(nn.Module):
    """Base of every option: keeps attention and feed-forward, and what scales and drops their branches."""

    final_norm: ClassVar[bool]
    """Whether the last block's output still needs a norm before the output head."""

    def __init__(
        self,
        d_model: int,
        layer: int,
        n_layers: int,
        *,
        attn: Mixer,
        ffn: nn.Module,
        norm: NormFactory,
        residual_scale: float,
        dropout: float,
        drop_path: float,
    ):
        super().__init__()
        self.attn, self.ffn = attn, ffn
        self.add_norms(norm, d_model)
        self.residual = Residual(layer, n_layers, scale=residual_scale, dropout=dropout, drop_path=drop_path)

    def add_norms(self, norm: NormFactory, d_model: int) -> None:
        """The norms of the two branches; options with fewer norms, or with norms elsewhere, override it."""
        self.attn_norm, self.ffn_norm = norm(d_model), norm(d_model)

    @staticmethod
    def out_scale(n_layers: int) -> float:
        """Of the initial weights of layers that write to the residual stream: GPT-2's 1/√(2·n_layers)."""
        return (2 * n_layers) ** -0.5


class PreNorm(Block):
    """x + attn(norm(x)), then x + ffn(norm(x)); a final norm before the head.

    Xiong et al. 2020, arXiv:2002.04745, fig. 1b.
    """

    final_norm = True

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.residual(self.attn(self.attn_norm(x_BTD), *shared))
        return x_BTD + self.residual(self.ffn(self.ffn_norm(x_BTD)))


class PostNorm(Block):
    """norm(x + attn(x)), then norm(x + ffn(x)). Vaswani et al. 2017, arXiv:1706.03762, §3.1; GPT-1.

    Needs warm-up where pre-norm does not (Xiong et al. 2020, §3).
    """

    final_norm = False

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = self.attn_norm(x_BTD + self.residual(self.attn(x_BTD, *shared)))
        return self.ffn_norm(x_BTD + self.residual(self.ffn(x_BTD)))


class DeepNorm(Block):
    """norm(α·x + attn(x)), then norm(α·x + ffn(x)); α = (2·n_layers)^¼.

    Wang et al. 2022, arXiv:2203.00555, fig. 2. Layers that write to the residual stream start smaller by β =
    (8·n_layers)^-¼, where the paper scales those of values and the whole feed-forward.
    """

    final_norm = False

    def __init__(self, d_model: int, layer: int, n_layers: int, **parts):
        super().__init__(d_model, layer, n_layers, **parts)
        self.alpha = (2 * n_layers) ** 0.25

    @staticmethod
    def out_scale(n_layers: int) -> float:
        return (8 * n_layers) ** -0.25

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = self.attn_norm(self.alpha * x_BTD + self.residual(self.attn(x_BTD, *shared)))
        return self.ffn_norm(self.alpha * x_BTD + self.residual(self.ffn(x_BTD)))


class Reordered(Block):
    """x + norm(attn(x)), then x + norm(ffn(x)): each branch is normed behind, and the stream not at all.

    OLMo 2, arXiv:2501.00656, §3.2; Liu et al. 2021 (Swin v2), arXiv:2111.09883, §3.2.
    """

    final_norm = True

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.residual(self.attn_norm(self.attn(x_BTD, *shared)))
        return x_BTD + self.residual(self.ffn_norm(self.ffn(x_BTD)))


class Sandwich(Block):
    """x + norm(attn(norm(x))), then x + norm(ffn(norm(x))).

    Ding et al. 2021 (CogView), arXiv:2105.13290, §2.4; Gemma 2, arXiv:2408.00118, §2.
    """

    final_norm = True

    def add_norms(self, norm: NormFactory, d_model: int) -> None:
        super().add_norms(norm, d_model)
        self.attn_post_norm, self.ffn_post_norm = norm(d_model), norm(d_model)

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.residual(self.attn_post_norm(self.attn(self.attn_norm(x_BTD), *shared)))
        return x_BTD + self.residual(self.ffn_post_norm(self.ffn(self.ffn_norm(x_BTD))))


class Parallel(Block):
    """y = norm(x); x + attn(y) + ffn(y). Wang & Komatsuzaki 2021, GPT-J; PaLM, arXiv:2204.02311, §2."""

    final_norm = True

    def add_norms(self, norm: NormFactory, d_model: int) -> None:
        self.norm = norm(d_model)

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        y_BTD = self.norm(x_BTD)
        return x_BTD + self.residual(self.attn(y_BTD, *shared)) + self.residual(self.ffn(y_BTD))


class ParallelTwoNorms(Block):
    """x + attn(norm(x)) + ffn(norm'(x)). GPT-NeoX, arXiv:2204.06745, §2.1.2."""

    final_norm = True

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        attended = self.residual(self.attn(self.attn_norm(x_BTD), *shared))
        return x_BTD + attended + self.residual(self.ffn(self.ffn_norm(x_BTD)))


class ReZero(Block):
    """x + α·attn(x), then x + α·ffn(x); one α a layer, which starts at 0, and no norm at all.

    Bachlechner et al. 2020, arXiv:2003.04887, §3.
    """

    final_norm = False

    def add_norms(self, norm: NormFactory, d_model: int) -> None:
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Float[Tensor, "B T D"], *shared) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.residual(self.attn(x_BTD, *shared)) * self.alpha
        return x_BTD + self.residual(self.ffn(x_BTD)) * self.alpha
