"""Where a run lives: its directory is named by what it trains, so that the same command finds it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from scantling.config.composition import choices
from scantling.config.settings import NOT_TRAINED


def identity(config: DictConfig) -> dict[str, Any]:
    """What is trained: the resolved configuration less paths, loggers and hardware."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in (*NOT_TRAINED, "choices")}
    return kept | {"precision": plain["trainer"]["precision"]}


def run_id(config: DictConfig) -> str:
    """The model preset's name, for people, and a hash of the run's identity."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return f"{choices()['model']}-{digest[:10]}"


def path_of(config: DictConfig) -> Path:
    return Path(config.paths.runs) / config.study / run_id(config)
