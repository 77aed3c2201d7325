"""Where a run lives: its directory is named by what it trains, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from scantling.config.composition import resolved_config
from scantling.config.settings import NOT_TRAINED, is_neutral


def identity(config: DictConfig) -> dict[str, Any]:
    """What is trained: the resolved configuration less paths, loggers, hardware, and
    settings at neutral values.

    So a setting that is added later leaves the identity of earlier runs as it was.
    """
    resolved = resolved_config(config)
    kept = {key: value for key, value in resolved.items() if key not in (*NOT_TRAINED, "choices")}
    return without_neutral(kept) | {"precision": resolved["trainer"]["precision"]}


def without_neutral(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The node without settings at neutral values, and without nodes that held nothing else."""
    kept = {}
    for key, value in node.items():
        if isinstance(value, dict):
            inner = without_neutral(value, f"{prefix}{key}.")
            if inner or not value:
                kept[key] = inner
        elif not is_neutral(f"{prefix}{key}", value):
            kept[key] = value
    return kept


def run_id(config: DictConfig) -> str:
    """The model preset's name, for people, and a hash of the run's identity."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return f"{config.choices.model}-{digest[:10]}"


def path_of(config: DictConfig) -> Path:
    """The directory of the run, `<paths.runs>/<study>/<run_id>`."""
    return Path(config.paths.runs) / config.study / run_id(config)
