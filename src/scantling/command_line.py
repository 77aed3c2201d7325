"""The frame of every entry: Hydra reads the command line, and a user's mistake becomes one line and exit code 2."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parents[2] / "conf"


class Mistake(Exception):
    """Something the user can put right. The message says what is wrong, where, and what would be right."""


def run_entry(main: Callable[[], object]) -> None:
    """Run a `hydra.main` function; see `Mistake`. `HYDRA_FULL_ERROR=1` shows the traceback instead."""
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print and exit 1 for
    try:
        main()
    except (Mistake, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        fail(explained(error))


def fail(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def explained(error: Exception) -> str:
    """One line for an exception, naming the nearest thing that exists."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} is unknown{nearest(option, error.options or [])}"
    text = str(error)
    if isinstance(error, ConfigCompositionException) and error.__cause__ is not None:
        text = f"{text}\n{error.__cause__}"
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]} is not a setting{nearest(match[1], settings())}"
    return re.sub(r"\s*\n\s*", ": ", text.strip())


def nearest(wrong: str, options: list[str]) -> str:
    """', did you mean …' for near ones, else the whole list when it is short."""
    close = difflib.get_close_matches(wrong, options, n=3, cutoff=0.5)
    if close:
        return f": did you mean {' or '.join(close)}?"
    return f": use one of {', '.join(sorted(options))}" if 0 < len(options) <= 20 else ""


def settings() -> list[str]:
    """Every group and dotted key of the training configuration."""
    from hydra import initialize_config_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train")
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]

    def keys(node: DictConfig, prefix: str) -> list[str]:
        found = []
        for key in node:
            found.append(f"{prefix}{key}")
            if OmegaConf.is_dict(node._get_node(key)) and node._get_node(key) is not None:
                found += keys(node._get_node(key), f"{prefix}{key}.")  # type: ignore[arg-type]
        return found

    return sorted({*groups, *keys(config, "")})
