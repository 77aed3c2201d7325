"""The optimiser step: what is known of it, and which micro-batch is its last."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning.pytorch as L
import torch
from torch import Tensor


@dataclass
class StepState:
    """What is known of the optimiser step under way and, when it is over, of the one that ended.

    Only the task, which owns it, writes it; metrics, guard and noise scale read it. Tensors stay on the
    device: nothing here waits for a GPU.
    """

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    """This process's share of the mean loss over the step's targets, in nats: a sum over micro-batches."""
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Norm of the gradients of all processes, before clipping."""
    lr: float = 0.0
    """Learning rate of the first group of parameters."""
    is_skipped: bool = False
    """Whether the step moved no parameter."""

    def add_loss(self, share: Tensor) -> None:
        """Add the share of one micro-batch."""
        # A number of the host's and one of a GPU: a copy would wait for the forward pass.
        self.loss = self.loss + share.detach()

    def take_loss(self) -> Tensor:
        """This process's share of the loss; that of the next step begins at zero."""
        loss, self.loss = self.loss, torch.zeros(())
        return loss


def is_step_over(trainer: L.Trainer) -> bool:
    """Whether the micro-batch under way is the last of its optimiser step."""
    # Lightning says it nowhere in public before its own count of steps goes on.
    return not trainer.fit_loop._should_accumulate()
