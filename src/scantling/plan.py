"""What a run will do and take, known before its first step."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table

from scantling.accounting import Memory, exact, non_embedding, training_memory
from scantling.model.decoder import Decoder


@dataclass(frozen=True)
class Plan:
    """Counts of one run; `flops_per_token` is training's, forward and backward, by the `exact` convention."""

    counts: dict[str, int]
    steps: int
    seq_len: int
    batch_size: int
    micro_batch_size: int
    world_size: int
    flops_per_token: float
    memory: Memory

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        *,
        counts: dict[str, int],
        steps: int,
        batch_size: int,
        micro_batch_size: int,
        world_size: int,
        half_precision: bool,
    ) -> Plan:
        return cls(
            counts=counts,
            steps=steps,
            seq_len=decoder.seq_len,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
            flops_per_token=exact(decoder, decoder.seq_len),
            memory=training_memory(
                decoder,
                sequences=micro_batch_size,
                seq_len=decoder.seq_len,
                half_precision=half_precision,
            ),
        )

    @property
    def parameters(self) -> int:
        return sum(self.counts.values())

    @property
    def micro_batches(self) -> int:
        """Forward passes per optimiser step on each device."""
        return self.batch_size // (self.micro_batch_size * self.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

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
        batch = f"{self.batch_size} sequences × {self.seq_len} tokens"
        if self.micro_batches > 1 or self.world_size > 1:
            batch += f", as {self.micro_batches} × {self.micro_batch_size} on {self.world_size} device(s)"
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
        m = self.memory
        lines.add_row(
            "[bold]memory[/bold]",
            f"about {gigabytes(m.total)} a device: weights {gigabytes(m.weights)}, gradients {gigabytes(m.gradients)}, "
            f"optimiser {gigabytes(m.optimizer)}, activations {gigabytes(m.activations)}",
        )
        return Group(lines)

    def check_disk(self, directory: Path) -> None:
        """Raise ValueError unless the last, the best and the next checkpoint fit."""
        needed = 3 * (self.memory.weights + self.memory.optimizer)
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise ValueError(
                f"{directory} has {gigabytes(free)} of free disk, but three checkpoints take {gigabytes(needed)}: "
                "free some or choose another place with paths.runs=DIR"
            )


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
