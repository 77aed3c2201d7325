"""What Hydra composed from the command line: the options chosen, and the decoder that they make."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.overrides import TorchFunctionMode

from scantling.model.decoder import Decoder

PARTS = ("norm", "pos", "attn", "ffn", "block", "embed", "head")


def choices() -> dict[str, str]:
    """Which option each group took."""
    chosen = HydraConfig.get().runtime.choices
    return {group: option for group, option in chosen.items() if not group.startswith("hydra/")}


def tokenizer_entries(config: DictConfig) -> int | None:
    """Those that the chosen tokenizer has, or is trained to; None where they cannot be known without its text, or a Hub
    that answers.
    """
    if OmegaConf.missing_keys(config.tokenizer):
        return None
    try:
        return instantiate(config.tokenizer).entries
    except FileNotFoundError:
        return None


def unknown_entries(config: DictConfig) -> str:
    """What is taken in their place, for the user."""
    return (
        f"tokenizer={choices()['tokenizer']}: its entries are not known before its text is read, and are taken to be "
        f"model.vocab_size={config.model.vocab_size}"
    )


def build_decoder(config: DictConfig, vocab_size: int, device: str) -> Decoder:
    """On the device "meta" it has shapes and no memory."""
    factory = plain(instantiate(config.decoder, vocab_size=vocab_size, _partial_=True))
    with torch.device(device), Unfilled() if device == "meta" else nullcontext():
        return factory()


def plain(value: Any) -> Any:
    """Without Hydra's check of its policy at each call of a part, which is most of the time that 15,000 experts take."""
    if not isinstance(value, partial):
        return value
    return partial(value.func, *value.args, **{name: plain(part) for name, part in value.keywords.items()})


class Unfilled(TorchFunctionMode):
    """Leaves out `torch.nn.init`: what has no memory takes no values, and pretending costs half of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
