"""The frame of every entry: Hydra reads the command line, and a user's mistake ends it with exit code 2.

A mistake is told in one line.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scantling.config.composition import search_path, with_choices
from scantling.config.messages import one_line
from scantling.config.mistakes import Failed, Mistake
from scantling.config.options import CONF
from scantling.config.values import check_options, check_values, quoted

MULTIRUN = ("-m", "--multirun")


def run_entry(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `task` on it.

    `HYDRA_FULL_ERROR=1` shows the traceback behind a one-line error.
    """
    # argparse takes no flag between overrides, and these must stand together.
    typed = sorted(map(quoted, sys.argv[1:]), key=lambda argument: argument not in MULTIRUN)
    first = next((i for i, o in enumerate(typed) if "=" in o and not o.startswith("-")), len(typed))
    sys.argv[1:] = [*typed[:first], *search_path(config_name), *typed[first:]]
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def explained(call: Callable[[], object]) -> None:
        try:
            call()
        except (Mistake, HydraException, OmegaConfBaseException) as error:
            if wants_traceback:
                raise
            print(f"error: {one_line(error, config_name, typed)}", file=sys.stderr)
            sys.exit(2)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def start(config: DictConfig) -> None:
        check_values(config, config_name)
        task(config)

    @functools.wraps(task)
    def job(config: DictConfig) -> None:
        # Explained here too: past this function Hydra prints a line of its own.
        explained(lambda: start(with_choices(config, HydraConfig.get())))

    main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
    with raising_hydra():
        explained(lambda: (check_options(typed), main(job)()))


@contextlib.contextmanager
def raising_hydra() -> Iterator[None]:
    """Let Hydra raise what it would otherwise print before it exits with code 1."""
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
