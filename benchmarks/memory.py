"""Peak memory of a training step at a large vocabulary, ours against transformers: `python benchmarks/memory.py`, minutes.

Weights, AdamW's state, and every allocation that PyTorch makes in one step, counted by its profiler: exact to the byte, and
the same on a busy machine. The model is the 10.6M shape with a vocabulary of 50,257. The peer's loss is its own
(`labels=`), or from its logits (`cross_entropy`), whichever takes less. Seconds are of the fastest of the steps.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from hydra import compose, initialize_config_dir
from peers import FAMILIES, Shape, hugging_face
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from scantling.command_line import CONF
from scantling.composition import build_decoder
from scantling.training import hardware
from scantling.training.optim import adamw

SHAPE = Shape("10.6M", n_layers=6, n_heads=6, d_model=384, seq_len=256, batch_size=16, vocab_size=50257)


def measured(model: nn.Module, loss_of: Callable[[Tensor], Tensor], half: bool, steps: int):
    """Peak bytes of a step, seconds of the fastest."""
    optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokens = torch.randint(SHAPE.vocab_size, (SHAPE.batch_size, SHAPE.seq_len))

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = loss_of(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    events.sort(key=lambda event: event.start_ns())
    states = (value for state in optimizer.state.values() for value in state.values())
    standing = sum(t.nbytes for t in itertools.chain(model.parameters(), states))
    peak = standing + max(itertools.accumulate(event.nbytes() for event in events))
    return peak, min(step() for _ in range(steps))


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="to clock, of each")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    hardware.keep_freed_memory()
    console.print(f"{hardware.describe(torch.device('cpu'))}, PyTorch {torch.__version__}")
    table = Table(title="peak of a training step, GB, vocabulary of 50,257")
    for heading in (
        "parts",
        "precision",
        "ours",
        "HF, labels",
        "HF, logits",
        "ours / less of HF",
        "s",
        "HF s",
    ):
        table.add_column(heading, justify="right")
    for family, half in itertools.product(FAMILIES, (False, True)):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*FAMILIES[family], *SHAPE.overrides])
        ours = build_decoder(config, SHAPE.vocab_size, "cpu")
        ours.initialise(0)
        n_tokens = SHAPE.batch_size * SHAPE.seq_len
        peak, seconds = measured(ours, lambda t: ours(t, targets_BT=t) / n_tokens, half, arguments.steps)  # noqa: B023
        peer = hugging_face(family, SHAPE, "sdpa").train()
        peers = [
            measured(peer, loss_of, half, arguments.steps)
            for loss_of in (
                lambda t: peer(t, labels=t).loss,  # noqa: B023
                lambda t: cross_entropy(peer(t).logits, t),  # noqa: B023
            )
        ]
        less = min(bytes_ for bytes_, _ in peers)
        console.print(f"{family}: {peak / less:.2f} of {less / 1e9:.2f} GB", style="dim")
        table.add_row(
            family,
            "bf16" if half else "fp32",
            f"{peak / 1e9:.2f}",
            *(f"{bytes_ / 1e9:.2f}" for bytes_, _ in peers),
            f"[{'green' if peak <= 0.7 * less else 'red'}]{peak / less:.2f}[/]",
            f"{seconds:.2f}",
            f"{min(s for _, s in peers):.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
