"""A run before it exists: its sizes, FLOPs, memory and time of any model, on any machine."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from scantling.cli.plan_study import plan_study
from scantling.cli.plan_tables import (
    Training,
    cache_table,
    conventions_table,
    memory_table,
    parts_table,
    training_table,
)
from scantling.config.composition import PARTS, tokenizer_entries, unknown_entries, with_settings
from scantling.config.decoder import build_decoder
from scantling.config.mistakes import mistakes
from scantling.data.loading import BatchSizes
from scantling.model.accounting import active_parameters, convention
from scantling.model.checks import check_positive, check_share, check_whole
from scantling.model.decoder import Decoder
from scantling.report.numbers import short
from scantling.report.terminal import open_console
from scantling.training.budget import steps_for
from scantling.training.memory import Choice, choices_of_memory, number_of_bytes
from scantling.training.memory_forecast import Forecast, cheapest_within, memory_forecast


def plan(config: DictConfig) -> None:
    """Print what the model is and takes, or plan a study of many. Reads no data and allocates no weights.

    Raises Mistake for what the user can put right.
    """
    console = open_console()
    with mistakes():
        check_settings(config)
        entries = tokenizer_entries(config)
        if entries is not None:
            config = with_settings(config, {"model.vocab_size": entries})
        if config.isoflop.flops is not None or config.isoflop.device_hours is not None:
            return plan_study(config, console, entries)
        decoder = build_decoder(config, config.model.vocab_size, "meta")
        context = config.context or decoder.seq_len
        limit = None if config.memory is None else number_of_bytes(str(config.memory))
        forecast = memory_forecast(
            config,
            decoder,
            devices=config.devices,
            half_precision=config.trainer.precision != "fp32",
            on_gpu=config.trainer.accelerator != "cpu",  # that of the machine that is planned for
        )
        sequences = config.micro_batch_size or max(1, config.batch_size // config.devices)
        chosen = None
        if limit is not None:
            chosen = cheapest_within(limit, choices_of_memory(sequences), forecast)
            sequences = 1 if chosen is None else chosen.micro_batch_size
        products = {"auto": "bf16"}.get(config.trainer.precision, config.trainer.precision)
        about = (
            f"of one of {config.devices} devices, {sequences} × {decoder.seq_len:,} tokens at once; "
            f"{config.choices.optim}, products in {products}"
        )
        tables = [
            parts_table(decoder, context),
            conventions_table(decoder, context),
            training_table(decoder, trainings(config, decoder), config.devices, config.peak, config.mfu),
            memory_table(forecast, sequences, about, limit),
            cache_table(decoder, sorted({context, *config.cache.contexts}), config.cache.precisions),
        ]
    options = config.choices
    parts = " ".join(f"{group}={options[group]}" for group in PARTS)
    shape = config.model
    console.print(f"[bold]{options['model']}[/bold]  {parts}")
    console.print(
        f"[dim]{shape.n_layers} layers of width {shape.d_model:,}, {shape.n_heads} heads, "
        f"{shape.seq_len:,} tokens, {shape.vocab_size:,} entries[/dim]"
    )
    if entries is None:
        console.print(f"[dim]{unknown_entries(config)}[/dim]", soft_wrap=True)
    for table in tables:
        console.print()
        console.print(table)
    if limit is not None:
        console.print()
        console.print(advice(chosen, forecast, limit, config.devices), soft_wrap=True)


def advice(chosen: Choice | None, forecast: Forecast, limit: int, devices: int) -> str:
    """What to choose: the cheapest choice that fits into `limit`, as it is typed."""
    if chosen is None:
        return (
            f"Nothing fits into {short(limit, 'B')}, with one sequence at once: more devices, or a shorter "
            "context"
        )
    return (
        f"The cheapest that fits into {short(limit, 'B')}: trainer={chosen.engine} trainer.devices={devices} "
        f"micro_batch_size={chosen.micro_batch_size}"
        f"{' trainer.checkpoint_activations=true' if chosen.checkpoint_activations else ''}, "
        f"at {short(forecast(chosen).total, 'B')}"
    )


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for the first setting that is out of range."""
    for key in ("peak", "mfu"):
        check_positive(key, config[key])
    check_share("mfu", config.mfu)
    contexts = {f"cache.contexts[{i}]": n for i, n in enumerate(config.cache.contexts)}
    counts = {key: config[key] for key in ("devices", "batch_size", "micro_batch_size", "context")}
    for key, value in (counts | contexts).items():
        if value is not None:
            check_whole(key, value)


def trainings(config: DictConfig, decoder: Decoder) -> list[Training]:
    """What is reckoned: the budget, and twenty tokens for each active parameter."""
    budget: dict[str, Any] = dict(config.budget)
    name = f"budget={config.choices.budget}"
    flops_per_token = convention(budget.pop("convention", "exact"))(decoder, decoder.seq_len)
    n, active = sum(p.numel() for p in decoder.parameters()), active_parameters(decoder)
    # In steps of one token, for a budget below one step of this batch is worth seeing too.
    tokens = steps_for(
        tokens_per_step=1,
        n_params=n,
        flops_per_token=flops_per_token,
        **budget,
    )
    if "steps" in budget:
        tokens = BatchSizes(config.batch_size, **config.batch_warmup).before(tokens) * decoder.seq_len
    optimal = "20 tokens a parameter" if n == active else "20 an active parameter"
    return [Training(name, tokens), Training(optimal, 20 * active)]
