"""Normalisation layers: `norm=`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over D. Ba et al. 2016, arXiv:1607.06450.

    `bias=False` leaves the bias out, as nanoGPT does.
    """

    def __init__(self, d_model: int, *, eps: float, bias: bool):
        super().__init__(d_model, eps=eps, bias=bias)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight, over D. Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    The statistics are taken in float32 whatever the precision of x, as in Llama.
    """

    def __init__(self, d_model: int, *, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        if x_BTD.is_cuda:  # one fused kernel there; on CPU torch's own is slower than the formula
            return nn.functional.rms_norm(x_BTD, self.weight.shape, self.weight, self.eps)
        x = x_BTD.float()
        square = torch.linalg.vecdot(x, x)[..., None]  # cheaper to differentiate than x.square()
        scale = torch.rsqrt(square / x.shape[-1] + self.eps)
        return (x * scale).type_as(x_BTD) * self.weight


class NoNorm(nn.Module):
    """y = x. With it a block is the bare residual branch."""

    def __init__(self, d_model: int):
        super().__init__()

    def forward(self, x_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return x_BTD
