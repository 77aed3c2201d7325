"""How fast a run trains: `python benchmarks/throughput.py`, about 10 minutes on two CPU cores, `--quick` two.

Every cell of the table is one shape, one family of parts and one precision. In it four contestants train side by
side in one process, in rounds (one after the other, again and again), so that whatever else the machine does falls
on all of them alike:

    ours        scantling.run.fit as `python src/train.py` calls it: Lightning, every callback, metrics.jsonl
    bare loop   our decoder in `bare_loop` below; ours against it is what Lightning and the callbacks cost
    HF sdpa     the model of the same shape from Hugging Face's transformers, in the same loop
    HF eager    the same with its own attention; the faster of the two is the better peer

Same text, order of batches, optimiser (fused AdamW), schedule, clipping, autocast and threads. Tokens/s are those of
the fastest round, ratios the median over the rounds of peer's seconds / our seconds: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import lightning.pytorch as L
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from scantling import run as scantling_run
from scantling.command_line import CONF
from scantling.run import Run, assemble, build_decoder, training_batches
from scantling.run_directory import RunDirectory
from scantling.training import hardware
from scantling.training.callbacks import StepCallback, StepCallbacks

VOCABULARY = 65  # as tiny Shakespeare's


@dataclass(frozen=True)
class Shape:
    name: str
    n_layers: int
    n_heads: int
    d_model: int
    seq_len: int
    batch_size: int
    steps: int
    """Optimiser steps of one contestant in one round."""
    seconds: float
    """Time for a cell."""

    @property
    def overrides(self) -> list[str]:
        return [
            f"model.n_layers={self.n_layers}",
            f"model.n_heads={self.n_heads}",
            f"model.d_model={self.d_model}",
            f"model.d_ff={4 * self.d_model}",
            f"model.seq_len={self.seq_len}",
            f"batch_size={self.batch_size}",
        ]


# nanoGPT's two settings for tiny Shakespeare; a row of metrics falls on every tenth step.
SHAPES = (
    Shape("0.8M", 4, 4, 128, 64, 12, steps=5, seconds=40),
    Shape("10.6M", 6, 6, 384, 256, 16, steps=1, seconds=100),
)

FAMILIES = {
    "gpt2": ["model=gpt2_tiny", "model.bias=false", "ffn=gelu"],  # nanoGPT's parts
    "llama": ["model=llama_tiny", "optim=adamw"],
}


def hugging_face(family: str, shape: Shape, attention: str) -> nn.Module:
    """The peer's model of the same shape. GPT-2's has biases, which it cannot leave out: 0.3 % of its parameters."""
    common = {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": attention,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            n_positions=shape.seq_len,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        hidden_size=shape.d_model,
        intermediate_size=round(8 * shape.d_model / 3 / 8) * 8,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=1e-5,
        **common,
    )
    return transformers.LlamaForCausalLM(config)


def bare_loop(model: nn.Module, logits_of: Callable[[Tensor], Tensor], run: Run) -> Iterator[None]:
    """Training as one would write it by hand; each `next` is one optimiser step."""
    optimizer = instantiate(run.config.optim)(model.named_parameters())
    factor = instantiate(run.config.schedule)
    # Past the partial that Hydra makes, whose every call costs a check.
    schedule = LambdaLR(optimizer, lambda step: factor.func(step, run.plan.steps, **factor.keywords))
    for batch in training_batches(run, rank=0):
        with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bf16"):
            logits_BTV = logits_of(batch["inputs"])
            loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield


class Enough(Exception):
    """The last round is over."""


class Rounds(StepCallback):
    """Stands last among the run's callbacks: clocks its steps, and between two segments lets the peers have a turn.

    A turn of several steps opens with some off the clock, in which weights and code come back to the caches.
    """

    def __init__(
        self, peers: dict[str, Iterator[None]], *, steps: int, seconds: float, clock: Callable[[], float]
    ):
        self.peers, self.steps, self.seconds, self.clock = peers, steps, seconds, clock
        self.warm = steps // 5
        self.rounds: list[dict[str, float]] = []
        """Seconds of each contestant in each round; the first is for warming up."""

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.begun, self.start = time.perf_counter(), self.clock()

    def on_step(self, trainer: L.Trainer, task: L.LightningModule, step: int) -> None:
        taken = step % (self.warm + self.steps)
        if taken:
            if taken == self.warm:
                self.start = self.clock()
            return
        seconds = {"ours": self.clock() - self.start}
        for name, loop in self.peers.items():
            for _ in range(self.warm):
                next(loop)
            start = self.clock()
            for _ in range(self.steps):
                next(loop)
            seconds[name] = self.clock() - start
        self.rounds.append(seconds)
        if time.perf_counter() - self.begun > self.seconds and len(self.rounds) > 2:
            raise Enough
        self.start = self.clock()


@dataclass
class Cell:
    """What one cell of the table was measured to be."""

    shape: Shape
    family: str
    precision: str
    flops_per_token: float
    rounds: list[dict[str, float]]

    @property
    def better_peer(self) -> str:
        return max(("HF sdpa", "HF eager"), key=lambda name: -self.median_seconds(name))

    def median_seconds(self, name: str) -> float:
        return statistics.median(seconds[name] for seconds in self.rounds)

    def tokens_per_second(self, name: str) -> float:
        """Of the fastest round."""
        tokens = self.shape.steps * self.shape.batch_size * self.shape.seq_len
        return tokens / min(seconds[name] for seconds in self.rounds)

    def ratio(self, name: str) -> float:
        """How many times as fast as `name` we are."""
        return statistics.median(seconds[name] / seconds["ours"] for seconds in self.rounds)


def measured(
    shape: Shape, family: str, precision: str, *, seconds: float, clock: Callable[[], float], scratch: Path
) -> Cell:
    config = configuration(shape, family, precision, scratch)
    directory = RunDirectory(scratch / f"{shape.name}-{family}-{precision}")
    directory.checkpoints.mkdir(parents=True)
    run = assemble(config, directory)
    ours = build_decoder(config, run.corpus.tokenizer.vocab_size, "cpu")
    ours.initialise(config.seed)
    peers = {"bare loop": bare_loop(ours, ours, run)}
    for attention in ("sdpa", "eager"):
        model = hugging_face(family, shape, attention).train()
        peers[f"HF {attention}"] = bare_loop(model, lambda tokens, model=model: model(tokens).logits, run)
    rounds = Rounds(peers, steps=shape.steps, seconds=seconds, clock=clock)

    class Trainer(L.Trainer):
        def __init__(self, *, callbacks: StepCallbacks, **settings):
            callbacks.callbacks.append(rounds)
            super().__init__(callbacks=callbacks, **settings)

    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(patch.object(scantling_run.L, "Trainer", Trainer))
        stack.enter_context(contextlib.suppress(Enough))
        scantling_run.fit(run, Console(file=nowhere, force_terminal=True))
    return Cell(shape, family, precision, run.plan.flops_per_token, rounds.rounds[1:])


def configuration(shape: Shape, family: str, precision: str, scratch: Path) -> DictConfig:
    text = scratch / "text.txt"
    if not text.exists():
        characters = [chr(code) for code in range(ord("0"), ord("0") + VOCABULARY - 2)]
        text.write_text("".join(random.Random(0).choices(characters, k=1_000_000)))
    overrides = [
        *FAMILIES[family],
        *shape.overrides,
        "data=text",
        f"data.files={text}",
        "tokenizer=char",
        "trainer=cpu",
        f"trainer.precision={precision}",
        "budget=steps",
        "budget.steps=1000000",
        "logger=none",
        f"paths.cache={scratch / 'cache'}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=overrides)


def table_of(cells: list[Cell], peaks: dict[str, float]) -> Table:
    table = Table(
        title="training throughput, thousand tokens/s (fastest round) and ratios (median of rounds)"
    )
    for heading in ("shape", "parts", "precision"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "ours",
        "of peak",
        "bare loop",
        "HF sdpa",
        "HF eager",
        "ours/bare",
        "ours/peer",
        "rounds",
    ):
        table.add_column(heading, justify="right")
    for cell in cells:
        speed = {name: cell.tokens_per_second(name) for name in cell.rounds[0]}
        table.add_row(
            cell.shape.name,
            cell.family,
            cell.precision,
            f"{speed['ours'] / 1e3:.2f}",
            f"{speed['ours'] * cell.flops_per_token / peaks[cell.precision]:.0%}",
            *(f"{speed[name] / 1e3:.2f}" for name in ("bare loop", "HF sdpa", "HF eager")),
            coloured(cell.ratio("bare loop"), target=0.95),
            coloured(cell.ratio(cell.better_peer), target=1.0),
            str(len(cell.rounds)),
        )
    return table


def coloured(ratio: float, target: float) -> str:
    return f"[{'green' if ratio >= target else 'red'}]{ratio:.3f}[/]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="GPT-2's parts only, few rounds: about two minutes"
    )
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--json", type=Path, help="write every round's seconds to this file")
    parser.add_argument("--only", default="", help="cells whose name, like 10.6M-gpt2-bf16, has this in it")
    parser.add_argument("--seconds", type=float, help="to spend on each cell")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: the CPU time of a single thread"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if not arguments.plain_malloc:
        hardware.keep_freed_memory()
    cpu = torch.device("cpu")
    about = {
        "device": hardware.describe(cpu),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "transformers": transformers.__version__,
        "clock": "CPU time of the process" if arguments.cpu_time else "wall",
        "malloc": "as it is"
        if arguments.plain_malloc
        else "keeps freed memory, for every contestant (--plain-malloc: for none)",
    }
    for name, value in about.items():
        console.print(f"{name:13}{value}")
    peaks: dict[str, float] = {"fp32": 0.0, "bf16": 0.0}
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in SHAPES:
            for family in FAMILIES:
                for precision in peaks:
                    name = f"{shape.name}-{family}-{precision}"
                    if arguments.only not in name or (arguments.quick and family != "gpt2"):
                        continue
                    peak, _ = hardware.peak_flops(cpu, precision == "bf16")
                    peaks[precision] = max(peaks[precision], peak)
                    cell = measured(
                        shape,
                        family,
                        precision,
                        seconds=arguments.seconds or shape.seconds / (4 if arguments.quick else 1),
                        clock=clock,
                        scratch=Path(scratch),
                    )
                    cells.append(cell)
                    if arguments.json:
                        result = {
                            "about": about,
                            "peak_flops": peaks,
                            "cells": [asdict(cell) for cell in cells],
                        }
                        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
                    console.print(
                        f"{name}: {cell.ratio('bare loop'):.3f} × the bare loop, "
                        f"{cell.ratio(cell.better_peer):.3f} × {cell.better_peer}"
                    )
    console.print(table_of(cells, peaks))
    for precision, peak in peaks.items():
        console.print(
            f"peak {precision}  {peak / 1e9:,.0f} GFLOP/s, 2048³ matrix product measured in this run"
        )


if __name__ == "__main__":
    main()
