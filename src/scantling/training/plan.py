"""What a run will do and take, known before its first step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from scantling.data.loading import BatchSizes
from scantling.model.accounting import exact, non_embedding
from scantling.model.decoder import Decoder
from scantling.report.numbers import short
from scantling.training.memory import Memory


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
    """Memory of one device at its peak."""

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
        """The plan of a decoder for these counts."""
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
        """N, all parameters."""
        return sum(self.counts.values())

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimiser step on each device."""
        return self.sizes.full // (self.micro_batch_size * self.world_size)

    def tokens_before(self, step: int) -> int:
        """Tokens of the first `step` steps."""
        return self.sizes.before(step) * self.seq_len

    @property
    def tokens(self) -> int:
        """D, the tokens of all steps."""
        return self.tokens_before(self.steps)

    @property
    def flops(self) -> float:
        """C, training FLOPs of all steps."""
        return self.tokens * self.flops_per_token

    def table(self, about: dict[str, str], corpus_tokens: int) -> Group:
        """The plan for the terminal; `about` are lines that describe model, data and device."""
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
        """Raise ValueError unless this many checkpoints fit on the disk of `directory`."""
        needed = checkpoints * self.memory.states
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise ValueError(
                f"{directory} has {short(free, 'B')} of free disk, but {checkpoints} checkpoints take "
                f"{short(needed, 'B')}: free some or choose another place with paths.runs=DIR"
            )


def memory_line(m: Memory) -> str:
    """The peak, and what it is made of."""
    return (
        f"about {short(m.total, 'B')} a device: weights {short(m.weights, 'B')}, "
        f"gradients {short(m.gradients, 'B')}, optimiser {short(m.optimizer, 'B')}, "
        f"activations {short(m.activations, 'B')}, logits {short(m.logits, 'B')}"
        + (f", other {short(m.workspace, 'B')}" if m.workspace else "")
    )
