"""Engines, `trainer=`: how several processes train one model.

They are Lightning's strategies, made to run on CPUs too and to write one kind of checkpoint: a single file of
whole tensors, from which any engine and any number of processes goes on.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from scantling.training.optim import Muon


class Replicated(DDPStrategy):
    """A whole model in each process; gradients are averaged.

    Li et al. 2020, arXiv:2006.15704; torch's DDP.
    """

    def __init__(self, device: torch.device, precision: str, *, find_unused_parameters: bool) -> None:
        super().__init__(find_unused_parameters=find_unused_parameters, gradient_as_bucket_view=True)


class WholeCheckpoints(Strategy):
    """Whole checkpoints of a sharded model: the first process gathers and writes, each reads its own part.

    Weights are read before the model is cut up. A subclass gathers weights, and gathers and
    cuts the optimiser's state.
    """

    # What Lightning's sharded strategies change: they read a checkpoint after the cut, and write a folder.
    restore_checkpoint_after_setup = False  # type: ignore[assignment]
    lightning_restore_optimizer = True  # type: ignore[assignment]
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict

    @property
    @abstractmethod
    def shards_weights(self) -> bool:
        """Whether no process has the whole model, so that calls of it must run in all of them."""

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError for an optimiser that cannot be cut up.

        `optimizer` is of the chosen kind, over any parameters.
        """
        if isinstance(optimizer, Muon):
            raise ValueError(
                "optim=muon works on whole matrices, which this trainer= cuts up: "
                "use trainer=ddp, or another optim="
            )


class Zero(WholeCheckpoints, DeepSpeedStrategy):
    """Each process keeps a share of the optimiser's state (stage 1), of gradients (2), of weights (3).

    Rajbhandari et al. 2020, arXiv:1910.02054; what is kept in the host's memory, Ren et al. 2021,
    arXiv:2101.06840. `zero_optimization` is that section of DeepSpeed's own configuration. Mixed precision is
    torch's autocast over float32 weights, as in every other engine.

    Raises ValueError where DeepSpeed is not installed, and for float16.
    """

    def __init__(self, device: torch.device, precision: str, *, zero_optimization: dict[str, Any]) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError(
                "this trainer= needs DeepSpeed: pip install deepspeed, or use trainer=fsdp or ddp"
            )
        check_precision(precision)
        self.kind = device.type
        pinned = {"pin_memory": device.type == "cuda"}
        zero_optimization = {
            key: value | pinned if isinstance(value, dict) and value.get("pin_memory") == "auto" else value
            for key, value in zero_optimization.items()
        }
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
        super().__init__(
            config={
                "zero_optimization": zero_optimization,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": False},  # Lightning would have bfloat16 weights
                "torch_autocast": {"enabled": precision != "fp32", "dtype": "bfloat16"},
            }
        )

    # Lightning's class asks for a CUDA device in the three that follow; DeepSpeed itself does not.

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        if self.kind == "cpu":
            # Reductions for DeepSpeed's inference, which it would compile for a minute at its first start.
            import deepspeed.ops

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank) if self.kind == "cpu" else super().root_device

    @property
    def shards_weights(self) -> bool:
        return self.zero_stage_3

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        # DeepSpeed puts flat shares of all of them in their place.
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided by the number of micro-batches already.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step, before clipping; None where DeepSpeed has taken none."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param

        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        for name, p in self.lightning_module.named_parameters():
            # The optimiser's copy: in stage 3 a weight that is still gathered may be the one before the step.
            whole: Any = safe_get_full_fp32_param(p)
            state[name] = whole.detach().cpu() if self.is_global_zero else torch.empty(0)
        return state

    @property
    def parameters(self) -> list[Any]:
        """Parameters in the order in which a checkpoint numbers them."""
        return [p for group in self.groups for p in group]

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimiser that DeepSpeed's own wraps, over flat shares of all parameters of a group."""
        wrapper: Any = self.optimizers[0]
        return wrapper.optimizer

    def linked_flats(self) -> list[Tensor]:
        """The flat shares, each linked to its optimiser state.

        In stages 1 and 2 DeepSpeed looks a parameter's state up through a link that it sets after the first
        group's first step, when the other groups have no state yet: it is set anew here.
        """
        wrapper: Any = self.optimizers[0]
        if self.zero_stage_3:
            return wrapper.fp32_partitioned_groups_flat
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()
        return wrapper.single_partition_of_fp32_groups

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self.linked_flats()[0]
        example = self.inner.state[flat]
        state: dict[int, dict[str, Any]] = {}
        for i, p in enumerate(self.parameters if example else ()):
            # A count of steps for each parameter: other engines would raise a shared one once for each.
            state[i] = {
                key: safe_get_full_optimizer_state(p, key) if value.shape == flat.shape else value.clone()
                for key, value in sorted(example.items())
            }
            state[i] = {key: value.cpu() for key, value in state[i].items()} if self.is_global_zero else {}
        first, groups = 0, []
        for group, parameters in zip(self.inner.param_groups, self.groups, strict=True):
            groups.append({**group, "params": list(range(first, first + len(parameters)))})
            first += len(parameters)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (stored,) = checkpoint["optimizer_states"]
        for group, saved in zip(self.inner.param_groups, stored["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if not stored["state"]:
            return
        shape = self.parameters[0].ds_shape if self.zero_stage_3 else self.parameters[0].shape
        alike = {key for key, value in stored["state"][0].items() if value.shape == shape}
        for flat in self.linked_flats():
            self.inner.state[flat] = {
                key: torch.zeros_like(flat) if key in alike else value.to(flat.device, copy=True)
                for key, value in stored["state"][0].items()
            }
        self.linked_flats()
        for i, p in enumerate(self.parameters):
            for key in alike:
                self.set_share(p, stored["state"][i][key], key)

    def set_share(self, p: Any, value: Tensor, key: str) -> None:
        """Set this process's share of an optimiser's tensor for `p`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self.zero_stage_3:
            safe_set_full_optimizer_state(p, value, key)
            return
        # The last share is padded, which DeepSpeed's function for whole tensors forgets.
        size = p.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        safe_set_local_optimizer_state(p, padded[self.global_rank * size :][:size], key)


class FullySharded(WholeCheckpoints, ModelParallelStrategy):
    """Each process keeps a share of every tensor, and of its gradient and optimiser state.

    A block's weights are gathered when it is computed, with `reshard_after_forward` anew for the backward
    pass. Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard` (FSDP2). Raises ValueError for float16.
    """

    shards_weights = True  # type: ignore[assignment]

    def __init__(self, device: torch.device, precision: str, *, reshard_after_forward: bool) -> None:
        check_precision(precision)
        super().__init__()
        self.reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        # Lightning's "auto" would cut each product among the processes of a node.
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        mesh = self.device_mesh["data_parallel"]
        decoder: Any = self.lightning_module.decoder  # type: ignore[union-attr]
        for block in decoder.blocks:  # one after the other, so that no device ever holds the whole model
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(decoder, mesh=mesh)
        self.model_to_device()
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        _optimizers_to_device(self.optimizers, self.root_device)
        self.barrier()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: gather_to_first(t) for name, t in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        shared = (
            optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        ).state_dict()
        whole = {
            i: {key: gather_to_first(value) for key, value in values.items()}
            for i, values in shared["state"].items()
        }
        return {**shared, "state": whole}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shared = {
                i: {
                    key: shard_like(value, p) if value.shape == p.shape else value
                    for key, value in stored["state"][i].items()
                }
                for i, p in enumerate(parameters)
                if i in stored["state"]
            }
            optimizer.load_state_dict({**stored, "state": shared})


def gather_to_first(tensor: Tensor) -> Tensor:
    """The whole tensor on the first process's host, nothing in the others; every process calls this."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if dist.get_rank() == 0 else torch.empty(0)


def shard_like(whole: Tensor, p: Tensor) -> Tensor:
    """A copy on the device of `p`, cut up and placed as that is."""
    whole = whole.to(p.device, copy=True)
    return distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def check_precision(precision: str) -> None:
    """Raise ValueError for float16, whose loss scale lives in another place in each engine that shards."""
    if precision == "fp16":
        raise ValueError("trainer.precision=fp16 is for trainer=auto, gpu and ddp: use bf16 or fp32")
