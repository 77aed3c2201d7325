"""Configurations compared: plain nested dictionaries, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values, inner nodes left out."""
    found = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def different_leaves(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, here, there) for every leaf that differs between the two, sorted; None where one lacks it."""
    ours, theirs = leaves(one), leaves(other)
    keys = sorted({*ours, *theirs})
    return [(key, ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)]


def varying_leaves(configurations: Sequence[dict[str, Any]]) -> list[str]:
    """Keys of leaves, as `leaves` gives them, that are not alike in all configurations.

    A leaf that repeats another one wherever it stands is left out.
    """
    keys = dict.fromkeys(key for found in configurations for key in found)
    return [
        key
        for key in keys
        if any(found.get(key) != configurations[0].get(key) for found in configurations)
        and not all(repeats_another(key, found) for found in configurations if key in found)
    ]


def repeats_another(key: str, found: dict[str, Any]) -> bool:
    """Whether a leaf of the decoder or the optimiser has the value of the setting that it follows.

    A leaf that is set apart does not.
    """
    group, _, rest = key.partition(".")
    followed = {"decoder": (rest, f"model.{rest}"), "optim": ("lr",) if rest == "lr" else ()}.get(group, ())
    return any(name in found and found[name] == found[key] for name in followed)
