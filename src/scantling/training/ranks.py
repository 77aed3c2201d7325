"""The processes of one run: all end when one dies, its reason is printed, and a flag of one reaches all."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from scantling.runs.parent_process import end_with_parent
from scantling.training.loggers import Wandb

FIRST_PROCESS = "SCANTLING_FIRST_PROCESS"
"""Set in the environment of the processes that the first one starts."""
NEVER = timedelta(days=20)
"""As long as gloo can wait: it counts milliseconds in 31 bits."""
SECONDS_TO_END = 20.0
"""Time that a process has for its last words once it has failed, or has lost another."""
SECONDS_TO_NOTICE = 0.5
"""Time within which a process notices that another's death is the reason of an error."""


class EndTogether(Callback):
    """Each process listens to the next, in a ring over gloo, and ends when that one has died.

    Its death breaks the connection. The listener ends even while it waits for a GPU which itself waits for
    the dead. `is_agreed` knows exceptions that all processes raise after the same step, `is_explained` those
    that are explained later; any other is printed here and ends the process.
    """

    def __init__(
        self,
        console: Console,
        *,
        is_agreed: Callable[[BaseException], bool],
        is_explained: Callable[[BaseException], bool],
    ) -> None:
        self.console, self.is_agreed, self.is_explained = console, is_agreed, is_explained
        self.listener: threading.Thread | None = None
        self.lost = threading.Event()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.trainer = trainer
        if trainer.world_size > 1:
            self.ring: Any = dist.new_group(backend="gloo", timeout=NEVER)
            self.listener = threading.Thread(target=self.listen, daemon=True)
            self.listener.start()

    def listen(self) -> None:
        """Wait, in a thread, for the next process: a broken connection means its death, and ends this one."""
        following = (self.trainer.global_rank + 1) % self.trainer.world_size
        try:
            dist.recv(torch.zeros(1), src=following, group=self.ring)
        except RuntimeError:
            self.lost.set()
            exit_soon()
            # The main thread may have failed first, and be about to say of what.
            time.sleep(2 * SECONDS_TO_NOTICE)
            self.end_process("another process of this run died")

    def leave_ring(self) -> None:
        """Tell the process before that this one goes, and wait until the next does so.

        Here all processes end.
        """
        if self.listener is not None:
            before = (self.trainer.global_rank - 1) % self.trainer.world_size
            with contextlib.suppress(RuntimeError):
                dist.send(torch.zeros(1), dst=before, group=self.ring)
            self.listener.join(SECONDS_TO_END)
            self.listener = None

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.leave_ring()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.trainer = trainer
        if trainer.world_size == 1:
            return
        if self.is_agreed(exception):
            if trainer.global_rank > 0:
                # Once the first has ended with the code of an interruption, srun would kill the slower ones.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return self.leave_ring()
        exit_soon()
        if self.is_explained(exception):
            return
        if self.lost.wait(SECONDS_TO_NOTICE):
            self.end_process("another process of this run died")
        traceback.print_exception(exception)
        self.end_process(traceback.format_exception_only(exception)[-1].strip())

    def end_process(self, reason: str) -> None:
        """Print who ends and why, close W&B, and exit with code 1 at once."""
        self.console.show_cursor()  # a bar hides it
        who = f"process {self.trainer.global_rank} of {self.trainer.world_size}"
        print(f"error: {who}: {reason}", file=sys.stderr, flush=True)
        for logger in self.trainer.loggers:
            if isinstance(logger, Wandb):
                logger.finish(succeeded=False)
        os._exit(1)


def exit_soon() -> None:
    """End this process in `SECONDS_TO_END`, whatever it still waits for."""
    timer = threading.Timer(SECONDS_TO_END, os._exit, [1])
    timer.daemon = True
    timer.start()


def is_first_process() -> bool:
    """Whether this one writes what a run leaves; Lightning finds out when it is imported."""
    return cast(Any, rank_zero_only).rank == 0


def end_with_first_process() -> None:
    """End this process, which Lightning started from the first, when the first ends; on Linux."""
    parent = os.getppid()
    if os.environ.get(FIRST_PROCESS) == str(parent):
        end_with_parent(parent)
    else:
        os.environ[FIRST_PROCESS] = str(os.getpid())


class AnyRank:
    """`any_rank(flag)`: whether the flag is set in any process; every process calls it.

    The hosts ask each other over gloo, so that no GPU is waited for.
    """

    def __init__(self, world_size: int) -> None:
        self.group = dist.new_group(backend="gloo") if world_size > 1 else None

    def __call__(self, flag: bool) -> bool:
        if self.group is None:
            return flag
        anyone = torch.tensor(int(flag))
        dist.all_reduce(anyone, dist.ReduceOp.MAX, group=self.group)
        return bool(anyone)
