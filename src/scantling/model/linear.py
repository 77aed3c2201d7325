"""Linear layers, on the faster of the two libraries that PyTorch multiplies matrices with on a CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from scantling.model import processors
from scantling.model.processors import Processor


@dataclass(frozen=True)
class Limits:
    """What stays with MKL, PyTorch's choice, where other products go to oneDNN."""

    small: int
    """Without gradients: entries of W up to which it does."""
    little: int
    """With gradients: multiplications up to which it does."""
    weight_gradients: bool
    """Whether gradients of weights do."""


ONEDNN: dict[Processor, Limits] = {
    "zen4": Limits(small=2**16, little=2**24, weight_gradients=True),
    "zen5": Limits(small=0, little=0, weight_gradients=False),
}
"""Processors whose float32 products go to oneDNN: MKL keeps to AVX2 on AMD's. Exact float32 in
both. AVX-512 is 256 bits wide inside of Zen 4: there MKL is ahead where little is multiplied, and
in the gradients of weights.
"""

FEW = 8
"""Rows of x up to which, without gradients, MKL is given slices of W as a batch: it reads W with one thread
and at a third of memory's speed as one matrix, with all threads and as fast as memory is as a batch.
"""


class Linear(nn.Linear):
    """y = x·Wᵀ + b."""

    def forward(self, input: Float[Tensor, "*N D"]) -> Float[Tensor, "*N F"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*N D"], weight: Float[Tensor, "F D"], bias: Float[Tensor, " F"] | None = None
) -> Float[Tensor, "*N F"]:
    """x·Wᵀ + b, as `torch.nn.functional.linear`."""
    limits = ONEDNN.get(processors.HERE)
    if (
        limits is not None
        and x.is_cpu
        and x.numel()  # an expert may be given no token
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        if torch.is_grad_enabled():
            if x.numel() * len(weight) > limits.little:
                return OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-any-return]
        elif weight.is_mkldnn:
            return onednn(x, weight, bias)
        elif weight.numel() > limits.small:
            few = x.numel() <= FEW * x.shape[-1]
            return by_slices(x, weight, bias) if few else onednn(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def goes_to_onednn() -> bool:
    """Whether this processor's float32 products go to oneDNN, except those that `Limits` leaves to MKL."""
    return processors.HERE in ONEDNN


def by_slices(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As a batched product of slices of W, each with all of x."""
    n = math.gcd(len(weight), 2 * torch.get_num_threads())
    x_ND = x.reshape(-1, x.shape[-1])
    y_NF = torch.bmm(weight.unflatten(0, (n, -1)), x_ND.T.expand(n, -1, -1)).flatten(0, 1).T.contiguous()
    y = y_NF.view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b by oneDNN, through an operator of PyTorch's compiler; it has no gradient of its own."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Float[Tensor, "F D"]) -> Tensor:
    """W in oneDNN's own layout, a third faster to read for a few rows of x.

    It serves `linear` alone, without gradients.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight)


class OneDNNLinear(torch.autograd.Function):
    """dx = g·W, dW = gᵀ·x, db = Σ g, each again a linear layer's product."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = onednn(g, weight.T) if needs_x else None
        g_NF = g.reshape(-1, g.shape[-1])
        dw = weight_gradient(g_NF, x.reshape(-1, x.shape[-1])) if needs_weight else None
        return dx, dw, g_NF.sum(0) if needs_bias else None


def weight_gradient(g_NF: Tensor, x_ND: Tensor) -> Tensor:
    """The gradient of W, gᵀ·x; by MKL where `Limits` says so."""
    limits = ONEDNN.get(processors.HERE)
    stays = limits is not None and limits.weight_gradients
    return g_NF.T @ x_ND if stays else onednn(g_NF.T, x_ND.T)


if torch.backends.mkldnn.is_available():

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def onednn_flops(x_shape, weight_shape, *_, out_shape=None, **__) -> int:
        """For torch's own counter: a multiplication and an addition for each entry of W, for each vector."""
        return 2 * x_shape.numel() * weight_shape[0]
