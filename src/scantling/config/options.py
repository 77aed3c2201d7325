"""What the files of `conf/` say: which groups there are, their options, and the settings that each gives."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from scantling.config.differences import leaves

ROOT = Path(__file__).parents[3]
CONF = ROOT / "conf"


def is_group(key: str) -> bool:
    """Whether a key chooses an option, as `attn/pattern` does."""
    return (CONF / key).is_dir() or key == "sweeps"


def options_of(group: str) -> list[str]:
    """Names of the options of a group, sorted: its yaml files."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def options_with(key: str, *, below: bool = False) -> list[str]:
    """Options of a dotted key's group whose yaml has the key as a setting; `below`: has settings below it."""
    group, dot, name = key.partition(".")
    found = {option: read_yaml(f"{group}/{option}") for option in options_of(group)} if dot else {}
    if below:
        nodes = {option: OmegaConf.select(OmegaConf.create(own), name) for option, own in found.items()}
        return [option for option, node in nodes.items() if OmegaConf.is_dict(node)]
    return [option for option, own in found.items() if name in leaves(own)]


@functools.cache
def entry_settings(entry: str) -> dict[str, Any]:
    """Settings by dotted key that an entry's own file gives, less those that it leaves to others."""
    return {key: value for key, value in leaves(read_yaml(entry)).items() if value != "???"}


@functools.cache
def option_settings(group: str, option: str) -> dict[str, Any]:
    """Settings by dotted key that an option gives, with those of the options that it starts from."""
    text = (CONF / group / f"{option}.yaml").read_text()
    own = read_yaml(f"{group}/{option}")
    package = "" if text.startswith("# @package _global_") else f"{group.replace('/', '.')}."
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    found: dict[str, Any] = {}
    for base in bases:  # as `swiglu`, or below a key of its own as `swiglu@dense`
        name, _, place = base.partition("@")
        below = f"{package}{place}." if place else package
        inherited = option_settings(group, name)
        found |= {below + key.removeprefix(package): value for key, value in inherited.items()}
    return found | leaves(own, package)


def read_yaml(name: str) -> dict[str, Any]:
    """`conf/<name>.yaml` as it stands, interpolations unresolved."""
    node = OmegaConf.load(CONF / f"{name}.yaml")
    return OmegaConf.to_container(node, resolve=False)  # type: ignore[return-value]
