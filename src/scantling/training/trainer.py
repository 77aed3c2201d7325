"""Lightning's Trainer as a run wants it, and what has to be said to Lightning beside its settings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable

import lightning.pytorch as L
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy

from scantling.model import hardware
from scantling.training.assembly import Run
from scantling.training.callbacks import StepCallbacks
from scantling.training.checkpoints import CheckpointFiles
from scantling.training.launch import cluster_environment


def build_trainer(
    run: Run,
    strategy: Strategy | None,
    callbacks: StepCallbacks,
    files: CheckpointFiles,
    loggers: Iterable[Logger],
    *,
    val_every: int,
) -> L.Trainer:
    """A Trainer that counts in optimiser steps.

    Checkpoints, bar and the order of the data are left to this project.
    """
    config, plan = run.config, run.plan
    trainer = L.Trainer(
        accelerator="gpu" if run.device.type == "cuda" else "cpu",
        devices=plan.world_size // config.trainer.nodes,
        num_nodes=config.trainer.nodes,
        strategy=strategy or "auto",
        precision=hardware.LIGHTNING_PRECISION[run.precision],  # type: ignore[arg-type]
        max_steps=plan.steps,
        accumulate_grad_batches=plan.micro_batches,
        gradient_clip_val=config.clip,
        val_check_interval=val_every * plan.micro_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        plugins=[files, *cluster_environment()],
        logger=loggers,
        deterministic=config.trainer.deterministic,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=strategy is None,  # what is gathered in that mode cannot be trained on
    )
    leave_signals_to_us(trainer)
    return trainer


def leave_signals_to_us(trainer: L.Trainer) -> None:
    """Leave signals to `CleanStop`: Lightning would ask all processes for a SIGTERM at every micro-batch.

    That would wait for the GPU each time.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def quiet_lightning() -> None:
    """Silence what the user can do nothing about: Lightning's advice, and its calls that are deprecated."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Its advice on loaders and loggers does not hold here.
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", "The `srun` command is available")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated")  # which DeepSpeed calls
