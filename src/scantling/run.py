"""Configuration -> objects -> fit -> record. With the entries and `command_line`, the only user of Hydra."""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import logging
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from hydra import compose
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
from scantling.accounting import convention, parameter_counts
from scantling.command_line import SWEEPS, mistakes
from scantling.composition import PARTS, build_decoder, choices, plain
from scantling.continuation import continuation
from scantling.data.loading import (
    BatchSizes,
    TrainBatches,
    check_batch_size,
    place_in_order,
    validation_batches,
)
from scantling.data.tokens import TokenizedCorpus, prepare
from scantling.memory import ENGINES, Engine, Memory, Sizes, choices_of_memory, training_memory
from scantling.model.decoder import Decoder
from scantling.plan import Plan, memory_line, short
from scantling.run_directory import RunDirectory, read_rows
from scantling.study.figures import draw_curves
from scantling.training import average, hardware, noise
from scantling.training.average import WeightAverage
from scantling.training.budget import steps_for
from scantling.training.callbacks import (
    CleanStop,
    Interrupted,
    Metrics,
    ProgressBar,
    Samples,
    StepCallbacks,
)
from scantling.training.checkpoints import CheckpointFiles, Checkpoints, newest_whole
from scantling.training.guard import BadStep, Guard, GuardSettings
from scantling.training.loggers import Wandb
from scantling.training.noise import NoiseScale
from scantling.training.optim import follow_width
from scantling.training.profiling import LabelledBatches, Profile, check_length
from scantling.training.ranks import EndTogether, die_with_the_first
from scantling.training.strategies import (
    WholeCheckpoints,
    check_launch,
    cluster_environment,
    devices_per_node,
)
from scantling.training.task import LanguageModelTask

NOT_IDENTITY = (
    "study",
    "arm",
    "match",
    "matched",
    "tune",
    "tuned",
    "resume",
    "dry_run",
    "log_every",
    "sample",
    "checkpoint",
    "guard",
    "noise_scale",
    "profile",
    "paths",
    "logger",
    "trainer",
)
"""Settings that do not change what is trained, and so are no part of a run's id; of `trainer`, precision does."""


@dataclass
class Run:
    """Everything that a fit needs, built and checked."""

    config: DictConfig
    directory: RunDirectory
    corpus: TokenizedCorpus
    plan: Plan
    device: torch.device
    precision: str
    guard: GuardSettings
    first_step: int
    checkpoint: Path | None
    """What the run goes on from; None: it starts."""
    damaged: list[str]
    """A line for each newer checkpoint that cannot serve."""

    def new_strategy(self) -> Strategy | None:
        """How several processes train together; None: Lightning's choice, which for one process is none."""
        strategy = instantiate(self.config.trainer.strategy)
        return None if strategy is None else strategy(self.device, self.precision)


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


# --- where a run lives ---


def identity(config: DictConfig) -> dict[str, Any]:
    """What is trained: the resolved configuration less paths, loggers and hardware."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    kept = {key: value for key, value in plain.items() if key not in (*NOT_IDENTITY, "choices")}
    return kept | {"precision": plain["trainer"]["precision"]}


def run_id(config: DictConfig) -> str:
    """The model preset's name, for people, and a hash of the run's identity."""
    digest = hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()
    return f"{choices()['model']}-{digest[:10]}"


def located(config: DictConfig) -> tuple[DictConfig, RunDirectory]:
    """The run's configuration and directory, as `resume` says.

    `resume=DIR` composes the overrides of the run in DIR again, with those of this command line after them.
    """
    typed = list(HydraConfig.get().overrides.task)
    if config.resume not in ("auto", "never"):
        directory = RunDirectory(config.resume)
        if not directory.config.exists():
            raise ValueError(
                f"resume={config.resume} holds no run: use auto, never, or a directory below {config.paths.runs}/"
            )
        config = compose("train", overrides=[*directory.environment["overrides"], *typed, SWEEPS])
        stored = OmegaConf.load(directory.config)
        assert isinstance(stored, DictConfig)
        differences = different_keys(identity(stored), identity(config))
        if differences:
            raise ValueError(
                f"{directory.path} is another run and cannot go on as this one: {'; '.join(differences)}"
            )
        return config, directory
    path = Path(config.paths.runs) / config.study / run_id(config)
    if config.resume == "never":
        others = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
        path = path if not path.exists() else next(other for other in others if not other.exists())
    return config, RunDirectory(path)


def different_keys(stored: dict, here: dict, prefix: str = "") -> list[str]:
    """'key: value there, value here' for every leaf that differs."""
    found = []
    for key in sorted({*stored, *here}):
        there, now = stored.get(key), here.get(key)
        if isinstance(there, dict) and isinstance(now, dict):
            found += different_keys(there, now, f"{prefix}{key}.")
        elif there != now:
            found.append(f"{prefix}{key} is {there} there, {now} here")
    return found


def already_finished(directory: RunDirectory) -> str:
    summary = directory.summary
    return (
        f"This run is finished: {summary['val/bpb']:.4f} bits/byte after {summary['tokens']:,} tokens, in {directory.path}\n"
        "Change a setting (seed=1, say) for another run, or repeat it beside this one with resume=never."
    )


# --- building ---


def checked(config: DictConfig) -> tuple[torch.device, str, Decoder]:
    """The device, the precision and, without memory, the model: what can be known before the text is read.

    Raises ValueError for what cannot be built.
    """
    device = hardware.device_of(config.trainer.accelerator)
    precision = hardware.resolved_precision(config.trainer.precision, device)
    for key in ("batch_size", "log_every", "val_every", "checkpoint.keep"):
        if OmegaConf.select(config, key) <= 0:
            raise ValueError(f"{key}={OmegaConf.select(config, key)} must be positive")
    if config.checkpoint.every_minutes is not None and config.checkpoint.every_minutes <= 0:
        raise ValueError(
            f"checkpoint.every_minutes={config.checkpoint.every_minutes} must be positive, or null"
        )
    decoder = build_decoder(config, config.model.vocab_size, "meta")
    if config.z_loss is not None and not (decoder.head.takes_z_loss and config.z_loss >= 0):
        raise ValueError(
            f"z_loss={config.z_loss} is a weight of 0 or more, for head=full and softcap: leave it null with other heads"
        )
    if config.document_mask:
        decoder.separate_documents(0)
    optimizer = optimizer_of_one_matrix(config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    follow_width(optimizer, dict.fromkeys(parameters, decoder.param.hidden_rate))
    return device, precision, decoder


def optimizer_of_one_matrix(config: DictConfig) -> torch.optim.Optimizer:
    """Of the chosen kind, to ask what it is."""
    return instantiate(config.optim, _convert_="all")([("weight", torch.nn.Parameter(torch.zeros(2, 2)))])


def assemble(config: DictConfig, directory: RunDirectory) -> Run:
    device, precision, _ = checked(config)
    corpus = prepare(instantiate(config.data), instantiate(config.tokenizer), Path(config.paths.cache))
    decoder = build_decoder(config, corpus.tokenizer.vocab_size, "meta")
    validation_batches(corpus.val.tokens, decoder.seq_len, config.val_windows, 1)
    plan = plan_of(config, decoder, device, precision)
    guard = GuardSettings(**config.guard)
    run = Run(
        config,
        directory,
        corpus,
        plan,
        device,
        precision,
        guard,
        first_step=0,
        checkpoint=None,
        damaged=[],
    )
    strategy = run.new_strategy()
    guard.check(strategy, precision, plan.sizes)
    average.check(config.ema.decay, strategy)
    if config.noise_scale:
        noise.check(strategy, precision, plan.micro_batches)
    if config.trainer.checkpoint_activations and not ENGINES[config.trainer.engine].recomputes:
        raise ValueError(
            "trainer.checkpoint_activations=true is not for ZeRO 3: use trainer=fsdp, which shares out as much, or zero2"
        )
    if isinstance(strategy, WholeCheckpoints):
        strategy.check(optimizer_of_one_matrix(config))
    training_batches(run, rank=0)
    run.checkpoint, run.damaged = newest_whole(directory)
    if run.checkpoint is not None:
        before = directory.environment["corpus"]["fingerprint"]
        if before != corpus.fingerprint:
            raise ValueError(
                f"{directory.path} was trained on another text (fingerprint {before[:12]}, now "
                f"{corpus.fingerprint[:12]}): bring that text back, or start anew with resume=never"
            )
        run.first_step = directory.step_of(run.checkpoint)
    if config.profile:
        check_length(plan.steps - run.first_step)
    return run


def plan_of(config: DictConfig, decoder: Decoder, device: torch.device, precision: str) -> Plan:
    counts = parameter_counts(decoder)
    budget: dict[str, Any] = dict(config.budget)
    flops_per_token = convention(budget.pop("convention", "exact"))(decoder, decoder.seq_len)
    nodes = config.trainer.nodes
    if nodes < 1:
        raise ValueError(f"trainer.nodes={nodes} must be positive")
    world_size = devices_per_node(config.trainer.devices, device) * nodes
    micro_batch_size = config.micro_batch_size or max(1, config.batch_size // world_size)
    sizes = BatchSizes(config.batch_size, **config.batch_warmup)
    check_batch_size(sizes, micro_batch_size, world_size)
    # As if all were as small as the first; their sizes are multiples of it.
    steps = steps_for(
        tokens_per_step=sizes.first * decoder.seq_len,
        n_params=sum(counts.values()),
        flops_per_token=flops_per_token,
        **budget,
    )
    return Plan.of(
        decoder,
        counts=counts,
        steps=steps if "steps" in budget else sizes.steps_within(steps * sizes.first),
        sizes=sizes,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
        memory=forecast(
            config,
            decoder,
            precision,
            engine=ENGINES[config.trainer.engine],
            devices=world_size,
            micro_batch_size=micro_batch_size,
            checkpoint_activations=config.trainer.checkpoint_activations,
        ),
    )


def forecast(
    config: DictConfig,
    decoder: Decoder,
    precision: str,
    *,
    engine: Engine,
    devices: int,
    micro_batch_size: int,
    checkpoint_activations: bool,
) -> Memory:
    """Of one device at its peak, under the run's settings but for these."""
    return training_memory(
        Sizes.of(decoder, instantiate(config.optim, _convert_="all")),
        sequences=micro_batch_size,
        seq_len=decoder.seq_len,
        half_precision=precision != "fp32",
        checkpoint_activations=checkpoint_activations,
        engine=engine,
        devices=devices,
        accumulates=micro_batch_size * devices < config.batch_size,
        averages=config.ema.decay is not None,
    )


def training_batches(run: Run, rank: int) -> TrainBatches:
    """Raises ValueError when the text is shorter than the context."""
    return TrainBatches(
        tokens=run.corpus.train.tokens,
        seq_len=run.plan.seq_len,
        sizes=run.plan.sizes,
        micro_batch_size=run.plan.micro_batch_size,
        rank=rank,
        world_size=run.plan.world_size,
        seed=run.config.seed,
        first_step=run.first_step,
        left_out=left_out(run),
        pin=run.device.type == "cuda",
    )


def description(run: Run) -> dict[str, str]:
    """Lines above the plan's numbers."""
    chosen, corpus = choices(), run.corpus
    return {
        "model": f"{chosen['model']}: {', '.join(f'{group}={chosen[group]}' for group in PARTS)}",
        "data": f"{corpus.description}; {chosen['tokenizer']} tokenizer, {corpus.tokenizer.vocab_size:,} entries; "
        f"{len(corpus.train.tokens):,} tokens to train, {len(corpus.val.tokens):,} held out",
        "device": f"{hardware.describe(run.device)}, {run.precision}",
        "directory": str(run.directory.path),
    }


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
    logger: Wandb = instantiate(config)(save_dir=study, name=name, group=run.config.study)
    resolved: dict[str, Any] = OmegaConf.to_container(run.config, resolve=True)  # type: ignore[assignment]
    console.print(
        logger.start(
            resolved | {"choices": choices(), "environment": environment(run), "parameters": run.plan.counts}
        )
    )
    if taken_up:
        logger.catch_up(run.directory.metrics(), read_rows(run.directory.samples))
    return [logger]


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


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it after the same step."""
    return isinstance(error, BadStep | Interrupted)


def is_explained(error: BaseException) -> bool:
    """Whether what follows says it in one line, or nothing needs to be said."""
    return isinstance(error, KeyboardInterrupt) or hardware.ran_out_of_memory(error) or is_full_disk(error)


def what_would_fit(run: Run) -> str:
    """Out of memory: what was forecast, and the cheapest settings that are forecast to take half of it at most."""
    config, plan = run.config, run.plan
    decoder = build_decoder(config, run.corpus.tokenizer.vocab_size, "meta")
    text = f"out of memory: the forecast was {memory_line(plan.memory)}"
    for choice in choices_of_memory(plan.micro_batch_size):
        if choice.engine != config.trainer.engine and plan.world_size == 1:
            continue
        memory = forecast(
            config,
            decoder,
            run.precision,
            engine=ENGINES[choice.engine],
            devices=plan.world_size,
            micro_batch_size=choice.micro_batch_size,
            checkpoint_activations=choice.checkpoint_activations,
        )
        if 2 * memory.total <= plan.memory.total:
            changed = [] if choice.engine == config.trainer.engine else [f"trainer={choice.engine}"]
            if choice.micro_batch_size != plan.micro_batch_size:
                changed.append(f"micro_batch_size={choice.micro_batch_size}")
            if choice.checkpoint_activations and not config.trainer.checkpoint_activations:
                changed.append("trainer.checkpoint_activations=true")
            return f"{text}; {' '.join(changed)} would take about {short(memory.total, 'B')}"
    return (
        f"{text}; no setting of memory takes half of it: more devices with trainer=fsdp, or a smaller model"
    )


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
    share = config.val_every
    noise_scale = NoiseScale(
        micro_batches=plan.micro_batches,
        processes=plan.world_size,
        tokens_before=plan.tokens_before,
    )
    metrics = Metrics(
        directory.metrics_from(run.first_step) if rank_zero_only.rank == 0 else None,
        guard,
        log_every=config.log_every,
        val_every=max(1, round(share * plan.steps) if share < 1 else round(share)),
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
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=strategy is None,  # what is gathered in that mode cannot be trained on
    )
    held_out = validation_batches(
        run.corpus.val.tokens,
        plan.seq_len,
        config.val_windows,
        4 * plan.micro_batch_size,  # without gradients there is room for it
    )
    batches = training_batches(run, rank=trainer.global_rank)
    succeeded = False
    gc.collect()  # what an earlier run of a sweep left behind
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


# --- steps that went wrong ---


def guarded(run: Run, step: int) -> int:
    """How often training was rolled back, or a step up to this one skipped."""
    rows = run.directory.guarded()
    return sum(
        row["action"] == "rollback" or (row["action"] == "skip" and row["step"] <= step) for row in rows
    )


def left_out(run: Run) -> list[int]:
    """The places in the order of data that rollbacks passed over."""
    ranges = [row["samples"] for row in run.directory.guarded() if row["action"] == "rollback"]
    full = run.plan.sizes.full  # which every step is, where something is left out
    return [place for a, b in ranges for place in range(a // full, b // full)]


def samples_of(run: Run, first: int, last: int) -> list[int]:
    """The half-open range of samples of these steps, counted from 1."""
    places = left_out(run)
    begin, end = (place_in_order(step - 1, places) for step in (max(1, first), last))
    return [run.plan.sizes.before(begin), run.plan.sizes.before(end + 1)]


@rank_zero_only
def record(run: Run, bad: BadStep, action: str) -> None:
    first = bad.step - run.guard.batches + 1 if action == "rollback" else bad.step
    samples = samples_of(run, first, bad.step)
    run.directory.guard({"step": bad.step, "reason": str(bad), "action": action, "samples": samples})


def stop(run: Run, bad: BadStep) -> None:
    record(run, bad, "stop")
    if rank_zero_only.rank == 0:
        first, end = samples_of(run, bad.step, bad.step)
        before = guarded(run, bad.step)
        print(
            f"error: {bad}{f', after {before} others' if before else ''}: a lower lr, more warm-up, a smaller clip or "
            f"guard.action=skip or rollback may help; its samples {first} to {end - 1} are noted in {run.directory.guards}",
            file=sys.stderr,
        )
    sys.exit(1)


def roll_back(run: Run, bad: BadStep) -> None:
    """Back to the newest checkpoint before the batches that are to be left out, or to the start."""
    if rank_zero_only.rank == 0:
        # First these, then the record: whenever the process dies, what is left fits together.
        for path in run.directory.step_checkpoints():
            if run.directory.step_of(path) > bad.step - run.guard.batches:
                path.unlink()
        if not run.directory.step_checkpoints():
            run.directory.last.unlink(missing_ok=True)
        record(run, bad, "rollback")
    if dist.is_initialized():
        dist.barrier()
    run.checkpoint, run.damaged = newest_whole(run.directory)
    run.first_step = 0 if run.checkpoint is None else run.directory.step_of(run.checkpoint)


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
