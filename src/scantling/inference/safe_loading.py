"""What a run left on disk, read back without Lightning: its decoder, tokenizer and weights.

Nothing runs because a file was read.
"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from scantling.data.tokenizers import Tokenizer
from scantling.model.decoder import Decoder
from scantling.runs.directory import RunDirectory

ACTIVATIONS = ("torch.nn.ReLU", "torch.nn.GELU", "torch.nn.SiLU", "torch.nn.Identity")
"""What a stored configuration may build beside parts and corpora of this project."""


def load_decoder(
    directory: RunDirectory, weights: dict[str, Tensor]
) -> tuple[DictConfig, Decoder, Tokenizer]:
    """The run's configuration, its decoder with `weights`, its tokenizer.

    Raises ValueError where its configuration asks for foreign code.
    """
    config: Any = OmegaConf.load(directory.config)
    check_targets(config.decoder, directory.config)
    tokenizer = Tokenizer.load(directory.tokenizer)
    rows = len(
        weights["embed.tokens.weight"]
    )  # an imported table may have more than the tokenizer has entries
    decoder: Decoder = instantiate(config.decoder, vocab_size=rows)
    decoder.load_state_dict(weights)
    if config.document_mask:
        decoder.separate_documents(tokenizer.end_of_text)
    return config, decoder.eval(), tokenizer


def read_weights(directory: RunDirectory, checkpoint: str) -> dict[str, Tensor]:
    """The decoder's state dict as it is on disk; `best_average` and `last_average` have the averaged weights.

    Raises ValueError where there is no such checkpoint.
    """
    averaged = checkpoint.endswith("_average")
    file = {"best": directory.best, "last": directory.last}.get(checkpoint.removesuffix("_average"))
    if file is None:
        raise ValueError(
            f"checkpoint={checkpoint} is unknown: use best or last, or best_average or last_average"
        )
    if not file.exists():
        raise ValueError(f"{directory.path} has no {checkpoint} checkpoint yet: {file} is missing")
    stored = read_checkpoint(file)
    weights = decoder_weights(stored)
    if not averaged:
        return weights
    callbacks = stored.get("callbacks", {})  # an imported model has none
    if "WeightAverage" not in callbacks:
        raise ValueError(
            f"{directory.path} kept no average of its weights, which ema.decay asks for: use checkpoint=best"
        )
    return weights | callbacks["WeightAverage"]["weights"]


def read_weights_by_step(directory: RunDirectory) -> tuple[dict[int, dict[str, Tensor]], list[Path]]:
    """The decoder's state dict after each step with a checkpoint, in order, and the unreadable files.

    Tensors stay on disk until they are read.
    """
    found, unreadable = {}, []
    for file in (directory.best, directory.last, *directory.step_checkpoints()):
        try:
            stored = read_checkpoint(file)
            found[stored["global_step"]] = decoder_weights(stored)
        except FileNotFoundError:  # never written, or let go of by a run that goes on
            continue
        except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError):  # cut short, or another's
            unreadable.append(file)
    return dict(sorted(found.items())), unreadable


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint's content. Only tensors and plain values are read, and tensors stay on disk until used."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def decoder_weights(stored: dict[str, Any]) -> dict[str, Tensor]:
    """The decoder's state dict out of a checkpoint's, under the decoder's own names."""
    return {key.removeprefix("decoder."): value for key, value in stored["state_dict"].items()}


def check_targets(config: Any, source: Path) -> None:
    """Raise ValueError when a stored configuration names foreign code."""
    if isinstance(config, DictConfig):
        target = config.get("_target_")
        if target is not None and not is_own_part(str(target)):
            raise ValueError(
                f"{source} asks for {target}: only parts of scantling.model, classes of scantling.data and "
                f"{', '.join(ACTIVATIONS)} may be loaded from a file"
            )
        children = [config[key] for key in config]
    else:
        children = list(config) if isinstance(config, ListConfig) else []
    for child in children:
        check_targets(child, source)


def is_own_part(target: str) -> bool:
    """Whether it is one of `ACTIVATIONS`, or stands in the module of this project that it names.

    The module itself is searched, as Hydra would walk on through whatever it has imported.
    """
    module, _, name = target.rpartition(".")
    of_model = module.startswith("scantling.model.")
    if not (of_model or module.startswith("scantling.data.")):
        return target in ACTIVATIONS
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return False
    return getattr(found, "__module__", None) == module and (of_model or isinstance(found, type))
