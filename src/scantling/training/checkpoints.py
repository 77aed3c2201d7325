"""Checkpoints: `step-N.ckpt`, each whole or not there, with its checksum beside it.

`last.ckpt` and `best.ckpt` are second names of two of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import TorchCheckpointIO

from scantling.runs.directory import RunDirectory


class CheckpointFiles(TorchCheckpointIO):
    """Writes in a background thread, from a copy of the state that the next step cannot change.

    What goes wrong there is raised by the next `save_checkpoint` or `wait`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.under_way: list[Future] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()  # one copy in memory at most
        self.then(write_whole, Path(path), snapshot(checkpoint, {}))

    def then(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work` in the background too, after all that was asked for before."""
        self.under_way.append(self.thread.submit(work, *arguments))

    def wait(self) -> None:
        """Wait until all is on disk. Raises OSError where it could not be written."""
        under_way, self.under_way = self.under_way, []
        for each in under_way:
            each.result()

    def teardown(self) -> None:
        self.thread.shutdown()


class Checkpoints(Callback):
    """A checkpoint at every validation and at `save`; kept are the newest `keep`, and the best one.

    The best has the lowest validation loss. Beside Lightning's own state they hold that of the random
    number generators of every rank.
    """

    def __init__(self, directory: RunDirectory, files: CheckpointFiles, *, keep: int) -> None:
        self.directory, self.files, self.keep = directory, files, keep
        self.best, self.best_step = float("inf"), 0
        self.random_states: list[dict[str, Any]] = []
        self.has_started = False

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.rank, self.device = trainer.global_rank, trainer.strategy.root_device

    def state_dict(self) -> dict[str, Any]:
        states = [random_state(self.device)]
        if torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, states[0])
        return {"best": self.best, "best_step": self.best_step, "random_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.random_states = state_dict["random_states"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.rank < len(self.random_states):
            set_random_state(self.random_states[self.rank], self.device)
        elif self.rank:  # all processes have the run's seed, and one that was not there before has no state
            torch.manual_seed(seed_of(torch.initial_seed(), self.rank, trainer.global_step))
        self.take_up(trainer)

    def take_up(self, trainer: L.Trainer) -> None:
        """Bring the directory back to what it was after the step that training goes on from."""
        self.has_started = True
        if not trainer.is_global_zero:
            return
        step, best = trainer.global_step, self.directory.best
        tidy_checkpoints(self.directory, step)
        if step:
            self.name_checkpoint(step, step == self.best_step)
            if not best.exists():  # it was one of those that a rollback removed
                if not self.directory.checkpoint(self.best_step).exists():
                    self.best, self.best_step = float("inf"), step
                put_in_place(self.directory.checkpoint(self.best_step), best)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        loss = pl_module.text_loss.results()["loss"]
        if loss < self.best:
            self.best, self.best_step = loss, trainer.global_step
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write a checkpoint of the step that just ended, and name it in the background once it is whole."""
        trainer.save_checkpoint(self.directory.checkpoint(trainer.global_step))
        if trainer.is_global_zero:
            self.files.then(self.name_checkpoint, trainer.global_step, trainer.global_step == self.best_step)

    def name_checkpoint(self, step: int, is_best: bool) -> None:
        """Give the checkpoint of `step` its second names, then let go of the oldest."""
        path = self.directory.checkpoint(step)
        if path.exists():  # else writing it failed, and `wait` says so
            put_in_place(path, self.directory.last)
            if is_best:
                put_in_place(path, self.directory.best)
            for old in self.directory.step_checkpoints()[self.keep :]:
                old.unlink()
                checksum_of(old).unlink(missing_ok=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.has_started:  # there was no step left
            self.take_up(trainer)
        self.files.wait()


# --- state ---


def snapshot(state: Any, copies: dict[tuple, torch.Tensor]) -> Any:
    """The same tree with every tensor copied to the CPU; tensors that share memory share it again."""
    if isinstance(state, torch.Tensor):
        key = (state.device, state.data_ptr(), state.shape, state.stride(), state.dtype)
        if key not in copies:
            copies[key] = state.detach().to("cpu", copy=True)
        return copies[key]
    if isinstance(state, dict):
        return {key: snapshot(value, copies) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value, copies) for value in state)
    return state


def seed_of(run: int, rank: int, step: int) -> int:
    """A process's own seed, from the run's."""
    return int.from_bytes(hashlib.sha256(f"{run}/{rank}/{step}".encode()).digest()[:7], "big")


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of the generators of Python, NumPy and torch, in types that load without running code."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": (version, list(words), gauss),
        "numpy": (name, torch.from_numpy(np.array(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators of Python, NumPy and torch to a state that `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


# --- files ---


class HashedFile:
    """A file that is only written to, and the SHA-256 of what was meant to be written.

    An OSError is kept for `raise_error`: inside torch's writer it would end the process.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write `data` and hash it; after an error it is only hashed. Returns its length."""
        self.sha256.update(data)
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: `write_whole` flushes the file itself. torch's writer calls it."""

    def raise_error(self) -> None:
        """Raise the first OSError that writing met."""
        if self.error is not None:
            raise self.error


def write_whole(path: Path, state: dict[str, Any]) -> None:
    """Write `path` and, before that has its name, its checksum: a file that bears the name is complete.

    Raises OSError, with nothing left of the attempt.
    """
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            hashed = HashedFile(file)
            torch.save(state, hashed)  # type: ignore[arg-type]
            hashed.raise_error()
            file.flush()
            os.fsync(file.fileno())
        write_checksum(path, hashed.sha256.hexdigest())
        os.replace(partial, path)
        synchronise_directory(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_checksum(path: Path, digest: str) -> None:
    """Write the checksum in a form that `sha256sum --check` in the same folder reads too."""
    checksum = checksum_of(path)
    partial = partial_of(checksum)
    with partial.open("w") as file:
        file.write(f"{digest}  {path.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, checksum)


def synchronise_directory(directory: Path) -> None:
    """Write a directory to disk: a rename is there only when its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint; None for a whole one."""
    try:
        expected = checksum_of(path).read_text().split()[0]
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, IndexError, UnicodeDecodeError):
        return "cannot be read, or has no checksum beside it"
    return None if actual == expected else "is damaged: its checksum differs"


def newest_whole_checkpoint(directory: RunDirectory) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and a line for each newer one that is damaged.

    Raises ValueError for a run whose checkpoints are of an older version.
    """
    damaged = []
    for path in directory.step_checkpoints():
        if (wrong := damage_of(path)) is None:
            return path, damaged
        damaged.append(f"{path} {wrong}")
    if not damaged and directory.last.exists():
        raise ValueError(
            f"{directory.last} is of an older version, from which no run goes on: "
            "start beside it with resume=never"
        )
    return None, damaged


def tidy_checkpoints(directory: RunDirectory, step: int) -> None:
    """Rename checkpoints after `step`, which are damaged, to `.damaged`; remove what a kill left behind."""
    damaged = [path for path in directory.step_checkpoints() if directory.step_of(path) > step]
    if step == 0:
        for path in (directory.last, directory.best):  # of the damaged ones
            path.unlink(missing_ok=True)
    for path in damaged:
        path.rename(path.with_name(path.name + ".damaged"))
    for path in directory.checkpoints.glob("*.partial"):
        path.unlink()
    for path in directory.checkpoints.glob("*.sha256"):
        if not path.with_suffix("").exists():
            path.unlink()


def put_in_place(source: Path, target: Path) -> None:
    """Give `target` the content of `source` at once, by a hard link; where there are none, by a copy."""
    if target.exists() and target.samefile(source):
        return
    partial = partial_of(target)
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        with contextlib.ExitStack() as undo:
            undo.callback(partial.unlink, missing_ok=True)
            shutil.copyfile(source, partial)
            undo.pop_all()
    os.replace(partial, target)


def partial_of(path: Path) -> Path:
    """The name under which a file is written before it is whole."""
    return path.with_name(path.name + ".partial")


def checksum_of(path: Path) -> Path:
    """The file beside `path` that holds its SHA-256."""
    return path.with_name(path.name + ".sha256")
