"""How fast a run trains on a GPU: `python benchmarks/gpu.py`, about 17 minutes on one H200.

`--device cpu --tiny` tries it out.

GPT-2 124M at context 1024 and Llama's parts at 1.3 B and context 2048, in bfloat16 by autocast. Each
contestant trains alone, from the same weights on the same batches, and is clocked after it has warmed up:

    ours          `fit` as `python src/train.py` calls it: Lightning, every callback, metrics.jsonl
    HF            the model of the same shape from Hugging Face's transformers, sdpa, in `peers.bare_loop`
    plain         of GPT-2's parts: a GPT written out in plain PyTorch (`peers.PlainGPT`), in the same loop

each as it is and, with its loss, through torch.compile; with torchao installed, ours with
`trainer.precision=fp8` too, compiled. MFU counts matrix products alone, attention over the keys that
causality leaves (`accounting.exact`), against the data sheet of bfloat16, and against a product of 8192-cubes
measured here. `loss` is that of the last step clocked: contestants that train the same model agree in it but
for rounding.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as L
import torch
import transformers
from peers import Enough, PlainGPT, Shape, bare_loop, configuration, fit_watched, hugging_face, take_weights
from rich.console import Console
from rich.table import Table
from torch import nn

from scantling.config.decoder import build_decoder
from scantling.model import hardware
from scantling.model.linear import linear
from scantling.runs.directory import RunDirectory
from scantling.training.assembly import Run, assemble
from scantling.training.callbacks import StepCallback

SHAPES = {
    "gpt2": Shape("124M", 12, 12, 768, 1024, 32, vocab_size=50304),  # 50257 in whole tiles, as nanoGPT has it
    "llama": Shape("1.3B", 24, 32, 2048, 2048, 8, vocab_size=32000, multiple_of=128),
}
TINY = Shape("tiny", 2, 2, 64, 64, 2, vocab_size=500, multiple_of=16)
WARM_UP = 10
"""Steps before the clock runs; the compiler works in the first."""


@dataclass
class Measured:
    seconds: float
    loss: float
    memory: int


class Clock(StepCallback):
    """Stands last among the run's callbacks, and ends the run when its steps are over."""

    def __init__(self, steps: int, device: torch.device):
        self.steps, self.device = steps, device

    def on_step(self, trainer: L.Trainer, task: L.LightningModule, step: int) -> None:
        if step == WARM_UP:
            self.start = now(self.device)
        elif step == WARM_UP + self.steps:
            self.seconds = now(self.device) - self.start
            raise Enough


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fresh(device: torch.device) -> None:
    """Nothing of the contestant before stays."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def ours(run: Run, steps: int) -> Measured:
    fresh(run.device)
    clock = Clock(steps, run.device)
    fit_watched(run, clock)
    row = run.directory.metrics()[-1]
    assert row["step"] == WARM_UP + steps
    return Measured(clock.seconds, row["train/loss"], peak_memory(run.device))


def theirs(model: nn.Module, compiled: bool, run: Run, steps: int) -> Measured:
    model = model.to(run.device).train()
    hf = not isinstance(model, PlainGPT)
    loop = bare_loop(
        model, lambda tokens: model(tokens).logits if hf else model(tokens), run, compiled=compiled
    )
    for _ in range(WARM_UP):
        next(loop)
    start = now(run.device)
    for _ in range(steps - 1):
        next(loop)
    loss = next(loop)
    return Measured(now(run.device) - start, loss.item(), peak_memory(run.device))


def run_of(
    shape: Shape, family: str, precision: str, compiled: bool, device: str, steps: int, scratch: Path
) -> Run:
    overrides = [
        f"trainer={'gpu' if device == 'cuda' else 'cpu'}",
        f"trainer.precision={precision}",
        f"trainer.compile={str(compiled).lower()}",
        f"log_every={WARM_UP + steps}",  # rows at the first and the last step alone
    ]
    if device == "cuda":
        overrides.append("trainer.devices=1")
    config = configuration(shape, family, scratch, *overrides)
    directory = RunDirectory(scratch / f"{family}-{precision}-{compiled}")
    directory.checkpoints.mkdir(parents=True)
    return assemble(config, directory)


def contestants(shape: Shape, family: str, device: str, steps: int, scratch: Path):
    """(name, run, measured) of each, one after the other."""
    if find_spec("torchao"):
        run = run_of(shape, family, "fp8", True, device, steps, scratch)
        yield "fp8, compiled", run, ours(run, steps)
    for compiled in (False, True):
        suffix = ", compiled" if compiled else ""
        run = run_of(shape, family, "bf16", compiled, device, steps, scratch)
        yield f"ours{suffix}", run, ours(run, steps)
        start = build_decoder(run.config, shape.vocab_size, "cpu")
        start.initialise(run.config.seed)
        weights = {name: p.detach() for name, p in start.named_parameters()}
        for name in ("HF", *(["plain"] if family == "gpt2" else [])):
            fresh(run.device)
            peer = PlainGPT(shape) if name == "plain" else hugging_face(family, shape, "sdpa")
            take_weights(peer, weights)
            yield f"{name}{suffix}", run, theirs(peer, compiled, run, steps)
            del peer


def ceiling(device: torch.device) -> float:
    """FLOP/s of a product of 8192-cubes in bfloat16, of 1024-cubes on a CPU."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)  # ones would leave the GPU cooler, and faster
    best = float("inf")
    for _ in range(10):
        start = now(device)
        linear(a, a)
        best = min(best, now(device) - start)
    return 2 * n**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of two layers: to try the script out")
    parser.add_argument("--steps", type=int, default=50, help="to clock")
    parser.add_argument("--only", choices=tuple(SHAPES), help="one of the two shapes")
    parser.add_argument("--batch", type=int, help="sequences a step, where the shape's do not fit")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here: --device cpu --tiny tries the script out")
    device = torch.device(arguments.device)
    hardware.keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    measured_peak, (sheet, source) = ceiling(device), hardware.peak_flops(device, True)
    console.print(
        f"{hardware.describe(device)}, PyTorch {torch.__version__}, transformers {transformers.__version__}"
    )
    console.print(f"peak {sheet / 1e12:,.1f} TFLOP/s, {source}; measured {measured_peak / 1e12:,.1f}")
    table = Table(title=f"training in bfloat16, {arguments.steps} steps after {WARM_UP}")
    for heading in ("shape", "contestant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("tokens/s", "MFU", "of measured", "memory, GB", "loss", "ours / it"):
        table.add_column(heading, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        for family, full in SHAPES.items():
            if arguments.only not in (None, family):
                continue
            shape = TINY if arguments.tiny else full
            shape = replace(shape, batch_size=arguments.batch or shape.batch_size)
            rows = []
            for name, run, measured in contestants(
                shape, family, arguments.device, arguments.steps, Path(scratch)
            ):
                speed = arguments.steps * shape.batch_size * shape.seq_len / measured.seconds
                rows.append((name, run, measured, speed))
                console.print(f"{family} {shape.name} {name}: {speed:,.0f} tokens/s", style="dim")
            best = max(speed for name, *_, speed in rows if name.startswith("ours"))
            for name, run, measured, speed in rows:
                flops = speed * run.plan.flops_per_token
                table.add_row(
                    f"{family} {shape.name}",
                    name,
                    f"{speed:,.0f}",
                    f"{flops / sheet:.1%}",
                    f"{flops / measured_peak:.1%}",
                    f"{measured.memory / 1e9:.1f}" if measured.memory else "",
                    f"{measured.loss:.4f}",
                    f"{best / speed:.3f}",
                )
            table.add_section()
    console.print(table)


if __name__ == "__main__":
    main()
