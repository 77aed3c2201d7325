"""How fast a run trains: `python benchmarks/throughput.py`, about 25 minutes on two CPU cores, `--quick` six.

Every cell of the table is one shape, one family of parts and one precision. In it four to six contestants
train side by side in one process, in rounds (one after the other, again and again), so that whatever else the
machine does falls on all of them alike:

    ours        `fit` as `python src/train.py` calls it: Lightning, every callback, metrics.jsonl
    bare loop   our decoder in `bare_loop` below; ours against it is what Lightning and the callbacks cost
    HF sdpa     the model of the same shape from Hugging Face's transformers, as it comes, in the same loop
    HF eager    the same with `attn_implementation=eager`, faster in bfloat16 on processors without AMX
    plain       of GPT-2's parts: a GPT written out in plain PyTorch (`peers.PlainGPT`), in the same loop
    compiled    the same, with its loss, through torch.compile; the faster of the two counts

Same text, order of batches, optimiser (fused AdamW), schedule, clipping, autocast and threads. Tokens/s are
those of the fastest round, ratios the median over the rounds of peer's seconds / our seconds: above 1 we are
faster.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import lightning.pytorch as L
import torch
import transformers
from peers import FAMILIES, Enough, PlainGPT, Shape, bare_loop, configuration, fit_watched, hugging_face
from rich.console import Console
from rich.table import Table

from scantling.config.decoder import build_decoder
from scantling.model import hardware
from scantling.runs.directory import RunDirectory
from scantling.training.assembly import assemble
from scantling.training.callbacks import StepCallback

# nanoGPT's two settings for tiny Shakespeare, and one larger; a row of metrics falls on every tenth step.
VOCABULARY = 65
SHAPES = (
    Shape("0.8M", 4, 4, 128, 64, 12, VOCABULARY, steps=5, seconds=40),
    Shape("10.6M", 6, 6, 384, 256, 16, VOCABULARY, steps=1, seconds=100),
    Shape("39.3M", 8, 10, 640, 256, 8, VOCABULARY, steps=1, seconds=160),
)


class Rounds(StepCallback):
    """Stands last among the run's callbacks: clocks its steps, and between two segments lets the peers have a
    turn.

    A turn of several steps opens with some off the clock, in which weights and code come back to the caches.
    """

    def __init__(
        self, peers: Mapping[str, Iterator[object]], *, steps: int, seconds: float, clock: Callable[[], float]
    ):
        self.peers, self.steps, self.seconds, self.clock = peers, steps, seconds, clock
        self.warm = steps // 5
        self.rounds: list[dict[str, float]] = []
        """Seconds of each contestant in each round; the first is for warming up."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
    def better_plain(self) -> str | None:
        return min(("plain", "compiled"), key=self.ratio) if "plain" in self.rounds[0] else None

    @property
    def targets(self) -> dict[str, float]:
        """How many times as fast as each we want to be."""
        plain = {self.better_plain: 1.0 if self.precision == "fp32" else 1.2} if self.better_plain else {}
        return {"bare loop": 0.95, "HF sdpa": 1.3, "HF eager": 1.3, **plain}

    def tokens_per_second(self, name: str) -> float:
        """Of the fastest round."""
        tokens = self.shape.steps * self.shape.batch_size * self.shape.seq_len
        return tokens / min(seconds[name] for seconds in self.rounds)

    def ratio(self, name: str) -> float:
        """How many times as fast as `name` we are."""
        return statistics.median(seconds[name] / seconds["ours"] for seconds in self.rounds)


def measured(
    shape: Shape,
    family: str,
    precision: str,
    *,
    compiled: bool,
    seconds: float,
    clock: Callable[[], float],
    scratch: Path,
) -> Cell:
    trainer = "trainer=cpu", f"trainer.precision={precision}", f"trainer.compile={str(compiled).lower()}"
    config = configuration(shape, family, scratch, *trainer)
    directory = RunDirectory(scratch / f"{shape.name}-{family}-{precision}")
    directory.checkpoints.mkdir(parents=True)
    run = assemble(config, directory)
    ours = build_decoder(config, run.corpus.tokenizer.vocab_size, "cpu")
    ours.initialise(config.seed)
    if compiled:
        ours.compile()
    peers = {"bare loop": bare_loop(ours, ours, run)}
    for attention in ("sdpa", "eager"):
        model = hugging_face(family, shape, attention).train()
        peers[f"HF {attention}"] = bare_loop(model, lambda tokens, model=model: model(tokens).logits, run)
    if family == "gpt2":
        for name in ("plain", "compiled"):
            model = PlainGPT(shape)
            peers[name] = bare_loop(model, model, run, compiled=name == "compiled")
    rounds = Rounds(peers, steps=shape.steps, seconds=seconds, clock=clock)
    fit_watched(run, rounds)
    return Cell(shape, family, precision, run.plan.flops_per_token, rounds.rounds[1:])


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
        "plain",
        "compiled",
        "ours/bare",
        "ours/sdpa",
        "ours/eager",
        "ours/plain",
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
            *(
                f"{speed[name] / 1e3:.2f}" if name in speed else ""
                for name in ("bare loop", "HF sdpa", "HF eager", "plain", "compiled")
            ),
            *(coloured(cell.ratio(name), target) for name, target in cell.targets.items()),
            *([] if cell.better_plain else [""]),
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
    parser.add_argument(
        "--compile", action="store_true", help="ours and the bare loop with trainer.compile=true"
    )
    parser.add_argument("--plain-malloc", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--json", type=Path, help="write every round's seconds to this file")
    parser.add_argument(
        "--only", default="", help="cells whose name, like 10.6M-gpt2-bf16, has this pattern in it"
    )
    parser.add_argument("--seconds", type=float, help="to spend on each cell")
    parser.add_argument(
        "--cpu-time", action="store_true", help="for a busy machine: the CPU time of a single thread"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if arguments.cpu_time:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if not arguments.plain_malloc:
        hardware.keep_freed_memory()
    cpu = torch.device("cpu")
    about = {
        "device": hardware.describe(cpu),
        "torch": torch.__version__,
        "lightning": version("lightning"),
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
                    if not re.search(arguments.only, name) or (arguments.quick and family != "gpt2"):
                        continue
                    peak, _ = hardware.peak_flops(cpu, precision == "bf16")
                    peaks[precision] = max(peaks[precision], peak)
                    cell = measured(
                        shape,
                        family,
                        precision,
                        compiled=arguments.compile,
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
                        f"{name}: " + ", ".join(f"{cell.ratio(peer):.3f} × {peer}" for peer in cell.targets)
                    )
    console.print(table_of(cells, peaks))
    for precision, peak in peaks.items():
        console.print(
            f"peak {precision}  {peak / 1e9:,.0f} GFLOP/s, 2048³ matrix product measured in this run"
        )


if __name__ == "__main__":
    main()
