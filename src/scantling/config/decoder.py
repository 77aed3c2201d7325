"""The decoder that a configuration describes."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode

from scantling.model.decoder import Decoder


def build_decoder(config: DictConfig, vocab_size: int, device: str) -> Decoder:
    """The decoder of a configuration; on the device "meta" it has shapes and no memory."""
    factory = without_hydra_checks(instantiate(config.decoder, vocab_size=vocab_size, _partial_=True))
    with torch.device(device), Unfilled() if device == "meta" else nullcontext():
        return factory()


def without_hydra_checks(value: Any) -> Any:
    """A factory that calls a part without Hydra's check of its policy.

    The check at each call is most of the time that 15,000 experts take.
    """
    if not isinstance(value, partial):
        return value
    keywords = {name: without_hydra_checks(part) for name, part in value.keywords.items()}
    return partial(value.func, *value.args, **keywords)


class Unfilled(TorchFunctionMode):
    """Skips `torch.nn.init`, as tensors without memory take no values; pretending is half of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
