"""A run built from its configuration and checked, before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from scantling.config.composition import PARTS
from scantling.config.decoder import build_decoder
from scantling.data.loading import (
    BatchSizes,
    TrainBatches,
    check_batch_size,
    validation_batches,
)
from scantling.data.tokens import TokenizedCorpus, prepare_corpus
from scantling.inference import sampling
from scantling.model import hardware
from scantling.model.accounting import convention, parameter_counts
from scantling.model.checks import check_positive, check_whole
from scantling.model.decoder import Decoder
from scantling.report.numbers import short
from scantling.runs.directory import RunDirectory
from scantling.training.average import check_average
from scantling.training.budget import steps_between_validations, steps_for
from scantling.training.checkpoints import newest_whole_checkpoint
from scantling.training.float8 import check_float8
from scantling.training.guard import GuardSettings
from scantling.training.launch import devices_per_node
from scantling.training.memory import ENGINES, Choice, choices_of_memory
from scantling.training.memory_forecast import Forecast, cheapest_within, memory_forecast
from scantling.training.noise import check_noise_scale
from scantling.training.optim import follow_width
from scantling.training.plan import Plan, memory_line
from scantling.training.profiling import check_profile
from scantling.training.strategies import WholeCheckpoints


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
    """The checkpoint that the run goes on from; None: it starts."""
    damaged: list[str]
    """A line for each newer checkpoint that cannot serve."""

    def new_strategy(self) -> Strategy | None:
        """How several processes train together; None: Lightning's choice, which for one process is none."""
        strategy = instantiate(self.config.trainer.strategy)
        return None if strategy is None else strategy(self.device, self.precision)


def check_config(config: DictConfig) -> tuple[torch.device, str, Decoder]:
    """The device, the precision and, without memory, the model: what can be known before the text is read.

    Raises ValueError for what cannot be built.
    """
    device = hardware.device_of(config.trainer.accelerator)
    precision = hardware.resolved_precision(config.trainer.precision, device)
    for key in ("batch_size", "micro_batch_size", "log_every", "checkpoint.keep"):
        value = OmegaConf.select(config, key)
        if value is not None:
            check_whole(key, value)
    steps_between_validations(config.val_every, steps=1)
    sampling.GenerationSettings(**{name: value for name, value in config.sample.items() if name != "prompt"})
    for key in ("checkpoint.every_minutes", "clip"):
        check_positive(key, OmegaConf.select(config, key), or_null=True)
    instantiate(config.schedule)(0, 1)
    decoder = build_decoder(config, config.model.vocab_size, "meta")
    check_float8(precision, device, decoder)
    if config.z_loss is not None and not (decoder.head.takes_z_loss and config.z_loss >= 0):
        raise ValueError(
            f"z_loss={config.z_loss} is a weight of 0 or more, for head=full and softcap: "
            "leave it null with other heads"
        )
    if config.document_mask:
        decoder.separate_documents(0)
    optimizer = optimizer_of_one_matrix(config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    follow_width(optimizer, dict.fromkeys(parameters, decoder.param.hidden_rate))
    return device, precision, decoder


def optimizer_of_one_matrix(config: DictConfig) -> torch.optim.Optimizer:
    """An optimiser of the chosen kind, to ask what it is."""
    return instantiate(config.optim, _convert_="all")([("weight", torch.nn.Parameter(torch.zeros(2, 2)))])


def assemble(config: DictConfig, directory: RunDirectory) -> Run:
    """Prepare the text, plan the run and check that its parts fit each other; the model has no memory yet.

    Raises ValueError for what cannot be trained so.
    """
    device, precision, _ = check_config(config)
    corpus = prepare_corpus(instantiate(config.data), instantiate(config.tokenizer), Path(config.paths.cache))
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
    guard.check_engine(strategy, precision, plan.sizes)
    check_average(config.ema.decay, strategy)
    if config.noise_scale:
        check_noise_scale(strategy, precision, plan.micro_batches)
    if config.trainer.checkpoint_activations and not ENGINES[config.trainer.engine].recomputes:
        raise ValueError(
            "trainer.checkpoint_activations=true is not for ZeRO 3: "
            "use trainer=fsdp, which shares out as much, or zero2"
        )
    if isinstance(strategy, WholeCheckpoints):
        strategy.check_optimizer(optimizer_of_one_matrix(config))
    training_batches(run, rank=0)
    run.checkpoint, run.damaged = newest_whole_checkpoint(directory)
    if run.checkpoint is not None:
        before = directory.environment["corpus"]["fingerprint"]
        if before != corpus.fingerprint:
            raise ValueError(
                f"{directory.path} was trained on another text (fingerprint {before[:12]}, now "
                f"{corpus.fingerprint[:12]}): bring that text back, or start anew with resume=never"
            )
        run.first_step = directory.step_of(run.checkpoint)
    if config.profile:
        check_profile(plan.steps)
    return run


def plan_of(config: DictConfig, decoder: Decoder, device: torch.device, precision: str) -> Plan:
    """The run's counts: its budget as steps, its batch as micro-batches of each device, its peak memory.

    Raises ValueError for settings that are out of range or do not divide.
    """
    counts = parameter_counts(decoder)
    budget: dict[str, Any] = dict(config.budget)
    flops_per_token = convention(budget.pop("convention", "exact"))(decoder, decoder.seq_len)
    nodes = config.trainer.nodes
    check_whole("trainer.nodes", nodes)
    world_size = devices_per_node(config.trainer.devices, device) * nodes
    of_each, rest = divmod(config.batch_size, world_size)
    micro_batch_size = config.micro_batch_size or (1 if rest else of_each)
    sizes = BatchSizes(config.batch_size, **config.batch_warmup)
    check_batch_size(sizes, micro_batch_size, world_size)
    chosen = Choice(config.trainer.engine, config.trainer.checkpoint_activations, micro_batch_size)
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
        memory=forecast_of(config, decoder, device, precision, world_size)(chosen),
    )


def forecast_of(
    config: DictConfig, decoder: Decoder, device: torch.device, precision: str, world_size: int
) -> Forecast:
    """The forecast of the peak memory of one of the run's devices."""
    return memory_forecast(
        config,
        decoder,
        devices=world_size,
        half_precision=precision != "fp32",
        on_gpu=device.type == "cuda",
    )


def training_batches(run: Run, rank: int) -> TrainBatches:
    """The batches of the process `rank`. Raises ValueError when the text is shorter than the context."""
    return TrainBatches(
        tokens=run.corpus.train.tokens,
        seq_len=run.plan.seq_len,
        sizes=run.plan.sizes,
        micro_batch_size=run.plan.micro_batch_size,
        rank=rank,
        world_size=run.plan.world_size,
        seed=run.config.seed,
        first_step=run.first_step,
        left_out=places_left_out(run),
        pin=run.device.type == "cuda",
    )


def describe_run(run: Run) -> dict[str, str]:
    """Lines above the plan's numbers."""
    chosen, corpus = run.config.choices, run.corpus
    return {
        "model": f"{chosen['model']}: {', '.join(f'{group}={chosen[group]}' for group in PARTS)}",
        "data": f"{corpus.description}; {chosen['tokenizer']} tokenizer, "
        f"{corpus.tokenizer.vocab_size:,} entries; "
        f"{len(corpus.train.tokens):,} tokens to train, {len(corpus.val.tokens):,} held out",
        "device": f"{hardware.describe(run.device)}, {run.precision}",
        "directory": str(run.directory.path),
    }


def places_left_out(run: Run) -> set[int]:
    """The places in the order of data that rollbacks passed over."""
    ranges = [row["samples"] for row in run.directory.guarded() if row["action"] == "rollback"]
    full = run.plan.sizes.full  # which every step is, where something is left out
    return {place for a, b in ranges for place in range(a // full, b // full)}


def what_would_fit(run: Run) -> str:
    """What to say out of memory: the forecast, and the cheapest settings forecast to take at most half."""
    trainer, plan = run.config.trainer, run.plan
    decoder = build_decoder(run.config, run.corpus.tokenizer.vocab_size, "meta")
    forecast = forecast_of(run.config, decoder, run.device, run.precision, plan.world_size)
    offered = choices_of_memory(plan.micro_batch_size)
    if plan.world_size == 1:
        offered = (choice for choice in offered if choice.engine == trainer.engine)
    chosen = cheapest_within(plan.memory.total / 2, offered, forecast)
    text = f"out of memory: the forecast was {memory_line(plan.memory)}"
    if chosen is None:
        return (
            f"{text}; no setting of memory takes half of it: "
            "more devices with trainer=fsdp, or a smaller model"
        )
    changed = [] if chosen.engine == trainer.engine else [f"trainer={chosen.engine}"]
    if chosen.micro_batch_size != plan.micro_batch_size:
        changed.append(f"micro_batch_size={chosen.micro_batch_size}")
    if chosen.checkpoint_activations and not trainer.checkpoint_activations:
        changed.append("trainer.checkpoint_activations=true")
    return f"{text}; {' '.join(changed)} would take about {short(forecast(chosen).total, 'B')}"
