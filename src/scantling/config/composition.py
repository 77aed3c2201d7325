"""What Hydra composes of a command line, and the configuration that everything else reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from scantling.config.differences import leaves
from scantling.config.options import CONF, ROOT

PARTS = ("norm", "pos", "attn", "ffn", "block", "embed", "head")

TAKES_SWEEPS = ("train", "plan")
"""Entries that can take a sweep; to others `runs=[…]`, say, would choose in the folder `runs`."""


def search_path(entry: str) -> list[str]:
    """The override that makes the folder `sweeps` beside `conf` a group of the configuration.

    It would make a group of every other folder there too, so that only entries which take sweeps have it.
    """
    return [f"hydra.searchpath=['file://{ROOT}']"] if entry in TAKES_SWEEPS else []


def compose_config(entry: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of `src/<entry>.py` with these overrides, as if typed.

    Hydra's own state stays as it was.
    """
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            typed = [*overrides, *search_path(entry)]
            config = compose(entry, overrides=typed, return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = outer
    return with_choices(config, config.hydra)


def with_choices(config: DictConfig, hydra: DictConfig | HydraConf) -> DictConfig:
    """A copy with `choices`, the option of each group, and `overrides`, what was typed, for Hydra's own node.

    Only the edges where Hydra hands a configuration over know that node.
    """
    chosen = hydra.runtime.choices.items()
    own = {key: node for key, node in config.items_ex(resolve=False) if key != "hydra"}
    own["choices"] = {group: option for group, option in chosen if not group.startswith("hydra/")}
    own["overrides"] = hydra.overrides.task
    whole = OmegaConf.create(own)
    OmegaConf.set_struct(whole, True)
    return whole


def with_settings(config: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    """A copy with these values, by dotted key."""
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        OmegaConf.update(changed, key, value, merge=False)
    return changed


def resolved_config(config: DictConfig) -> dict[str, Any]:
    """What is recorded of a run: the configuration with its interpolations resolved, and the choices last.

    What was typed is recorded beside it.
    """
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return {key: value for key, value in resolved.items() if key != "overrides"}


def unresolved_settings(config: DictConfig) -> dict[str, Any]:
    """Dotted keys and their values, interpolations as they are written."""
    written: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    return leaves({key: value for key, value in written.items() if key not in ("choices", "overrides")})


def tokenizer_entries(config: DictConfig) -> int | None:
    """How many entries the chosen tokenizer has, or is trained to.

    None where that cannot be known without its text, or without a Hub that answers.
    """
    if OmegaConf.missing_keys(config.tokenizer):
        return None
    try:
        return instantiate(config.tokenizer).entries
    except FileNotFoundError:
        return None


def unknown_entries(config: DictConfig) -> str:
    """What is assumed where `tokenizer_entries` is None, in words for the user."""
    return (
        f"tokenizer={config.choices.tokenizer}: its entries are not known before its text is read, and are "
        f"taken to be model.vocab_size={config.model.vocab_size}"
    )
