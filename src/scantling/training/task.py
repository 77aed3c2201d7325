"""The LightningModule: loss, what is logged from it, and the optimiser. Nothing else lives here."""

from __future__ import annotations

from collections.abc import Callable

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


class LanguageModelTask(L.LightningModule):
    """Next-token prediction.

    The gradient of an optimiser step is that of the mean over all its valid targets, whatever the number of
    micro-batches and ranks they are spread over: each micro-batch's summed loss is divided by the step's count
    (`step_targets`), and Lightning's own division by accumulation and world size is undone.
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
    ):
        super().__init__()
        self.decoder = decoder
        if compiled:
            torch.compiler.reset()  # or the models of a sweep would use up its limit of recompilations
            torch._dynamo.config.recompile_limit = RECOMPILATIONS
            decoder.compile()
        self.optimizer_of, self.schedule, self.total_steps = optimizer, schedule, total_steps
        self.token_bytes = token_bytes
        self.step_loss = torch.zeros(())
        """Mean loss of the optimiser step under way, this rank's share; reset by `take_step_loss`."""
        self.grad_norm = torch.zeros(())
        """Global gradient norm of the last step, before clipping."""
        self.lr = 0.0
        """Learning rate of the last step."""
        self.skips: Callable[[int, Tensor, Tensor], bool] | None = None
        """Whether the step of this number, loss and gradient norm is left out; None: no step is, and nothing is read."""
        self.skipped = False
        """Whether the last step was."""

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        nats = self.decoder(batch["inputs"], targets_BT=batch["targets"])
        loss = nats / batch["step_targets"]
        # A number of the host's and one of a GPU: a copy would wait for the forward pass.
        self.step_loss = self.step_loss + loss.detach()
        if self.decoder.routers:
            # A mean over this micro-batch's tokens, weighted by their share of the step's.
            loss = loss + self.decoder.auxiliary_loss() * (batch["targets"].numel() / batch["step_targets"])
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_after_backward(self) -> None:
        if not self.trainer.fit_loop._should_accumulate():
            for router in self.decoder.routers:
                router.rebalance(self.over_ranks)

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        return {
            key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def take_step_loss(self) -> Tensor:
        """Mean loss over all valid targets of the step that just ended, over all ranks."""
        loss, self.step_loss = self.over_ranks(self.step_loss), torch.zeros(())
        return loss

    def over_ranks(self, share: Tensor) -> Tensor:
        """The sum of the ranks' shares."""
        if self.trainer.world_size == 1:
            return share
        total = share.clone()
        dist.all_reduce(total)  # Lightning's reduce would let all wait for each other first
        return total

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.lr = optimizer.param_groups[0]["lr"]
        if self.trainer.strategy.handles_gradient_accumulation:
            return  # an engine that gathers gradients itself clips them too, and sets `grad_norm`
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and _optimizer_handles_unscaling(optimizer):
            # Lightning leaves it to a fused optimiser's step, which is too late for the norm.
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(self.grad_norm, DTensor):
            self.grad_norm = self.grad_norm.full_tensor()
        if self.skips is not None:
            step = self.trainer.global_step + 1
            self.skipped = self.skips(step, self.over_ranks(self.step_loss), self.grad_norm)
            if self.skipped:
                for p in parameters:
                    p.grad = None  # what has no gradient no optimiser touches, nor its state
                return
        # A GPU would have to be waited for; on the CPU most steps are spared a pass over the gradients.
        within = self.grad_norm.is_cpu and self.grad_norm <= (gradient_clip_val or torch.inf)
        if gradient_clip_val is not None and not within:
            clip_grads_with_norm_(parameters, gradient_clip_val, self.grad_norm)

    def on_validation_epoch_start(self) -> None:
        self.text_loss = TextLoss(self.token_bytes)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        nats = self.decoder(batch["inputs"], targets_BT=batch["targets"])
        self.text_loss.add(nats, batch["targets"])

    def configure_optimizers(self):
        optimizer = self.optimizer_of(self.decoder.named_parameters())
        follow_width(optimizer, self.decoder.rate_factors())
        schedule = LambdaLR(optimizer, lambda step: self.schedule(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
