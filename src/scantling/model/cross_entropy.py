"""-log p(target) from hidden vectors and an output matrix; by chunks of tokens for a large vocabulary."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scantling.model.linear import goes_to_onednn, linear

IGNORED = -100
"""A target that is not to be predicted."""

CHUNK = 2**25
"""Logits that stand in memory at once: 128 MiB in float32.

Up to this many in all, one piece is fastest on a CPU. Chunks of half the size take 1.1 to 1.3 times as long,
as the matrix's gradient is added up more often.
"""

CHUNK_ON_GPU = 2**27
"""CHUNK's 667 tokens of GPT-2's vocabulary are too few for a GPU's processors; reckoned, not measured."""


def chunk(on_gpu: bool) -> int:
    """Logits up to which one piece is formed, and of each piece beyond."""
    return CHUNK_ON_GPU if on_gpu else CHUNK


def chunk_rows(vocab_size: int, on_gpu: bool) -> int:
    """Tokens of a chunk."""
    return max(1, chunk(on_gpu) // vocab_size)


def negative_log_likelihood(
    logits_BTV: Float[Tensor, "*B V"], targets_BT: Int[Tensor, "*B"]
) -> Float[Tensor, ""]:
    """Sum of -log p(target) in nats over targets that are not ignored, in float32."""
    logits, targets = logits_BTV.flatten(0, -2).float(), targets_BT.flatten()
    return nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def z_gradient(
    logits_BTV: Float[Tensor, "*B V"], targets_BT: Int[Tensor, "*B"], weight: float
) -> Float[Tensor, ""]:
    """0, with the gradient of `weight`·Σ ln²Z, Z = Σ exp(logits): the z-loss of PaLM, arXiv:2204.02311, §5.

    It keeps logits from drifting, and no reported loss contains it.
    """
    log_z_BT = logits_BTV.float().logsumexp(-1)
    loss = weight * log_z_BT.square().masked_fill(targets_BT == IGNORED, 0.0).sum()
    return loss - loss.detach()


def chunked_negative_log_likelihood(
    x_ND: Float[Tensor, "N D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"] | None,
    targets_N: Int[Tensor, " N"],
    *,
    scale: float,
    softcap: float | None,
    z_loss: float,
) -> Float[Tensor, ""]:
    """`negative_log_likelihood` of cap(scale·(x·Wᵀ + b)), cap(z) = c·tanh(z/c), with `z_gradient`.

    The logits of `chunk_rows` tokens are formed at once, and turned into their gradients on the
    spot: the backward pass only multiplies these by its own gradient. Products are as autocast has
    them, all else is float32.
    """
    device = x_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    if torch.is_grad_enabled():
        return Chunks.apply(  # type: ignore[no-any-return]
            x_ND, weight_VD, bias_V, targets_N, dtype, scale, softcap, z_loss
        )
    rows = chunk_rows(len(weight_VD), x_ND.is_cuda)
    nats = torch.zeros((), device=x_ND.device)
    for x, targets in zip(x_ND.split(rows), targets_N.split(rows), strict=True):
        logits = capped(linear(x, weight_VD, bias_V).float(), scale, softcap)
        nats += negative_log_likelihood(logits, targets)
    return nats


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """cap(scale·logits), written over the logits."""
    if scale != 1.0:
        logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class Chunks(torch.autograd.Function):
    """∂/∂logits = (1 + 2·w·ln Z)·softmax(logits) - onehot(target), w the weight of the z-loss.

    Ignored targets have a gradient of 0. A cap multiplies it by 1 - (logit/c)², and the scale by itself.
    """

    @staticmethod
    def forward(ctx, x_ND, weight, bias, targets_N, dtype, scale, softcap, z_loss):  # type: ignore[override]
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND, in_dtype = x_ND.to(dtype), x_ND.dtype
            cast, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            dx, dw = torch.empty_like(x_ND), torch.zeros_like(weight)
            db = None if bias is None else torch.zeros_like(bias)
            nats = torch.zeros((), device=x_ND.device)
            rows = chunk_rows(len(weight), x_ND.is_cuda)
            for x, targets, dx_chunk in zip(
                x_ND.split(rows), targets_N.split(rows), dx.split(rows), strict=True
            ):
                logits = capped(linear(x, cast, cast_bias).float(), scale, softcap)
                valid = (targets != IGNORED)[:, None]
                targets = targets.clamp(min=0)[:, None]
                log_p = logits.log_softmax(-1)
                of_target = log_p.gather(-1, targets)
                nats -= (of_target * valid).sum()
                each = valid.float()
                if z_loss:
                    each = each * (1 + 2 * z_loss * (logits.gather(-1, targets) - of_target))
                g = log_p.exp_().mul_(each).scatter_add_(-1, targets, -valid.float())
                if softcap is not None:
                    g.mul_(logits.div_(softcap).square_().neg_().add_(1))
                del logits
                g = (g if scale == 1.0 else g.mul_(scale)).to(dtype)
                dx_chunk.copy_(linear(g, cast.T))
                if goes_to_onednn() or dtype != dw.dtype:
                    dw += linear(g.T, x.T)
                else:
                    dw.addmm_(g.T, x)
                if db is not None:
                    db += g.sum(0, dtype=db.dtype)
        ctx.save_for_backward(dx.to(in_dtype), dw, db)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        dx, dw, db = ctx.saved_tensors
        # In place, as there is no room for two; torch would refuse a second pass over what has changed.
        return dx.mul_(g), dw.mul_(g), None if db is None else db.mul_(g), None, None, None, None, None
