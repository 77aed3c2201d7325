"""Checkpoints: `last.ckpt` and `best.ckpt`, each whole or not there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO

from scantling.run_directory import RunDirectory


class WholeFiles(TorchCheckpointIO):
    """Writes beside the file and renames; Lightning's own way copies from the temporary directory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        partial = partial_of(Path(path))
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class Checkpoints(Callback):
    """`last.ckpt` at every validation and interruption; `best.ckpt` when validation loss is the lowest so far.

    Beside Lightning's own state they hold that of the random number generators.
    """

    def __init__(self, directory: RunDirectory):
        self.directory = directory
        self.best = float("inf")
        self.random_states: list[torch.Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "random_states": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.random_states = state_dict["best"], state_dict["random_states"]

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        if self.random_states:
            torch.set_rng_state(self.random_states[0])
            torch.cuda.set_rng_state_all(self.random_states[1:])

    def on_validation_end(self, trainer: L.Trainer, task: Any) -> None:
        if trainer.sanity_checking:
            return
        loss = task.text_loss.results()["loss"]
        is_best = loss < self.best
        self.best = min(self.best, loss)
        self.save(trainer)
        if is_best and trainer.is_global_zero:
            put_in_place(self.directory.last, self.directory.best)

    def save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.directory.last)


def put_in_place(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content at once: a hard link where the file system has them, else a copy."""
    partial = partial_of(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    os.replace(partial, target)


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def first_step_of(checkpoint: Path) -> int:
    """Optimiser steps that a checkpoint has behind it; reads its index, not its tensors."""
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
