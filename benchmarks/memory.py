"""Peak memory of a training step at a large vocabulary: `python benchmarks/memory.py`, a minute.

Ours against transformers'.

Weights, AdamW's state, and every tensor that lives at once in a step, counted by PyTorch's own `MemTracker`
while the step runs on tensors without content: nothing is computed, so that a busy or a small machine gives
the same bytes. The model is the 10.6M shape with a vocabulary of 50,257, 4,096 tokens a step. The peer's loss
is its own (`labels=`), or from its logits (`cross_entropy`), whichever takes less.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
import transformers
from hydra import compose, initialize_config_dir
from peers import FAMILIES, Shape, hugging_face
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from scantling.config.decoder import build_decoder
from scantling.config.options import CONF
from scantling.training.optim import adamw

SHAPE = Shape("10.6M", n_layers=6, n_heads=6, d_model=384, seq_len=256, batch_size=16, vocab_size=50257)


def peak_bytes(
    build: Callable[[], nn.Module], loss_of: Callable[[nn.Module, Tensor], Tensor], half: bool
) -> int:
    """Of the second of two steps, when the optimiser's state is there."""
    with FakeTensorMode():
        model = build()
        optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        tokens = torch.zeros(SHAPE.batch_size, SHAPE.seq_len, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, tokens)
        with tracker:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = loss_of(model, tokens)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def main() -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}")
    table = Table(title="peak of a training step, GB, vocabulary of 50,257")
    for heading in ("parts", "precision", "ours", "HF, labels", "HF, logits", "ours / less of HF"):
        table.add_column(heading, justify="right")
    n_tokens = SHAPE.batch_size * SHAPE.seq_len
    for family, half in itertools.product(FAMILIES, (False, True)):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*FAMILIES[family], *SHAPE.overrides])
        peer = partial(hugging_face, family, SHAPE, "sdpa")
        ours = peak_bytes(
            partial(build_decoder, config, SHAPE.vocab_size, "cpu"),
            lambda model, t: model(t, targets_BT=t) / n_tokens,
            half,
        )
        peers = (
            peak_bytes(peer, lambda model, t: model(t, labels=t).loss, half),
            peak_bytes(peer, lambda model, t: cross_entropy(model(t).logits, t), half),
        )
        ratio = ours / min(peers)
        table.add_row(
            family,
            "bf16" if half else "fp32",
            *(f"{size / 1e9:.2f}" for size in (ours, *peers)),
            f"[{'green' if ratio <= 0.7 else 'red'}]{ratio:.2f}[/]",
        )
    console.print(table)


if __name__ == "__main__":
    main()
