"""What happens around a training step: metrics, samples, the progress bar, a clean stop."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scantling.report.numbers import short
from scantling.runs.directory import MetricsFile
from scantling.training.checkpoints import Checkpoints
from scantling.training.guard import BadStep, Guard
from scantling.training.loggers import Wandb
from scantling.training.ranks import AnyRank
from scantling.training.step import is_step_over
from scantling.training.task import LanguageModelTask


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGUSR1, raised between two steps, after a checkpoint was written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")


class StepCallback(Callback):
    """A callback told of optimiser steps, whatever the number of micro-batches in each."""

    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        """After step `step`, the first being 1."""


def call_each(hook: str) -> Any:
    """The method that calls `hook` of each callback."""

    def call(self: StepCallbacks, *arguments: Any, **named: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(*arguments, **named)

    return call


class StepCallbacks(Callback):
    """A run's callbacks, in order, as one to Lightning.

    Lightning goes through six hooks of each of its callbacks at every micro-batch, some 10 µs each.
    """

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_step_over(trainer):
            step = trainer.global_step
            for callback in self.callbacks:
                if isinstance(callback, StepCallback):
                    callback.on_step(trainer, pl_module, step)

    setup = call_each("setup")
    on_train_start = call_each("on_train_start")
    on_train_batch_start = call_each("on_train_batch_start")
    on_validation_start = call_each("on_validation_start")
    on_validation_end = call_each("on_validation_end")
    on_train_end = call_each("on_train_end")
    on_fit_end = call_each("on_fit_end")
    on_exception = call_each("on_exception")
    teardown = call_each("teardown")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"] |= {callback.state_key: callback.state_dict() for callback in self.callbacks}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        recount_micro_batches(checkpoint, trainer.accumulate_grad_batches)
        for callback in self.callbacks:
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])


def recount_micro_batches(checkpoint: dict[str, Any], micro_batches: int) -> None:
    """Make Lightning's counts of micro-batches those of `micro_batches` a step.

    Lightning counts steps and validations by micro-batches, and a run that goes on with more
    processes has fewer of them a step.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        more = checkpoint["global_step"] * micro_batches - counts["processed"]
        for stage in ("ready", "started", "processed", "completed"):
            counts[stage] += more


class Metrics(StepCallback):
    """Writes a row every `log_every` steps and at every validation, to `metrics.jsonl` and to the loggers.

    `row` is the latest one; other callbacks show it. Between rows nothing is read from the device. At every
    row the guard judges the steps since the last, before a checkpoint can be written.
    """

    def __init__(
        self,
        file: MetricsFile | None,
        guard: Guard,
        *,
        log_every: int,
        val_every: int,
        total_steps: int,
        tokens_before: Callable[[int], int],
        flops_per_token: float,
        peak_flops: float,
        columns: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """`columns` gives more columns of a row. Units: steps, tokens, FLOPs and FLOPs a second."""
        self.columns = columns
        self.file, self.guard = file, guard
        self.log_every, self.val_every, self.total_steps = log_every, val_every, total_steps
        self.tokens_before, self.flops_per_token = tokens_before, flops_per_token
        self.peak_flops = peak_flops
        self.row: dict[str, Any] = {}
        self.training_seconds = 0.0
        self.clock: float | None = None
        """When training last went on: at its start, after a row, after a validation and what came with it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.clock_step = trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.clock is None:
            self.clock = time.perf_counter()

    def on_step(self, trainer: L.Trainer, task: LanguageModelTask, step: int) -> None:
        loss, state = task.take_step_loss(), task.step_state
        self.guard.note_step(step, loss, state.grad_norm)
        validates = self.validates(step)
        if step == self.total_steps:
            trainer.should_stop = True  # Lightning then validates once more, wherever the interval stands
        if step % self.log_every and not validates and step != 1:
            return
        assert self.clock is not None
        loss = loss.item()
        now = time.perf_counter()
        self.training_seconds += now - self.clock
        tokens = self.tokens_before(step)
        speed = (tokens - self.tokens_before(self.clock_step)) / (now - self.clock)
        self.row = {
            "step": step,
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "seconds": round(self.training_seconds, 3),
            "train/loss": loss,
            "lr": state.lr,
            "grad_norm": state.grad_norm.item(),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self.flops_per_token / trainer.world_size / self.peak_flops, 4),
            **self.columns(),
        }
        self.clock, self.clock_step = None if validates else now, step
        try:
            self.guard.judge_steps()
        except BadStep:
            self.write(trainer)
            raise
        if not validates:
            self.write(trainer)

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step."""
        return step % self.val_every == 0 or step == self.total_steps

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not self.row:
            return
        for name, value in pl_module.text_loss.results().items():
            self.row[f"val/{name}"] = value
        self.write(trainer)

    def write(self, trainer: L.Trainer) -> None:
        """Write `row` to the file, in the first process, and to the loggers."""
        if self.file is not None:
            self.file.write(self.row)
            for logger in trainer.loggers:
                logger.log_metrics(self.row, step=self.row["step"])

    def state_dict(self) -> dict[str, Any]:
        return {"training_seconds": self.training_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.training_seconds = state_dict["training_seconds"]


class CleanStop(StepCallback):
    """Ctrl-C, SIGTERM or SIGUSR1 ends the run after the step under way, with a checkpoint.

    A second Ctrl-C ends it at once. Schedulers announce a preemption with SIGTERM or SIGUSR1. A checkpoint
    is due every `every_minutes` too. A validated step gets its checkpoint after the validation, or a
    resumed run would leave that out.
    """

    def __init__(self, checkpoints: Checkpoints, metrics: Metrics, *, every_minutes: float | None) -> None:
        self.checkpoints, self.metrics = checkpoints, metrics
        self.seconds = float("inf") if every_minutes is None else 60 * every_minutes
        self.is_asked = False
        self.handlers_before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Not in `setup`, after which Lightning sets handlers that talk to other processes at any moment.
        self.anyone = AnyRank(trainer.world_size)
        which = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self.handlers_before = {s: signal.signal(s, self.ask_to_stop) for s in which}
        self.saved_at = time.monotonic()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        for which, handler in self.handlers_before.items():
            signal.signal(which, handler)

    def ask_to_stop(self, which: int, *_: Any) -> None:
        """The handler of the signals; raises KeyboardInterrupt at the second Ctrl-C."""
        if self.is_asked and which == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_asked = True

    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        if self.metrics.validates(step):
            return
        due = time.monotonic() - self.saved_at >= self.seconds
        if self.anyone(self.is_asked or due):
            self.metrics.guard.judge_steps()
            self.checkpoints.save(trainer)
            self.go_on_or_stop(step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.global_step < self.metrics.total_steps:
            self.go_on_or_stop(trainer.global_step)

    def go_on_or_stop(self, step: int) -> None:
        """Raise Interrupted if the run was asked to stop; called after a checkpoint."""
        self.saved_at = time.monotonic()
        if self.anyone(self.is_asked):
            self.checkpoints.files.wait()
            raise Interrupted(step)


class Samples(Callback):
    """A continuation of one prompt at every validation, to `samples.jsonl` and W&B.

    `sample` is called in every process and gives the text in one.
    """

    def __init__(self, path: Path, *, sample: Callable[[], str | None]) -> None:
        self.path, self.sample = path, sample

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        text = self.sample()
        if text is None:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": trainer.global_step, "text": text}) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, Wandb):
                logger.log_sample(text, trainer.global_step)


class ProgressBar(StepCallback):
    """On a terminal a bar with loss, speed and time left; everywhere a line at every validation."""

    def __init__(self, console: Console, metrics: Metrics) -> None:
        self.metrics = metrics
        self.console = console
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            auto_refresh=False,  # a thread that draws would hold up those that compute
        )
        self.drawn_at = 0.0
        self.validation = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        total = self.metrics.total_steps
        self.job = self.bar.add_task("", total=total, completed=trainer.global_step, numbers="")
        self.bar.start()

    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        if self.metrics.validates(step) or time.perf_counter() - self.drawn_at > 1:
            self.draw(step)

    def draw(self, step: int) -> None:
        """Redraw the bar with the numbers of the latest row, once there is one."""
        if row := self.metrics.row:
            self.drawn_at = time.perf_counter()
            numbers = f"loss {row['train/loss']:.3f}{self.validation}  {row['tokens_per_second']:,.0f} tok/s"
            self.bar.update(self.job, completed=step, numbers=numbers, refresh=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        row = self.metrics.row
        if trainer.sanity_checking or not row:
            return
        self.validation = f"  val {row['val/bpb']:.3f} bpb"
        self.console.print(
            f"step {row['step']:>6,}  {short(row['tokens']).rstrip()} tokens  {row['seconds']:.0f} s  "
            f"train {row['train/loss']:.3f}  val {row['val/loss']:.3f}  "
            f"[bold]{row['val/bpb']:.4f} bits/byte[/bold]  {row['tokens_per_second']:,.0f} tok/s",
            highlight=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.draw(trainer.global_step)
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.bar.stop()
