"""Linear layers that multiply 8-bit floating-point numbers, `trainer.precision=fp8`: torchao's."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch
from torch import nn

from scantling.model.decoder import Decoder
from scantling.model.moe import MixtureOfExperts

TILE = 16
"""Both sides of a matrix that GPUs multiply in 8 bits are multiples of it."""


def check_float8(precision: str, device: torch.device, decoder: Decoder) -> None:
    """Raise ValueError without torchao, for GPUs older than Ada and Hopper, and where no layer fits."""
    if precision != "fp8":
        return
    if find_spec("torchao") is None:
        raise ValueError("trainer.precision=fp8 needs torchao: pip install torchao, or use bf16")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            "trainer.precision=fp8 needs a GPU of compute capability 8.9 (Ada, Hopper or newer), "
            f"and {torch.cuda.get_device_name(device)} is older: use bf16"
        )
    if not any(fits(layer) for layer in linear_layers(decoder)):
        raise ValueError(
            f"trainer.precision=fp8: no linear layer of a block has sides that are multiples of {TILE}: "
            "choose model.d_model and d_ff so, or use bf16"
        )


def linear_layers(decoder: Decoder) -> list[nn.Linear]:
    """Linear layers of the blocks, without routers and experts, whose numbers of tokens are any."""
    parts = list(decoder.blocks.modules())
    experts = {part for module in parts if isinstance(module, MixtureOfExperts) for part in module.modules()}
    return [part for part in parts if isinstance(part, nn.Linear) and part not in experts]


def fits(layer: nn.Linear) -> bool:
    """Whether a GPU multiplies by its matrix in 8 bits."""
    return layer.in_features % TILE == layer.out_features % TILE == 0


def convert_to_float8(decoder: Decoder) -> str:
    """Put torchao's layer, with the same weights and names, for each linear layer of the blocks that fits.

    Each product rounds inputs and weights to e4m3 and gradients to e5m2, scaled to their range by the largest
    entry of the tensor; its sums are of higher precision. Micikevicius et al. 2022, arXiv:2209.05433. Returns
    a line that says how many layers were converted.
    """
    for name in ("torchao", "torch.utils._pytree"):  # their advice is for those who build them
        logging.getLogger(name).setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = linear_layers(decoder)
    fitting = {layer for layer in layers if fits(layer)}
    config = Float8LinearConfig(pad_inner_dim=True)  # numbers of tokens that are not multiples of 16
    convert_to_float8_training(
        decoder.blocks, config=config, module_filter_fn=lambda module, name: module in fitting
    )
    return f"fp8 in {len(fitting)} of {len(layers)} linear layers of the blocks"
