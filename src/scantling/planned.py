"""A run looked at before it exists: sizes, FLOPs, memory and time of any model, on any machine."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from scantling.accounting import active_parameters, convention
from scantling.command_line import mistakes
from scantling.composition import PARTS, build_decoder, choices
from scantling.model.decoder import Decoder
from scantling.plan import Training, cache_table, conventions_table, memory_table, parts_table, training_table
from scantling.training.budget import steps_for

PRINTED_WIDTH = 100
"""Of lines that go to a file or a pipe."""


def plan(config: DictConfig) -> None:
    """Print what the model is and takes. Reads no data and allocates no weights.

    Raises Mistake for what the user can put right.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    with mistakes():
        check(config)
        decoder = build_decoder(config, config.model.vocab_size, "meta")
        context = config.context or decoder.seq_len
        tables = [
            parts_table(decoder, context),
            conventions_table(decoder, context),
            training_table(decoder, trainings(config, decoder), config.devices, config.peak, config.mfu),
            memory_table(decoder, config.batch_size, half_precision=config.trainer.precision != "fp32"),
            cache_table(decoder, sorted({context, *config.cache.contexts}), config.cache.precisions),
        ]
    chosen = choices()
    parts = " ".join(f"{group}={chosen[group]}" for group in PARTS)
    shape = config.model
    console.print(f"[bold]{chosen['model']}[/bold]  {parts}")
    console.print(
        f"[dim]{shape.n_layers} layers of width {shape.d_model:,}, {shape.n_heads} heads, "
        f"{shape.seq_len:,} tokens, {shape.vocab_size:,} entries[/dim]"
    )
    for table in tables:
        console.print()
        console.print(table)


def check(config: DictConfig) -> None:
    positive = {
        "devices": config.devices,
        "peak": config.peak,
        "mfu": config.mfu,
        "batch_size": config.batch_size,
    }
    contexts = {f"cache.contexts[{i}]": n for i, n in enumerate(config.cache.contexts)}
    for key, value in (positive | contexts | {"context": config.context}).items():
        if value is not None and value <= 0:
            raise ValueError(f"{key}={value} must be positive")


def trainings(config: DictConfig, decoder: Decoder) -> list[Training]:
    """The budget, and twenty tokens for each active parameter."""
    budget: dict[str, Any] = dict(config.budget)
    name = "budget=" + choices()["budget"]
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
        tokens *= config.batch_size * decoder.seq_len
    optimal = "20 tokens a parameter" if n == active else "20 an active parameter"
    return [Training(name, tokens), Training(optimal, 20 * active)]
