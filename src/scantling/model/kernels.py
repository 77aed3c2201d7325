"""Which kernel computes attention: a function of shapes and settings, and a table for each processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from scantling.model.processors import Processor

Kernel = Literal["flex", "formula", "sdpa", "sdpa in float32"]
"""FlexAttention, compiled; softmax(…)·V written out as two batched products; `scaled_dot_product_attention`,
for which PyTorch takes its flash kernel or its own formula, in the precision of the queries or in float32.
"""


@dataclass(frozen=True)
class CPUKernels:
    """Where a CPU is faster with the formula, and what serves beyond."""

    many_numbers: int
    """Numbers in the keys beyond which the formula serves a single query of each row."""
    few_keys: int
    """Keys up to which the formula serves several queries."""
    few_queries: int
    """Queries for each channel of a head up to which the formula serves them."""
    beyond: Kernel


FLOAT32: dict[Processor, CPUKernels] = {
    "amx": CPUKernels(many_numbers=2**19, few_keys=64, few_queries=0, beyond="sdpa"),
    "zen4": CPUKernels(many_numbers=2**19, few_keys=0, few_queries=0, beyond="sdpa"),
    "zen5": CPUKernels(many_numbers=2**19, few_keys=64, few_queries=0, beyond="sdpa"),
    "other": CPUKernels(many_numbers=2**19, few_keys=64, few_queries=0, beyond="sdpa"),
}
"""A single query of each of many rows is faster as two batched products. So are several queries
up to 64 keys, but on Zen 4.
"""

BFLOAT16: dict[Processor, CPUKernels] = {
    "amx": CPUKernels(many_numbers=2**16, few_keys=64, few_queries=0, beyond="sdpa"),
    "zen4": CPUKernels(many_numbers=2**16, few_keys=0, few_queries=8, beyond="sdpa in float32"),
    "zen5": CPUKernels(many_numbers=2**16, few_keys=64, few_queries=8, beyond="sdpa in float32"),
    "other": CPUKernels(many_numbers=2**16, few_keys=64, few_queries=8, beyond="sdpa in float32"),
}
"""Without AMX the flash kernel is slow in bfloat16. Up to T = 8·E the formula takes no more memory than a
cast to float32, which serves longer contexts.
"""


def choose_kernel(
    q_BHTE: torch.Size,
    k_BKSE: torch.Size,
    dtype: torch.dtype,
    device: str,
    *,
    plain: bool,
    softcap: float | None,
    cached: bool,
    dropout: float,
    processor: Processor,
) -> Kernel:
    """The kernel for queries and keys of these shapes. `plain`: only causality masks, no bias, no cap."""
    if device == "cuda" and not (plain or cached or dropout):
        return "flex"  # a bias, a pattern or a cap would rule the flash kernel out
    if softcap is not None:
        return "formula"  # no other kernel caps
    if device != "cpu":
        return "sdpa"
    on_cpu = (BFLOAT16 if dtype == torch.bfloat16 else FLOAT32)[processor]
    T, S, E = q_BHTE[2], k_BKSE[2], q_BHTE[3]
    faster = k_BKSE.numel() > on_cpu.many_numbers if T == 1 else on_cpu.few_keys >= S
    return "formula" if faster or on_cpu.few_queries * E >= T else on_cpu.beyond


def forms_scores(
    kernel: Kernel, device: str, *, same_widths: bool, learned_bias: bool, dropout: float
) -> bool:
    """Whether the kernel forms all scores, to keep them for the backward pass.

    On a CPU PyTorch's `scaled_dot_product_attention` does, for values of another width than keys, for a bias
    with a gradient and for dropout.
    """
    if kernel in ("sdpa", "sdpa in float32"):
        return device == "cpu" and (not same_widths or learned_bias or dropout > 0)
    return kernel == "formula"
