"""Configuration -> objects -> fit -> record."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from torch.utils.data import DataLoader

from scantling import __version__
from scantling.assembly import Run, assemble, description, training_batches, what_would_fit
from scantling.command_line import mistakes
from scantling.composition import PARTS, build_decoder, choices, plain
from scantling.continuation import continuation
from scantling.data.loading import validation_batches
from scantling.identity import already_finished, located
from scantling.model.decoder import Decoder
from scantling.rollback import guarded, record, roll_back, stop
from scantling.run_directory import RunDirectory, read_rows
from scantling.study.figures import draw_curves
from scantling.training import float8, hardware
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
from scantling.training.loggers import Wandb
from scantling.training.noise import NoiseScale
from scantling.training.profiling import LabelledBatches, Profile
from scantling.training.ranks import EndTogether, die_with_the_first
from scantling.training.strategies import (
    WholeCheckpoints,
    check_launch,
    cluster_environment,
    devices_per_node,
)
from scantling.training.task import LanguageModelTask


def train(config: DictConfig) -> RunDirectory:
    """One run, from its configuration to its directory.

    Raises Mistake, before anything is computed, for what the user can put right.
    """
    console = Console(
        quiet=rank_zero_only.rank != 0, highlight=False, width=None if sys.stdout.isatty() else 120
    )
    hardware.keep_freed_memory()
    die_with_the_first()
    with mistakes():
        if config.tune is not None and config.tuned is None:
            raise ValueError("tune=lr chooses the learning rate of a sweep's arms: add -m, or leave it out")
        config, directory = located(config)
        if directory.is_finished:
            console.print(already_finished(directory))
            return directory
        if not config.dry_run:
            device = hardware.device_of(config.trainer.accelerator)
            check_launch(devices_per_node(config.trainer.devices, device), config.trainer.nodes)
        run = assemble(config, directory)
        console.print(run.plan.table(description(run), len(run.corpus.train.tokens)))
        if config.dry_run:
            return directory
        begin(run)
    with out_of_disk(directory):
        fit(run, console)
    if rank_zero_only.rank == 0:
        console.print(report(run))
    return directory


@contextlib.contextmanager
def out_of_disk(directory: RunDirectory) -> Iterator[None]:
    """A full disk or quota ends the run with one line and exit code 1."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        print(
            f"error: {error.filename or directory.path} cannot be written ({error.strerror}); finished checkpoints stand: "
            "free some space, and the same command goes on from the last",
            file=sys.stderr,
        )
        sys.exit(1)


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# --- the record ---


@rank_zero_only
def begin(run: Run) -> None:
    """Set the run's directory up, so that it explains itself; raises where it cannot be written or is too small."""
    resolved = OmegaConf.create(OmegaConf.to_container(run.config, resolve=True))
    run.directory.begin(
        OmegaConf.to_yaml(resolved) + OmegaConf.to_yaml({"choices": choices()}), environment(run)
    )
    there, wanted = (
        len(run.directory.step_checkpoints()),
        run.config.checkpoint.keep + 2,
    )  # the best, the next
    run.plan.check_disk(run.directory.path, checkpoints=wanted - min(there, wanted - 1))
    run.corpus.tokenizer.save(run.directory.tokenizer)


def environment(run: Run) -> dict[str, Any]:
    return {
        "scantling": __version__,
        "commit": git_commit(),
        "overrides": list(HydraConfig.get().overrides.task),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "device": hardware.describe(run.device),
        "precision": run.precision,
        "world_size": run.plan.world_size,
        "steps": run.plan.steps,
        "corpus": {
            "fingerprint": run.corpus.fingerprint,
            "description": run.corpus.description,
            "train_tokens": len(run.corpus.train.tokens),
        },
        "tokenizer": run.corpus.tokenizer.fingerprint,
    }


def git_commit() -> str | None:
    """Of this project's checkout, marked when files differ from it; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def loggers_of(run: Run, console: Console, taken_up: bool) -> list[Logger]:
    """The chosen logger, told where to write and under which name; W&B is opened and says where it goes."""
    config = run.config.logger
    if config._target_ is None or rank_zero_only.rank != 0:
        return []
    name, study = run.directory.name, str(run.directory.path.parent)
    if not config._target_.endswith(".Wandb"):
        return [instantiate(config)(save_dir=study, name=name)]
    tags = [*config.tags, *tags_of_arm(run.config.arm)]
    logger: Wandb = instantiate(config)(save_dir=study, name=name, group=run.config.study, tags=tags)
    resolved: dict[str, Any] = OmegaConf.to_container(run.config, resolve=True)  # type: ignore[assignment]
    console.print(
        logger.start(
            resolved | {"choices": choices(), "environment": environment(run), "parameters": run.plan.counts}
        )
    )
    if taken_up:
        logger.catch_up(run.directory.metrics(), read_rows(run.directory.samples))
    return [logger]


def tags_of_arm(arm: str | None) -> list[str]:
    """Its name; of one without a name the parts that were typed for it, as `attn=gqa`."""
    if arm is not None:
        return [arm]
    typed = HydraConfig.get().overrides.task
    return [text for text in typed if re.split(r"[/.=]", text)[0] in PARTS]


@rank_zero_only
def finish(run: Run, peak: float, peak_source: str) -> None:
    rows = run.directory.metrics()
    draw_curves(rows, run.directory.curves, title=run.directory.name)
    best = min((row for row in rows if "val/loss" in row), key=lambda row: row["val/loss"])
    run.directory.finish(
        {
            **rows[-1],
            "best": {key: best[key] for key in ("step", "tokens", "val/loss", "val/bpb")},
            "parameters": run.plan.counts,
            "flops_convention": "exact",
            "peak_flops": {"flops": peak, "source": peak_source},
            "corpus": run.corpus.fingerprint,
            "guarded": guarded(run, run.plan.steps),
        }
    )


# --- training ---


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


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it after the same step."""
    return isinstance(error, BadStep | Interrupted)


def is_explained(error: BaseException) -> bool:
    """Whether what follows says it in one line, or nothing needs to be said."""
    return isinstance(error, KeyboardInterrupt) or hardware.ran_out_of_memory(error) or is_full_disk(error)


def fit_from_checkpoint(run: Run, console: Console) -> None:
    """Train from the last checkpoint, or from the start. Raises BadStep."""
    config, plan, directory = run.config, run.plan, run.directory
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", module="lightning"
    )  # its advice on loaders and loggers does not hold here
    warnings.filterwarnings("ignore", "The `srun` command is available")
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
    console.print(f"peak {peak / 1e9:,.0f} GFLOP/s, {peak_source}")
    for line in run.damaged:
        console.print(f"warning: {line}; skipped", soft_wrap=True)
    if run.first_step:
        console.print(f"resuming after step {run.first_step:,}")
    task = LanguageModelTask(
        decoder,
        optimizer=instantiate(config.optim, _convert_="all"),
        schedule=plain(instantiate(config.schedule)),
        total_steps=plan.steps,
        token_bytes=run.corpus.token_bytes,
        compiled=config.trainer.compile,
    )
    strategy = run.new_strategy()
    taken_up = directory.has_metrics
    guard = Guard(
        run.guard,
        record=lambda bad, action: record(run, bad, action),
        used=guarded(run, run.first_step),
        gradients_may_overflow=run.precision == "fp16",
    )
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
    if config.profile:
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
    finish(run, peak, peak_source)


# --- samples and the last screen ---


def sample_of(run: Run, decoder: Decoder, strategy: Strategy | None) -> str | None:
    """A sample, in the first process; where each has a part of the weights all must call this, and it is given a copy."""
    if isinstance(strategy, WholeCheckpoints) and strategy.shards_weights:
        state = strategy.lightning_module_state_dict()
        if rank_zero_only.rank == 0:
            decoder = build_decoder(run.config, run.corpus.tokenizer.vocab_size, "cpu").eval()
            decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in state.items()})
    return sample(run, decoder) if rank_zero_only.rank == 0 else None


def sample(run: Run, decoder: Decoder) -> str:
    """The configured prompt and its continuation, the same at every call for the same weights."""
    settings: dict[str, Any] = dict(run.config.sample)
    prompt = settings.pop("prompt")
    if prompt is None:
        prompt = run.corpus.tokenizer.decode(run.corpus.val.tokens[:8].tolist())
    return prompt + "".join(
        continuation(decoder, run.corpus.tokenizer, prompt, seed=run.config.seed, **settings)
    )


def report(run: Run) -> str:
    """The last screen: final numbers, one sample, and where things are."""
    summary, path = run.directory.summary, run.directory.path
    return (
        f"\n[bold]{summary['val/bpb']:.4f} bits/byte[/bold]  (loss {summary['val/loss']:.4f} nats/token, perplexity "
        f"{summary['val/perplexity']:.2f}) after {summary['tokens']:,} tokens, {summary['flops']:.3g} FLOPs, "
        f"{summary['seconds']:.0f} s of training\n\n"
        f"[dim]a sample of at most {run.config.sample.n_tokens} tokens:[/dim]\n{escape(run.directory.last_sample)}\n\n"
        f"run        {path}\n"
        f"curves     {run.directory.curves}\n"
        f"more text  python src/sample.py run={path}\n"
        f"evaluate   python src/evaluate.py run={path}"
    )
