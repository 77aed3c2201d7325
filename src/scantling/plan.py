"""What a run will do and take, known before its first step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from scantling.accounting import (
    CONVENTIONS,
    active_counts,
    cache_bytes,
    exact,
    forward_flops_by_part,
    non_embedding,
    parameter_counts,
)
from scantling.data.loading import BatchSizes
from scantling.memory import ENGINES, Choice, Memory
from scantling.model.decoder import Decoder


@dataclass(frozen=True)
class Plan:
    """Counts of one run; `flops_per_token` is training's, forward and backward, by the `exact` convention."""

    counts: dict[str, int]
    steps: int
    seq_len: int
    sizes: BatchSizes
    micro_batch_size: int
    world_size: int
    flops_per_token: float
    memory: Memory
    """Of one device, at its peak."""

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        *,
        counts: dict[str, int],
        steps: int,
        sizes: BatchSizes,
        micro_batch_size: int,
        world_size: int,
        memory: Memory,
    ) -> Plan:
        return cls(
            counts=counts,
            steps=steps,
            seq_len=decoder.seq_len,
            sizes=sizes,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            flops_per_token=exact(decoder, decoder.seq_len),
            memory=memory,
        )

    @property
    def parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimiser step on each device."""
        return self.sizes.full // (self.micro_batch_size * self.world_size)

    def tokens_before(self, step: int) -> int:
        """In the first `step` steps."""
        return self.sizes.before(step) * self.seq_len

    @property
    def tokens(self) -> int:
        return self.tokens_before(self.steps)

    @property
    def flops(self) -> float:
        return self.tokens * self.flops_per_token

    def table(self, about: dict[str, str], corpus_tokens: int) -> Group:
        """For the terminal; `about` are lines that describe model, data and device."""
        lines = Table.grid(padding=(0, 2))
        for name, text in about.items():
            lines.add_row(f"[bold]{name}[/bold]", text)
        groups = ", ".join(f"{name} {count:,}" for name, count in self.counts.items() if count)
        lines.add_row(
            "[bold]parameters[/bold]",
            f"{self.parameters:,} ({non_embedding(self.counts):,} without embeddings): {groups}",
        )
        batch = f"{self.sizes.full:,} sequences × {self.seq_len:,} tokens"
        if self.micro_batches > 1 or self.world_size > 1:
            batch += f", as {self.micro_batches} × {self.micro_batch_size} on {self.world_size} device(s)"
        if self.sizes.steps:
            batch += f"; the first {self.sizes.steps:,} grow from {self.sizes.first} sequences"
        lines.add_row("[bold]steps[/bold]", f"{self.steps:,} of {batch}")
        lines.add_row(
            "[bold]tokens[/bold]",
            f"{self.tokens:,}: {self.tokens / self.parameters:.3g} per parameter, "
            f"{self.tokens / corpus_tokens:.3g} epochs",
        )
        lines.add_row(
            "[bold]FLOPs[/bold]",
            f"{self.flops:.3g} ({self.flops_per_token:.3g} a token, forward and backward)",
        )
        lines.add_row("[bold]memory[/bold]", memory_line(self.memory))
        return Group(lines)

    def check_disk(self, directory: Path, checkpoints: int) -> None:
        """Raise ValueError unless so many checkpoints fit."""
        needed = checkpoints * self.memory.states
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise ValueError(
                f"{directory} has {short(free, 'B')} of free disk, but {checkpoints} checkpoints take {short(needed, 'B')}: "
                "free some or choose another place with paths.runs=DIR"
            )


def memory_line(m: Memory) -> str:
    """The peak, and what it is made of."""
    return (
        f"about {short(m.total, 'B')} a device: weights {short(m.weights, 'B')}, gradients {short(m.gradients, 'B')}, "
        f"optimiser {short(m.optimizer, 'B')}, activations {short(m.activations, 'B')}, logits {short(m.logits, 'B')}"
        + (f", other {short(m.workspace, 'B')}" if m.workspace else "")
    )


# --- the tables of plan.py ---


@dataclass(frozen=True)
class Training:
    """So many tokens, under a name."""

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
    """The peak of one device under every engine, and with every block's activations computed twice; bold where it fits."""
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


def titled(title: str, about: str, *columns: str) -> Table:
    """An open table: its name and subject above, numbers to the right."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"[bold]{title}[/bold]  [dim]{about}[/dim]",
        title_justify="left",
        title_style="",
        header_style="dim",
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(min_width=27)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def first_sentence(documented: object) -> str:
    """Of a docstring, which by the rule of the house is the formula; the paper follows."""
    paragraph = (documented.__doc__ or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z]|arXiv:)", " ".join(paragraph.split()))[0].rstrip(".")


def bar(share: float, width: int = 16) -> str:
    """A horizontal bar in eighths of a character."""
    eighths = round(share * width * 8)
    return f"[cyan]{'█' * (eighths // 8)}{'▏▎▍▌▋▊▉'[eighths % 8 - 1] if eighths % 8 else ''}[/cyan]"


def short(number: float, unit: str = "") -> str:
    """Three digits and a prefix: 2.68 G."""
    for size, prefix in (
        (1e24, "Y"),
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {prefix}{unit}"
    return f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    for size, name in ((365.25 * 86400, "years"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} seconds"
