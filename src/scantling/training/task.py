"""The LightningModule: loss, what is logged from it, and the optimiser. Nothing else lives here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from scantling.inference.text_loss import TextLoss
from scantling.model.decoder import Decoder
from scantling.model.scores import RECOMPILATIONS
from scantling.training.optim import follow_width
from scantling.training.step import StepState, is_step_over
from scantling.training.strategies import Zero


class LanguageModelTask(L.LightningModule):
    """Next-token prediction.

    The gradient of an optimiser step is that of the mean over all its valid targets, whatever the number of
    micro-batches and ranks they are spread over: each micro-batch's summed loss is divided by the step's
    count (`step_targets`), and Lightning's own division by accumulation and world size is undone. What is
    known of the step is kept in `step_state`, which callbacks read.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int, int], float],
        total_steps: int,
        token_bytes: np.ndarray,
        compiled: bool,
        leaves_out: Callable[[int, Tensor, Tensor], bool] | None = None,
    ):
        """`leaves_out` says whether the step of this number, loss and gradient norm is skipped; None: no step
        is, and nothing is read from the device.
        """
        super().__init__()
        self.decoder = decoder
        if compiled:
            torch.compiler.reset()  # or the models of a sweep would use up its limit of recompilations
            torch._dynamo.config.recompile_limit = RECOMPILATIONS
            decoder.compile()
        self.optimizer_of, self.schedule, self.total_steps = optimizer, schedule, total_steps
        self.token_bytes = token_bytes
        self.leaves_out = leaves_out
        self.step_state = StepState()

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        nats = self.decoder(batch["inputs"], targets_BT=batch["targets"])
        loss = nats / batch["step_targets"]
        self.step_state.add_loss(loss)
        if self.decoder.routers:
            # A mean over this micro-batch's tokens, weighted by their share of the step's.
            loss = loss + self.decoder.auxiliary_loss() * (batch["targets"].numel() / batch["step_targets"])
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_after_backward(self) -> None:
        if is_step_over(self.trainer):
            for router in self.decoder.routers:
                router.rebalance(self.over_ranks)

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def take_step_loss(self) -> Tensor:
        """Mean loss over all valid targets of the step that just ended, over all ranks."""
        return self.over_ranks(self.step_state.take_loss())

    def over_ranks(self, share: Tensor) -> Tensor:
        """The sum of the ranks' shares."""
        if self.trainer.world_size == 1:
            return share
        total = share.clone()
        dist.all_reduce(total)  # Lightning's reduce would let all wait for each other first
        return total

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        state = self.step_state
        state.lr = optimizer.param_groups[0]["lr"]
        if self.trainer.strategy.handles_gradient_accumulation:
            return  # an engine that gathers gradients itself clips them too, in its step
        self.unscale_gradients(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        state.grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.leaves_out is not None:
            step, loss = self.trainer.global_step + 1, self.over_ranks(state.loss)
            state.is_skipped = self.leaves_out(step, loss, state.grad_norm)
            if state.is_skipped:
                for p in parameters:
                    p.grad = None  # what has no gradient no optimiser touches, nor its state
                return
        # A GPU would have to be waited for; on the CPU most steps are spared a pass over the gradients.
        within = state.grad_norm.is_cpu and state.grad_norm <= (gradient_clip_val or torch.inf)
        if gradient_clip_val is not None and not within:
            clip_grads_with_norm_(parameters, gradient_clip_val, state.grad_norm)

    def unscale_gradients(self, optimizer: Any) -> None:
        """In float16 Lightning leaves it to a fused optimiser's step, which is too late for the norm."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and _optimizer_handles_unscaling(optimizer):
            scaler.unscale_(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, Zero) and (norm := strategy.grad_norm) is not None:
            self.step_state.grad_norm = norm

    def on_validation_epoch_start(self) -> None:
        self.text_loss = TextLoss(self.token_bytes)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        nats = self.decoder(batch["inputs"], targets_BT=batch["targets"])
        self.text_loss.add(nats, batch["targets"])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_of(self.decoder.named_parameters())
        follow_width(optimizer, self.decoder.rate_factors())
        schedule = LambdaLR(optimizer, lambda step: self.schedule(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
