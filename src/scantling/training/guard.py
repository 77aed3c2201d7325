"""Bad steps, whose loss or gradient is not finite or whose loss is a spike, and what a run does: `guard`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from scantling.data.loading import BatchSizes
from scantling.training.strategies import Zero

ACTIONS = ("stop", "skip", "rollback")


class BadStep(Exception):
    """A step that the guard does not let pass."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"{reason} at step {step}")
        self.step = step


def robust_z(x: float, values: Sequence[float]) -> float:
    """0.6745·(x - median)/MAD, MAD the median distance of `values` from their median.

    For normal numbers it is the standard score, and single outliers among them do not move it. Iglewicz &
    Hoaglin 1993, How to Detect and Handle Outliers, §3.3.
    """
    middle = median(values)
    spread = median(abs(value - middle) for value in values)
    above = x - middle
    return 0.6745 * above / spread if spread else math.copysign(math.inf, above) if above else 0.0


@dataclass(frozen=True)
class GuardSettings:
    """`guard` of conf/train.yaml. Raises ValueError for values out of range."""

    action: str
    spike: float | None
    window: int
    batches: int
    most: int

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"guard.action={self.action} is unknown: use one of {', '.join(ACTIONS)}")
        if self.spike is not None and not (isinstance(self.spike, int | float) and self.spike > 0):
            raise ValueError(f"guard.spike={self.spike} must be a positive number, or null")
        for key, least in (("window", 3), ("batches", 1), ("most", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"guard.{key}={getattr(self, key)} must be at least {least}")

    def check_engine(self, strategy: Strategy | None, precision: str, sizes: BatchSizes) -> None:
        """Raise ValueError where this engine and these batches let no step be left out."""
        if self.action == "rollback" and sizes.steps:
            raise ValueError(
                "guard.action=rollback leaves batches out of an order of equal ones: "
                "use stop or skip with batch_warmup"
            )
        if self.action != "skip":
            return
        if isinstance(strategy, Zero):
            raise ValueError(
                "guard.action=skip: DeepSpeed's engine takes every step; use rollback, or trainer=fsdp or ddp"
            )
        if precision == "fp16":
            raise ValueError(
                "guard.action=skip is for fp32 and bf16: in fp16 the loss scale leaves steps out itself"
            )


class Guard(Callback):
    """Judges the loss and the gradient's norm of every step, in order.

    With `stop` and `rollback` metrics note every step, and `judge_steps`, called when a row of metrics or a
    checkpoint is written, reads them from the device and raises BadStep for the first bad one. With `skip`
    the task asks `leaves_out` in every step, which reads them then: a GPU is waited for. A spike is a loss
    whose `robust_z` among the last `window` good ones is above `spike`; there is none before so many were
    seen. These losses are part of a checkpoint, so that a resumed run judges alike.
    """

    def __init__(
        self,
        settings: GuardSettings,
        *,
        record: Callable[[BadStep, str], None],
        used: int,
        gradients_may_overflow: bool,
    ) -> None:
        """`record` writes a bad step and what was done about it down; `used`: how often that was before.

        In float16 gradients may overflow: the scaler leaves such a step out itself.
        """
        self.settings, self.record, self.used = settings, record, used
        self.gradients_may_overflow = gradients_may_overflow
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.pending: list[tuple[int, Tensor, Tensor]] = []

    def note_step(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Note the step that just ended; nothing is read from the device yet."""
        if self.settings.action != "skip":
            self.pending.append((step, loss, grad_norm))

    def judge_steps(self) -> None:
        """Judge the steps noted since the last call. Raises BadStep."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        steps, losses, norms = zip(*pending, strict=True)
        numbers = zip(steps, torch.stack(losses).tolist(), torch.stack(norms).tolist(), strict=True)
        for step, loss, norm in numbers:
            if reason := self.fault(loss, norm):
                raise BadStep(step, reason)

    def leaves_out(self, step: int, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether a step, all but taken, is skipped. Raises BadStep when too many were."""
        reason = self.fault(loss.item(), grad_norm.item())
        if reason is None:
            return False
        bad = BadStep(step, reason)
        if self.used >= self.settings.most:
            raise bad
        self.used += 1
        self.record(bad, "skip")
        return True

    def fault(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; None: nothing, and later losses are judged by its loss too."""
        if not math.isfinite(loss):
            return f"train/loss is {loss}"
        if not math.isfinite(grad_norm) and not self.gradients_may_overflow:
            return f"grad_norm is {grad_norm}"
        if self.settings.spike is None:
            return None
        if len(self.losses) == self.settings.window:
            z = robust_z(loss, self.losses)
            if z > self.settings.spike:
                window = self.settings.window
                return f"train/loss is {loss:.4g}, {z:.1f} robust deviations above the last {window},"
        self.losses.append(loss)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses.extend(state_dict["losses"])
