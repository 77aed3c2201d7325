"""An average of the weights over the steps of training, `ema`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from scantling.training.callbacks import StepCallback
from scantling.training.strategies import Zero, gather_to_first, shard_like


class WeightAverage(StepCallback):
    """After step t: w̄ ← d·w̄ + (1-d)·w, d = min(`decay`, (1+t)/(10+t)), from w̄ = w.

    Polyak & Juditsky 1992; exponential, with the start of TensorFlow's `ExponentialMovingAverage`, so
    that a short run does not remember its initial weights. Validation and samples see w̄, training
    never does. A checkpoint keeps both, w̄ in `callbacks`. Each process averages the weights that it
    keeps; buffers are not averaged.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.trained: list[Tensor] = []
        """The weights themselves, while w̄ stands in their place."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.parameters = dict(pl_module.decoder.named_parameters())
        stored = self.averages
        self.averages = {
            name: shard_like(stored[name], p) if stored else p.detach().clone()
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def on_step(self, trainer: L.Trainer, task: Any, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, here = local_shares(self.averages.values()), local_shares(self.parameters.values())
        torch._foreach_lerp_(averages, here, 1 - decay)  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        here = local_shares(self.parameters.values())
        self.trained = [p.clone() for p in here]
        torch._foreach_copy_(here, local_shares(self.averages.values()))  # type: ignore[attr-defined]

    @torch.no_grad()
    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stands behind what looks at the weights, and before what keeps them."""
        here = local_shares(self.parameters.values())
        torch._foreach_copy_(here, self.trained)  # type: ignore[attr-defined]
        self.trained = []

    def state_dict(self) -> dict[str, Any]:
        whole = {
            name: gather_to_first(w) if isinstance(w, DTensor) else w for name, w in self.averages.items()
        }
        return {"weights": whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averages = state_dict["weights"]


def local_shares(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shares of the tensors."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]


def check_average(decay: float | None, strategy: Strategy | None) -> None:
    """Raise ValueError for a decay out of range, and where no process can average weights on its own."""
    if decay is None:
        return
    if not 0 < decay < 1:
        raise ValueError(f"ema.decay={decay} must be above 0 and below 1, 0.999 say; null: no average")
    if isinstance(strategy, Zero) and strategy.shards_weights:
        raise ValueError("ema.decay is not for ZeRO 3: use trainer=fsdp, which shares out as much, or zero2")
