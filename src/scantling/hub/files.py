"""The files of a Hugging Face model: `config.json` and tensors in the safetensors format, never a pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scantling.hub.family import Family
from scantling.hub.weights import Rule, rules_of, shapes_of
from scantling.model.decoder import Decoder

INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError where there is none, or where it is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a directory that save_pretrained wrote") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


class TensorFiles:
    """The tensors of a directory, in one file or several; each is read when it is asked for."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.files: dict[str, Any] = {}
        for path in self.paths():
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from None
            self.files |= dict.fromkeys(file.keys(), file)

    def paths(self) -> list[Path]:
        """The files of the directory: those that the index names, or all safetensors there.

        Raises ValueError where one is missing, and where there is only a pickle.
        """
        if (self.source / INDEX).exists():
            named = read_json(self.source / INDEX).get("weight_map")
            if not isinstance(named, dict):
                raise ValueError(f"{self.source / INDEX} has no weight_map")
            paths = [self.source / Path(str(name)).name for name in sorted(set(named.values()))]
            for path in paths:
                if not path.exists():
                    raise ValueError(f"{path} is missing, which {INDEX} names")
            return paths
        paths = sorted(self.source.glob("*.safetensors"))
        if not paths:
            pickles = sorted(
                p.name for kind in ("bin", "pt", "pth", "ckpt") for p in self.source.glob(f"*.{kind}")
            )
            if pickles:
                raise ValueError(
                    f"{self.source} holds {pickles[0]}, a pickle, which may run code when it is opened: "
                    "save the model again as safetensors"
                )
            raise ValueError(f"{self.source} holds no *.safetensors")
        return paths

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor of floating-point numbers. Raises ValueError for a quantised one."""
        tensor = self.files[name].get_tensor(name)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise ValueError(f"{name} is stored as {tensor.dtype}: quantised weights are not read")
        return tensor


def import_tensors(family: Family, decoder: Decoder, tensors: TensorFiles) -> dict[str, Tensor]:
    """The decoder's state from their tensors.

    Raises ValueError when a tensor is missing, one too many, or of another shape.
    """
    rules, ours = rules_of(family.tensors, decoder), shapes_of(decoder)
    wanted: dict[str, tuple[int, ...]] = {}
    for rule in rules:
        wanted |= rule.their_shapes(ours)
    stored = {name: stored_name(name, family, tensors) for name in wanted}
    missing = [name for name, there in stored.items() if there not in tensors.files]
    if missing:
        raise ValueError(
            f"{tensors.source} lacks the tensor {missing[0]}{and_more(missing)}, asked for by config.json"
        )
    unknown = set(tensors.files) - set(stored.values()) - set(tied_heads(family, ours))
    extra = sorted(name for name in unknown if not re.fullmatch(family.ignored, name))
    if extra:
        raise ValueError(
            f"{tensors.source} holds the tensor {extra[0]}{and_more(extra)}, "
            f"which a {family.model_type} with this config.json has not"
        )
    for name, shape in wanted.items():
        there = tensors.shape(stored[name])
        if there != shape:
            raise ValueError(
                f"{tensors.source}: {name} is {list(there)}, but by config.json it should be {list(shape)}"
            )
    state: dict[str, Tensor] = {}
    for rule in rules:
        state |= rule.to_ours([tensors.read(stored[name]) for name in rule.theirs], ours)
    return {name: state[name] for name in ours}


def stored_name(name: str, family: Family, tensors: TensorFiles) -> str:
    """The name in the file: one of the body alone, as GPT-2's on the Hub, leaves the prefix out."""
    return name if name in tensors.files else name.removeprefix(family.prefix)


def tied_heads(family: Family, ours: Mapping[str, Any]) -> list[str]:
    """Names of output matrices that were saved although they are tied."""
    head = family.tensors.get("embed.head")
    return [f"{head}.weight"] if "embed.head.weight" not in ours else []


def and_more(names: list[str]) -> str:
    """How many names follow the first, in words."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def export_tensors(rules: list[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the family from the decoder's state."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        theirs |= rule.to_theirs([state[name] for name in rule.ours])
    return theirs


def write_tensors(theirs: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as they may other files of this user."""
    path.touch()
    mode = path.stat().st_mode
    save_file(theirs, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library makes it readable by its owner alone
