"""How far rounding may take a kernel from the numbers it stands for, whatever the order of its sums.

A sum of n products is off by n·u·Σ|a|·|b| at most, to first order: Higham 2002, *Accuracy and Stability of
Numerical Algorithms*, §3.1 and §3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 2**-24
"""Half the distance from 1 to the next number in float32."""


def attention(
    q_BHTE: Tensor,
    k_BHSE: Tensor,
    v_BHSC: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale·QKᵀ) + bias)·V in float64 over the keys that are seen, and a bound on what float32
    makes of it.

    A score is off by δ: its sum's rounding, and a few of its own, the bias's and the largest score's, which
    is taken off. Key s of weight w_s is then off by δ_s + Σ w·δ of itself, to first order, and by a few
    roundings for each term of the two sums over keys.
    """
    q, k, v = q_BHTE.double(), k_BHSE.double(), v_BHSC.double()
    score = scale * q @ k.mT
    off = UNIT * (q.shape[-1] + 4) * abs(scale) * (q.abs() @ k.abs().mT)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
        off = off + 4 * UNIT * softcap
    if bias is not None:
        score = score + bias
        off = off + 4 * UNIT * bias.abs()
    largest = score.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    off = (off + 4 * UNIT * (score.abs() + largest.abs())).masked_fill(~seen, 0)
    weights = score.masked_fill(~seen, -torch.inf).softmax(-1)
    sizes, spread = weights @ v.abs(), weights * off
    bound = spread @ v.abs() + (spread.sum(-1, keepdim=True) + UNIT * (2 * k.shape[2] + 16)) * sizes
    return weights @ v, bound


def products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x·Wᵀ + b in float64, and a bound on what float32 makes of it."""
    exact, sizes = x.double() @ weight.double().mT, x.double().abs() @ weight.double().abs().mT
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    return exact, UNIT * (x.shape[-1] + 1) * sizes


def assert_within(found: Tensor, exact: Tensor, bound: Tensor) -> None:
    off = (found.double() - exact).abs()
    worst = (off / bound).max().item()
    assert (off <= bound).all(), f"off by up to {off.max():.2e}, {worst:.2f} times what rounding explains"
