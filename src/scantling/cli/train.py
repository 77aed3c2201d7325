"""What train.py does: one run, from its configuration to its directory."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from omegaconf import DictConfig

from scantling.config.mistakes import mistakes
from scantling.model import hardware
from scantling.report.terminal import open_console
from scantling.runs.directory import RunDirectory
from scantling.training.assembly import assemble, describe_run
from scantling.training.launch import check_launch, devices_per_node
from scantling.training.ranks import end_with_first_process, is_first_process
from scantling.training.record import last_screen, set_up_directory
from scantling.training.resume import already_finished, locate_run
from scantling.training.run import fit, is_full_disk


def train(config: DictConfig) -> RunDirectory:
    """One run, from its configuration to its directory.

    Raises Mistake, before anything is computed, for what the user can put right.
    """
    console = open_console(quiet=not is_first_process())
    hardware.keep_freed_memory()
    end_with_first_process()
    with mistakes():
        if config.tune is not None and config.tuned is None:
            raise ValueError("tune=lr chooses the learning rate of a sweep's arms: add -m, or leave it out")
        config, directory = locate_run(config)
        if directory.is_finished:
            console.print(already_finished(directory))
            return directory
        if not config.dry_run:
            device = hardware.device_of(config.trainer.accelerator)
            check_launch(devices_per_node(config.trainer.devices, device), config.trainer.nodes)
        run = assemble(config, directory)
        console.print(run.plan.table(describe_run(run), len(run.corpus.train.tokens)))
        if config.dry_run:
            return directory
        set_up_directory(run)
    with out_of_disk(directory):
        fit(run, console)
    if is_first_process():
        console.print(last_screen(run))
    return directory


@contextlib.contextmanager
def out_of_disk(directory: RunDirectory) -> Iterator[None]:
    """End the run with one line and exit code 1 where a disk or quota is full."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        print(
            f"error: {error.filename or directory.path} cannot be written ({error.strerror}); "
            "finished checkpoints stand: free some space, and the same command goes on from the last",
            file=sys.stderr,
        )
        sys.exit(1)
