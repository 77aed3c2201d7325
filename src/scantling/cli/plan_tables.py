"""The tables of plan.py: parts, conventions of FLOPs, training, memory, cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table

from scantling.model.accounting import (
    CONVENTIONS,
    active_counts,
    cache_bytes,
    exact,
    forward_flops_by_part,
    non_embedding,
    parameter_counts,
)
from scantling.model.decoder import Decoder
from scantling.report.numbers import duration, short
from scantling.report.terminal import bar, titled
from scantling.training.memory import ENGINES, Choice, Memory


@dataclass(frozen=True)
class Training:
    """A number of tokens to train on, under a name."""

    name: str
    tokens: int


def parts_table(decoder: Decoder, context: int) -> Table:
    """Parameters and the forward pass, by part; a row for attention itself, which has no parameters."""
    counts, active = parameter_counts(decoder), active_counts(decoder)
    flops = forward_flops_by_part(decoder, None, context)
    rows = {
        "embedding": ("embedding", "embedding"),
        "position": ("position", None),
        "attention, projections": ("attention", "attention projections"),
        "attention, mixing": (None, "attention mixing"),
        "router": ("router", "router"),
        "feed-forward": ("feed-forward", "feed-forward"),
        "norms, scales": ("norm", None),
        "block": (None, "block"),
        "head": ("head", "head"),
    }
    assert {group for group, _ in rows.values() if group} == counts.keys()
    assert {part for _, part in rows.values() if part} == flops.keys()
    total, sparse = sum(flops.values()), counts != active
    table = titled(
        "Parts",
        f"forward FLOPs a token, the mean over a sequence of {context:,}",
        *("parameters", *(["active"] if sparse else []), "FLOPs", "share"),
    )
    table.add_column()
    for row, (group, part) in rows.items():
        n, spent = (counts[group] if group else 0), (flops[part] if part else 0.0)
        if n or spent:
            sizes = [n, active[group] if group else 0] if sparse else [n]
            table.add_row(
                row,
                *(f"{size:,}" if size else "" for size in sizes),
                *((short(spent), f"{spent / total:.1%}", bar(spent / total)) if spent else ()),
            )
    sizes = [sum(counts.values()), sum(active.values())] if sparse else [sum(counts.values())]
    table.add_section()
    table.add_row("total", *(f"{size:,}" for size in sizes), short(total), style="bold")
    sizes = [non_embedding(counts), non_embedding(active)] if sparse else [non_embedding(counts)]
    table.add_row("without embeddings and head", *(f"{size:,}" for size in sizes), style="dim")
    return table


def conventions_table(decoder: Decoder, context: int) -> Table:
    """Training FLOPs per token as the literature counts them."""
    table = titled("Conventions", "training FLOPs a token, forward and backward", "a token", "of exact")
    table.add_column("as", style="dim")
    reference = exact(decoder, context)
    for name, convention in CONVENTIONS.items():
        flops = convention(decoder, context)
        table.add_row(name, short(flops), f"{flops / reference:.1%}", first_sentence(convention))
    return table


def training_table(
    decoder: Decoder, trainings: list[Training], devices: int, peak: float, mfu: float
) -> Table:
    """Tokens, FLOPs by the `exact` convention, and the time they take."""
    speed = f"devices={devices} of peak={short(peak, 'FLOP/s')}, mfu={mfu:g}: set them to your machine's"
    table = titled("Training", speed, "tokens", "FLOPs", "time", "tokens/s")
    per_token = exact(decoder, decoder.seq_len)
    for training in trainings:
        flops = training.tokens * per_token
        rate = devices * peak * mfu
        table.add_row(
            training.name,
            short(training.tokens),
            f"{flops:.2e}",
            duration(flops / rate),
            short(rate / per_token),
        )
    return table


def memory_table(
    forecast: Callable[[Choice], Memory], sequences: int, about: str, limit: int | None
) -> Table:
    """The peak of one device under every engine, also with every block's activations computed twice.

    Peaks that fit are bold.
    """
    table = titled(
        "Memory",
        about,
        *("weights", "gradients", "optimiser", "activations", "logits", "other", "peak", "checkpointed"),
    )
    table.columns[0].min_width, table.padding = 14, 0
    for engine, facts in ENGINES.items():
        memory, checkpointed = (forecast(Choice(engine, twice, sequences)) for twice in (False, True))
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
        peaks = [
            f"[bold]{short(total, 'B')}[/bold]" if limit and total <= limit else short(total, "B")
            for total in (memory.total, checkpointed.total)
        ]
        if not facts.recomputes:
            peaks[1] = "–"
        table.add_row(engine, *(short(size, "B") for size in (*sizes, memory.workspace)), *peaks)
    return table


def cache_table(decoder: Decoder, contexts: Sequence[int], precisions: Sequence[str]) -> Table:
    """Keys and values of one sequence, in bytes."""
    table = titled(
        "Cache", "of keys and values, one sequence", "a token", *(f"{n:,} tokens" for n in contexts)
    )
    for precision in precisions:
        sizes = (cache_bytes(decoder, context=n, batch=1, precision=precision) for n in (1, *contexts))
        table.add_row(precision, *(short(size, "B") for size in sizes))
    return table


def first_sentence(documented: object) -> str:
    """The first sentence of a docstring, which by this project's rule is the formula; the paper follows."""
    paragraph = (documented.__doc__ or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z]|arXiv:)", " ".join(paragraph.split()))[0].rstrip(".")
