"""Training of a run, from its first step or its newest checkpoint to the last: `fit`.

The functions below it build its parts.
"""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lightning.pytorch as L
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from torch.utils.data import DataLoader

from scantling.config.decoder import build_decoder, without_hydra_checks
from scantling.data.loading import validation_batches
from scantling.model import hardware
from scantling.model.decoder import Decoder
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
from scantling.training.float8 import convert_to_float8
from scantling.training.guard import BadStep, Guard
from scantling.training.loggers import Wandb
from scantling.training.noise import NoiseScale
from scantling.training.profiling import STEPS_OF_A_PROFILE, LabelledBatches, Profile
from scantling.training.ranks import EndTogether, is_first_process
from scantling.training.record import draw_sample, open_loggers, write_summary
from scantling.training.rollback import count_guarded, record_bad_step, roll_back, stop_run
from scantling.training.task import LanguageModelTask
from scantling.training.trainer import build_trainer, quiet_lightning


def fit(run: Run, console: Console) -> None:
    """Train to the end of the plan and write the summary; bad steps are taken back as the guard says."""
    while True:
        try:
            return fit_from_checkpoint(run, console)
        except BadStep as bad:
            if run.guard.action != "rollback" or count_guarded(run, bad.step) >= run.guard.most:
                stop_run(run, bad)
            roll_back(run, bad)
            console.print(f"warning: {bad}: back to step {run.first_step:,}", soft_wrap=True)
        except (RuntimeError, MemoryError) as error:
            if not hardware.ran_out_of_memory(error):
                raise
            print(f"error: {what_would_fit(run)}", file=sys.stderr)
            sys.exit(1)
        gc.collect()  # the model and optimiser that went wrong, which the exception has let go of


def fit_from_checkpoint(run: Run, console: Console) -> None:
    """Train from the newest checkpoint, or from the start, and write the summary. Raises BadStep."""
    quiet_lightning()
    L.seed_everything(run.config.seed, verbose=False)
    was_begun = run.directory.has_metrics
    decoder = build_decoder_to_train(run, console)
    peak, peak_source = hardware.peak_flops(run.device, run.precision != "fp32")
    print_start(run, console, peak, peak_source)

    guard = build_guard(run)
    task = build_task(run, decoder, guard)
    strategy = run.new_strategy()
    noise_scale = build_noise_scale(run)
    metrics = build_metrics(run, guard, noise_scale, peak)
    checkpoints = Checkpoints(run.directory, CheckpointFiles(), keep=run.config.checkpoint.keep)
    # After a step and a validation, in order: what reads numbers, looks at the weights, keeps them.
    callbacks = StepCallbacks(
        [
            *([] if noise_scale is None else [noise_scale]),
            metrics,
            guard,
            Samples(run.directory.samples, sample=lambda: draw_sample(run, decoder, strategy)),
            *([] if run.config.ema.decay is None else [WeightAverage(run.config.ema.decay)]),
            checkpoints,
            CleanStop(checkpoints, metrics, every_minutes=run.config.checkpoint.every_minutes),
            ProgressBar(console, metrics),
            EndTogether(console, is_agreed=is_agreed, is_explained=is_explained),
        ]
    )
    add_profile(run, console, callbacks)
    loggers = open_loggers(run, console, was_begun)
    trainer = build_trainer(run, strategy, callbacks, checkpoints.files, loggers, val_every=metrics.val_every)
    with closing(metrics, loggers):
        train(run, trainer, task, console)
    write_summary(run, peak, peak_source, best_step=checkpoints.best_step)


def train(run: Run, trainer: L.Trainer, task: LanguageModelTask, console: Console) -> None:
    """Train with the trainer. Raises BadStep. An interrupted run ends the process with code 130."""
    batches = training_batches(run, rank=trainer.global_rank)
    held_out = validation_batches(
        run.corpus.val.tokens,
        run.plan.seq_len,
        run.config.val_windows,
        4 * run.plan.micro_batch_size,  # without gradients there is room for it
    )
    gc.freeze()  # what stands now stays to the end; looking through it again and again costs steps
    try:
        trainer.fit(
            task,
            LabelledBatches(batches) if run.config.profile else batches,
            DataLoader(held_out, batch_size=None),  # type: ignore[arg-type]
            ckpt_path=run.checkpoint,
            weights_only=True,
        )
    except Interrupted as stop:
        console.print(f"\n{stop}; the same command goes on from there")
        # A launcher kills all processes when one fails: only the first, which has most to do, says so.
        sys.exit(130 if is_first_process() else 0)
    finally:
        gc.unfreeze()


@contextmanager
def closing(metrics: Metrics, loggers: Sequence[Logger]) -> Iterator[None]:
    """Close the file of metrics however training ends, and tell W&B whether it succeeded."""
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if metrics.file is not None:
            metrics.file.close()
        for logger in loggers:
            if isinstance(logger, Wandb):
                logger.finish(succeeded)


# --- the parts ---


def build_decoder_to_train(run: Run, console: Console) -> Decoder:
    """The decoder with its weights drawn, set up for training as the configuration says."""
    config, tokenizer = run.config, run.corpus.tokenizer
    decoder = build_decoder(config, tokenizer.vocab_size, "cpu")
    decoder.initialise(config.seed)
    decoder.checkpoint_activations = config.trainer.checkpoint_activations
    decoder.head.z_loss = config.z_loss or 0.0
    if config.document_mask:
        decoder.separate_documents(tokenizer.end_of_text)
    if run.precision == "fp8":
        console.print(convert_to_float8(decoder))
    return decoder


def print_start(run: Run, console: Console, peak: float, peak_source: str) -> None:
    """Print the machine's peak, checkpoints that cannot serve, and the step that training goes on from."""
    console.print(f"[bold]peak[/bold]        {peak / 1e9:,.0f} GFLOP/s, {peak_source}")
    for line in run.damaged:
        console.print(f"warning: {line}; skipped", soft_wrap=True)
    if run.first_step:
        console.print(f"resuming after step {run.first_step:,}")


def build_guard(run: Run) -> Guard:
    """The guard of the run's settings, which records bad steps in the run's directory."""
    return Guard(
        run.guard,
        record=lambda bad, action: record_bad_step(run, bad, action),
        used=count_guarded(run, run.first_step),
        gradients_may_overflow=run.precision == "fp16",
    )


def build_task(run: Run, decoder: Decoder, guard: Guard) -> LanguageModelTask:
    """The task with the run's optimiser, schedule and, where steps may be skipped, its guard."""
    config = run.config
    return LanguageModelTask(
        decoder,
        optimizer=instantiate(config.optim, _convert_="all"),
        schedule=without_hydra_checks(instantiate(config.schedule)),
        total_steps=run.plan.steps,
        token_bytes=run.corpus.token_bytes,
        compiled=config.trainer.compile,
        leaves_out=guard.leaves_out if run.guard.action == "skip" else None,
    )


def build_noise_scale(run: Run) -> NoiseScale | None:
    """The measure of the gradient noise scale; None where `noise_scale` is off."""
    if not run.config.noise_scale:
        return None
    return NoiseScale(
        micro_batches=run.plan.micro_batches,
        processes=run.plan.world_size,
        tokens_before=run.plan.tokens_before,
    )


def build_metrics(run: Run, guard: Guard, noise_scale: NoiseScale | None, peak: float) -> Metrics:
    """The metrics, which open their file in the first process.

    Rows after the step that training goes on from are taken away.
    """
    config, plan = run.config, run.plan
    return Metrics(
        run.directory.metrics_from(run.first_step) if is_first_process() else None,
        guard,
        log_every=config.log_every,
        val_every=steps_between_validations(config.val_every, plan.steps),
        total_steps=plan.steps,
        tokens_before=plan.tokens_before,
        flops_per_token=plan.flops_per_token,
        peak_flops=peak,
        columns=dict if noise_scale is None else noise_scale.columns,
    )


def add_profile(run: Run, console: Console, callbacks: StepCallbacks) -> None:
    """Add the profile behind all others, where one is asked for and enough steps are left for it."""
    left = run.plan.steps - run.first_step
    if run.config.profile and left < STEPS_OF_A_PROFILE:
        console.print(f"no profile: it takes {STEPS_OF_A_PROFILE} steps, and {left} are left")
    elif run.config.profile:
        callbacks.callbacks.append(
            Profile(run.directory.profile, console, first_step=run.first_step, callbacks=callbacks)
        )


# --- what ends it ---


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk, a quota or the largest file size is reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise the error after the same step."""
    return isinstance(error, BadStep | Interrupted)


def is_explained(error: BaseException) -> bool:
    """Whether what follows tells the error in one line, or nothing needs to be said."""
    return isinstance(error, KeyboardInterrupt) or hardware.ran_out_of_memory(error) or is_full_disk(error)
