"""Configuration -> objects -> fit."""

from __future__ import annotations

import errno
import gc
import logging
import sys
import warnings

import lightning.pytorch as L
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch.utils.data import DataLoader

from scantling.config.decoder import build_decoder, without_hydra_checks
from scantling.data.loading import validation_batches
from scantling.model import hardware
from scantling.training import float8
from scantling.training.assembly import Run, training_batches, what_would_fit
from scantling.training.average import WeightAverage
from scantling.training.budget import steps_between_validations
from scantling.training.callbacks import (
    CleanStop,
    Interrupted,
    Metrics,
    ProgressBar,
    Samples,
    StepCallbacks,
)
from scantling.training.checkpoints import CheckpointFiles, Checkpoints
from scantling.training.guard import BadStep, Guard
from scantling.training.launch import cluster_environment
from scantling.training.loggers import Wandb
from scantling.training.noise import NoiseScale
from scantling.training.profiling import LENGTH, LabelledBatches, Profile
from scantling.training.ranks import EndTogether
from scantling.training.record import finish, loggers_of, sample_of
from scantling.training.rollback import guarded, record, roll_back, stop
from scantling.training.task import LanguageModelTask


def fit(run: Run, console: Console) -> None:
    """Train to the end of the plan, back from steps that the guard does not let pass; then write the summary."""
    while True:
        try:
            return fit_from_checkpoint(run, console)
        except BadStep as bad:
            if run.guard.action != "rollback" or guarded(run, bad.step) >= run.guard.most:
                stop(run, bad)
            roll_back(run, bad)
            console.print(f"warning: {bad}: back to step {run.first_step:,}", soft_wrap=True)
        except (RuntimeError, MemoryError) as error:
            if not hardware.ran_out_of_memory(error):
                raise
            print(f"error: {what_would_fit(run)}", file=sys.stderr)
            sys.exit(1)
        gc.collect()  # the model and optimiser that went wrong, which the exception has let go of


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it after the same step."""
    return isinstance(error, BadStep | Interrupted)


def is_explained(error: BaseException) -> bool:
    """Whether what follows says it in one line, or nothing needs to be said."""
    return isinstance(error, KeyboardInterrupt) or hardware.ran_out_of_memory(error) or is_full_disk(error)


def fit_from_checkpoint(run: Run, console: Console) -> None:
    """Train from the last checkpoint, or from the start. Raises BadStep."""
    config, plan, directory = run.config, run.plan, run.directory
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", module="lightning"
    )  # its advice on loaders and loggers does not hold here
    warnings.filterwarnings("ignore", "The `srun` command is available")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated")  # which DeepSpeed calls
    L.seed_everything(config.seed, verbose=False)
    decoder = build_decoder(config, run.corpus.tokenizer.vocab_size, "cpu")
    decoder.initialise(config.seed)
    decoder.checkpoint_activations = config.trainer.checkpoint_activations
    decoder.head.z_loss = config.z_loss or 0.0
    if config.document_mask:
        decoder.separate_documents(run.corpus.tokenizer.end_of_text)
    if run.precision == "fp8":
        console.print(float8.convert(decoder))
    peak, peak_source = hardware.peak_flops(run.device, run.precision != "fp32")
    console.print(f"[bold]peak[/bold]        {peak / 1e9:,.0f} GFLOP/s, {peak_source}")
    for line in run.damaged:
        console.print(f"warning: {line}; skipped", soft_wrap=True)
    if run.first_step:
        console.print(f"resuming after step {run.first_step:,}")
    guard = Guard(
        run.guard,
        record=lambda bad, action: record(run, bad, action),
        used=guarded(run, run.first_step),
        gradients_may_overflow=run.precision == "fp16",
    )
    task = LanguageModelTask(
        decoder,
        optimizer=instantiate(config.optim, _convert_="all"),
        schedule=without_hydra_checks(instantiate(config.schedule)),
        total_steps=plan.steps,
        token_bytes=run.corpus.token_bytes,
        compiled=config.trainer.compile,
        leaves_out=guard.leaves_out if run.guard.action == "skip" else None,
    )
    strategy = run.new_strategy()
    taken_up = directory.has_metrics
    noise_scale = NoiseScale(
        micro_batches=plan.micro_batches,
        processes=plan.world_size,
        tokens_before=plan.tokens_before,
    )
    metrics = Metrics(
        directory.metrics_from(run.first_step) if rank_zero_only.rank == 0 else None,
        guard,
        log_every=config.log_every,
        val_every=steps_between_validations(config.val_every, plan.steps),
        total_steps=plan.steps,
        tokens_before=plan.tokens_before,
        flops_per_token=plan.flops_per_token,
        peak_flops=peak,
        columns=noise_scale.columns if config.noise_scale else dict,
    )
    files = CheckpointFiles()
    checkpoints = Checkpoints(directory, files, keep=config.checkpoint.keep)
    callbacks = StepCallbacks(
        [
            *([noise_scale] if config.noise_scale else []),
            metrics,
            guard,
            Samples(directory.samples, sample=lambda: sample_of(run, decoder, strategy)),
            *([] if config.ema.decay is None else [WeightAverage(config.ema.decay)]),
            checkpoints,
            CleanStop(checkpoints, metrics, every_minutes=config.checkpoint.every_minutes),
            ProgressBar(console, metrics),
            EndTogether(console, is_agreed=is_agreed, is_explained=is_explained),
        ]
    )
    if config.profile and plan.steps - run.first_step < LENGTH:
        console.print(f"no profile: it takes {LENGTH} steps, and {plan.steps - run.first_step} are left")
    elif config.profile:
        callbacks.callbacks.append(
            Profile(directory.profile, console, first_step=run.first_step, callbacks=callbacks)
        )
    loggers = loggers_of(run, console, taken_up)
    trainer = L.Trainer(
        accelerator="gpu" if run.device.type == "cuda" else "cpu",
        devices=plan.world_size // config.trainer.nodes,
        num_nodes=config.trainer.nodes,
        strategy=strategy or "auto",
        precision=hardware.LIGHTNING_PRECISION[run.precision],  # type: ignore[arg-type]
        max_steps=plan.steps,
        accumulate_grad_batches=plan.micro_batches,
        gradient_clip_val=config.clip,
        val_check_interval=metrics.val_every * plan.micro_batches,
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
    # It asks all processes for a signal that `CleanStop` has taken over, and waits for the GPU, at every micro-batch.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    held_out = validation_batches(
        run.corpus.val.tokens,
        plan.seq_len,
        config.val_windows,
        4 * plan.micro_batch_size,  # without gradients there is room for it
    )
    batches = training_batches(run, rank=trainer.global_rank)
    succeeded = False
    gc.freeze()  # what stands now stays to the end; looking through it again and again costs steps
    try:
        trainer.fit(
            task,
            LabelledBatches(batches) if config.profile else batches,
            DataLoader(held_out, batch_size=None),  # type: ignore[arg-type]
            ckpt_path=run.checkpoint,
            weights_only=True,
        )
        succeeded = True
    except Interrupted as stop:
        console.print(f"\n{stop}; the same command goes on from there")
        # A launcher kills all processes at once when one of them fails: only the first, which has most to do, says so.
        sys.exit(130 if rank_zero_only.rank == 0 else 0)
    finally:
        gc.unfreeze()
        if metrics.file is not None:
            metrics.file.close()
        for logger in loggers:
            if isinstance(logger, Wandb):
                logger.finish(succeeded)
    finish(run, peak, peak_source, best_step=checkpoints.best_step)
