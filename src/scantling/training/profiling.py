"""Where the time of a step goes, by the parts of the model and of training: `profile=true`."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from scantling.model.decoder import Decoder
from scantling.report.terminal import titled
from scantling.training.callbacks import StepCallback, StepCallbacks

PART = "part: "
"""Marks the names of ranges that this module sets."""

OTHERS = {
    "Optimizer.": "optimiser",
    "c10d::": "communication",
    "FSDP::": "communication",
    "nccl:": "communication",
    "gloo:": "communication",
    "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad": "gradients, added up",
}
"""Ranges that PyTorch sets, by the beginning of their name."""

STEPS_BEFORE, PROFILED_STEPS = 5, 5
"""Steps that warm up, and those that are profiled."""
STEPS_OF_A_PROFILE = STEPS_BEFORE + PROFILED_STEPS


def check_profile(steps: int) -> None:
    """Raise ValueError for a run that has fewer steps than a profile takes."""
    if steps < STEPS_OF_A_PROFILE:
        raise ValueError(
            f"profile=true takes {STEPS_OF_A_PROFILE} steps, and this run has {steps}: raise the budget"
        )


class Profile(StepCallback):
    """Profiles `PROFILED_STEPS` steps: a trace for chrome://tracing or Perfetto, and a table, also printed.

    Stands last among the callbacks. Every process does the same work; the first one records it.
    """

    def __init__(
        self, directory: Path, console: Console, *, first_step: int, callbacks: StepCallbacks
    ) -> None:
        self.directory, self.console, self.callbacks = directory, console, callbacks
        self.begin, self.end = first_step + STEPS_BEFORE, first_step + STEPS_OF_A_PROFILE
        self.undo = ExitStack()

    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        if not trainer.is_global_zero:
            return
        if step == self.begin:
            label_parts(task, self.callbacks, self.undo)
            activities = [ProfilerActivity.CPU]
            if trainer.strategy.root_device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.profile = profile(activities=activities, acc_events=True)
            with without_stderr():
                self.profile.start()
        elif step == self.end:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize()
            with without_stderr():
                self.profile.stop()
            self.undo.close()
            self.write(trainer.strategy.root_device.type)

    def write(self, device: str) -> None:
        """Write `trace.json.gz` and `table.txt`, and print the table."""
        self.directory.mkdir(exist_ok=True)
        self.profile.export_chrome_trace(str(self.directory / "trace.json.gz"))
        table = profile_table(self.profile.events(), device)
        with (self.directory / "table.txt").open("w") as file:
            Console(file=file, width=100).print(table)
        self.console.print(table)
        self.console.print(f"[dim]trace      {self.directory / 'trace.json.gz'}, for ui.perfetto.dev[/dim]")


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what is written to file descriptor 2: Kineto writes there, whatever its level of logging."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# --- labels ---


def labelled(call: Callable, part: str) -> Callable:
    """`call`, within a range of the profile."""

    @functools.wraps(call)
    def within(*arguments: Any, **named: Any) -> Any:
        with record_function(PART + part):
            return call(*arguments, **named)

    return within


def label_parts(task: Any, callbacks: StepCallbacks, undo: ExitStack) -> None:
    """Let each part's calls be ranges of the profile, until `undo` is closed."""
    decoder: Decoder = task.decoder
    named = [
        (task, "training_step", "rest of the model"),
        (task, "configure_gradient_clipping", "clipping"),
        (task, "transfer_batch_to_device", "data"),
        (callbacks, "on_train_batch_start", "callbacks"),
        (callbacks, "on_train_batch_end", "callbacks"),
        (decoder.embed, "forward", "embedding"),
        (decoder.norm, "forward", "norm"),
        (decoder.head, "nats", "head, loss"),
    ]
    for block in decoder.blocks:
        named += [(block.attn, "forward", "attention"), (block.ffn, "forward", "feed-forward")]
        named += [(m, "forward", "norm") for name, m in block.named_children() if name.endswith("norm")]
    for owner, method, part in named:
        own = owner.__dict__.get(method)
        setattr(owner, method, labelled(getattr(owner, method), part))
        undo.callback(functools.partial(restore_method, owner, method, own))


def restore_method(owner: Any, method: str, own: Any) -> None:
    """Undo a label; `own`: what the object itself had by that name, None: its class has the method."""
    if own is None:
        delattr(owner, method)
    else:
        setattr(owner, method, own)


class LabelledBatches:
    """Batches whose making is a range of the profile."""

    def __init__(self, batches: Iterable) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator:
        batches = iter(self.batches)
        while True:
            with record_function(PART + "data"):
                batch = next(batches)
            yield batch


# --- the table ---


def time_by_part(events: Iterable[Any], device: str) -> dict[str, tuple[float, float]]:
    """Microseconds forward and backward, by part: the device's, or on a CPU those of the thread that trains.

    An event belongs to the range that it lies in. What autograd computes lies in none, but bears the number
    of the operation whose gradient it is.
    """
    events = sorted(events, key=lambda event: event.time_range.start)
    parts: dict[int, tuple[str, bool]] = {}
    forward: dict[tuple[int, int], str] = {}
    spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        parent = parts.get(id(event.cpu_parent), ("outside", False))
        part = next((name for mark, name in OTHERS.items() if event.name.startswith(mark)), None)
        if event.name.startswith(PART):
            parts[id(event)] = event.name.removeprefix(PART), parent[1]
        elif part is not None:
            parts[id(event)] = part, False
        elif event.name.startswith("autograd::engine::evaluate_function"):
            parts[id(event)] = forward.get(event.sequence_nr, "rest of the model"), True
        else:
            parts[id(event)] = parent
            if event.sequence_nr >= 0 and not parent[1]:
                forward.setdefault(event.sequence_nr, parent[0])
        name, backward = parts[id(event)]
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[name][backward] += own
    return {name: (ahead, back) for name, (ahead, back) in spent.items()}


def profile_table(events: Any, device: str) -> Table:
    """Milliseconds of a step, forward and backward, and shares of its length; the slowest part first."""
    spent = time_by_part(events, device)
    spent.pop("outside", None)
    begin = min(event.time_range.start for event in events)
    wall = (max(event.time_range.end for event in events) - begin) / PROFILED_STEPS
    what = "GPU time" if device == "cuda" else "time"
    about = f"{what} of a step, mean of {PROFILED_STEPS}: {wall / 1e3:.2f} ms"
    table = titled("Profile", about, "forward, ms", "backward, ms", "share")
    rows = sorted(spent.items(), key=lambda row: -sum(row[1]))
    rest = wall - sum(sum(pair) for _, pair in rows) / PROFILED_STEPS
    for name, (ahead, back) in rows:
        columns = [f"{t / PROFILED_STEPS / 1e3:.2f}" if t else "" for t in (ahead, back)]
        table.add_row(name, *columns, f"{(ahead + back) / PROFILED_STEPS / wall:.1%}")
    table.add_row("Lightning, and between parts", f"{rest / 1e3:.2f}", "", f"{rest / wall:.1%}")
    return table
