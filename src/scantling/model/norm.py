"""Normalisation layers: `norm=`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scantling.model.checks import check_not_negative

NormFactory = Callable[[int], nn.Module]
"""width -> a norm over the last axis."""


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) · w + b, over D. Ba et al. 2016, arXiv:1607.06450.

    `weight` and `bias` may be left out: without bias as in nanoGPT and Cohere's Command R, without
    both as in OLMo 1 (arXiv:2402.00838, §2.1). With `unit_offset` the factor is 1 + w, w starting
    at 0 (Nemotron-4, arXiv:2402.16819).
    """

    def __init__(self, d_model: int, *, eps: float, weight: bool, bias: bool, unit_offset: bool):
        super().__init__()
        check_not_negative("eps", eps)
        start = torch.zeros if unit_offset else torch.ones
        self.weight = nn.Parameter(start(d_model)) if weight else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.width, self.eps, self.unit_offset = (d_model,), eps, unit_offset

    def forward(self, x_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        weight = self.weight
        if weight is not None and self.unit_offset:
            weight = 1 + weight
        return nn.functional.layer_norm(x_BTD, self.width, weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · w, over D. Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    The statistics are taken in float32 whatever the precision of x, as in Llama. With `unit_offset` the
    factor is 1 + w, w starting at 0, as in Gemma (arXiv:2403.08295).
    """

    def __init__(self, d_model: int, *, eps: float, unit_offset: bool):
        super().__init__()
        check_not_negative("eps", eps)
        self.weight = nn.Parameter(torch.zeros(d_model) if unit_offset else torch.ones(d_model))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        weight = 1 + self.weight if self.unit_offset else self.weight
        float32 = x_BTD.dtype == weight.dtype == torch.float32
        # One fused kernel on a GPU, one call while decoding; on a CPU torch's is slow to differentiate.
        if x_BTD.is_cuda or (float32 and not torch.is_grad_enabled()):
            return nn.functional.rms_norm(x_BTD, weight.shape, weight, self.eps)
        if float32 and x_BTD.is_cpu and not torch.compiler.is_compiling():
            return RMSNormOnCPU.apply(x_BTD, weight, self.eps)  # type: ignore[no-any-return]
        x = x_BTD.float()
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (x * scale).type_as(x_BTD) * weight


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm's formula and its gradient in float32, a third to two thirds faster on a CPU than by autograd.

    With r = 1 / sqrt(mean(x²) + eps) and g' = g·w, dx = r·(g' - x·r·mean(g'·x·r)). That is what LayerNorm's
    backward gives for a mean of 0, but for the term r·mean(g') that it takes off and that is put back here.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[override]
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        x, weight, r = ctx.saved_tensors
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, weight.shape, torch.zeros_like(r), r, weight, None, [*ctx.needs_input_grad[:2], False]
        )
        if dx is not None:
            dx.add_((g @ weight)[..., None].mul_(r), alpha=1 / x.shape[-1])
        return dx, dw, None


class NoNorm(nn.Module):
    """y = x. With it a block is the bare residual branch."""

    def __init__(self, d_model: int):
        super().__init__()

    def forward(self, x_BTD: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return x_BTD
