"""A family of Hugging Face models: fields of `config.json` and tensors, in tables that read both ways."""

from __future__ import annotations

import importlib
import pkgutil
from typing import ClassVar

from scantling.hub import families
from scantling.hub.fields import Config, Field
from scantling.hub.weights import Table


class Family:
    """Base of every family. A subclass with a `model_type` is found by being in `hub/families/`."""

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    """The class of `transformers` that computes it."""
    fields: ClassVar[tuple[Field, ...]]
    tensors: ClassVar[Table]
    prefix: ClassVar[str] = "model."
    """Prefix of the tensors' names; files written from the body alone lack it."""
    ignored: ClassVar[str] = r".*\.rotary_emb\.inv_freq"
    """Tensors in their files that are computed and not learned, a regular expression."""

    @property
    def names(self) -> set[str]:
        """The fields of `config.json` that are read."""
        return set().union(*(field.names for field in self.fields))

    def overrides(self, hf: Config) -> list[str]:
        """What to add to `model=llama_tiny` for the decoder that a `config.json` describes.

        Raises ValueError when it lacks a field or asks for what this project's parts cannot do.
        """
        words = [word for field in self.fields for word in field.overrides(hf)]
        last = {
            word.partition("=")[0]: word for word in words
        }  # a later field changes what an earlier one gave
        return list(last.values())

    def hf_config(self, decoder: Config) -> Config:
        """The `config.json` that comes nearest to a decoder's configuration, nulls filled in."""
        written: Config = {"architectures": [self.architecture], "model_type": self.model_type}
        for field in self.fields:
            written |= field.hf_config(decoder)
        return written


def all_families() -> dict[str, Family]:
    """Every family by its `model_type`, in alphabetical order."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    found, classes = {}, [Family]
    while classes:
        for kind in classes.pop().__subclasses__():
            classes.append(kind)
            found[kind.model_type] = kind()
    return dict(sorted(found.items()))
