"""The gradient noise scale, `noise_scale`: about the batch size beyond which larger batches hardly help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.nn.utils import get_total_norm

from scantling.training.callbacks import StepCallback
from scantling.training.strategies import FullySharded, Zero


def estimates(small: Tensor, big: Tensor, b_small: float, b_big: float) -> tuple[Tensor, Tensor]:
    """Unbiased |G|² and tr Σ from the squared norms of the mean gradients of two batches.

    E|G_B|² is |G|² + tr(Σ)/B. McCandlish et al. 2018, arXiv:1812.06162, appendix A.1, eq. A.2.
    """
    squared = (b_big * big - b_small * small) / (b_big - b_small)
    trace = (small - big) / (1 / b_small - 1 / b_big)
    return squared, trace


class NoiseScale(StepCallback):
    """B_simple = tr(Σ)/|G|² in tokens, from each process's first micro-batch and the whole step.

    Ibid., eq. 2.9. Both estimates are averaged over steps, as the ratio of two single ones
    says nothing (ibid., A.1).
    """

    DECAY = 0.99

    def __init__(self, *, micro_batches: int, processes: int, tokens_before: Callable[[int], int]) -> None:
        """`micro_batches` of each process in a step, and the tokens of the steps before one."""
        self.micro_batches, self.processes, self.tokens_before = micro_batches, processes, tokens_before
        self.averages = torch.zeros(2)
        """Averages of |G|² and tr Σ, both short of the same factor."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.micro_batches == 1:  # the gradients are those of the first
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            # Each micro-batch's loss is divided by the targets of all.
            small = (self.micro_batches * get_total_norm(gradients)).square()
            self.small = (
                small if trainer.world_size == 1 else pl_module.over_ranks(small) / trainer.world_size
            )

    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        state = task.step_state
        if state.is_skipped:
            return
        big = self.tokens_before(step) - self.tokens_before(step - 1)
        small = big // (self.micro_batches * self.processes)
        found = torch.stack(estimates(self.small, state.grad_norm.square(), small, big))
        self.averages = torch.lerp(found, self.averages.to(found.device), self.DECAY)

    def columns(self) -> dict[str, float]:
        """Columns of a row of metrics; none while the averages are so noisy that one is negative."""
        squared, trace = self.averages.tolist()
        return {"noise_scale": trace / squared} if squared > 0 and trace > 0 else {}

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = state_dict["averages"]


def check_noise_scale(strategy: Strategy | None, precision: str, micro_batches: int) -> None:
    """Raise ValueError where the gradients of a micro-batch cannot be seen."""
    if isinstance(strategy, FullySharded | Zero) or precision == "fp16":
        raise ValueError(
            "noise_scale=true is for trainer=auto, cpu, gpu and ddp, in fp32 and bf16, "
            "where gradients are whole"
        )
    if micro_batches < 2:
        raise ValueError(
            "noise_scale=true compares a micro-batch with the whole step: set micro_batch_size to half of a "
            "device's share of batch_size, or less"
        )
