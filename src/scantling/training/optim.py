"""Optimisers, `optim=`: functions of the model's named parameters. Weight decay falls on matrices only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as adamw_update

from scantling.model.checks import check_below_one, check_not_negative, check_positive

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def decay_groups(named: NamedParameters, weight_decay: float) -> list[dict]:
    """Matrices and tables decay; biases and norm weights do not. Raises ValueError for a negative decay."""
    check_not_negative("optim.weight_decay", weight_decay)
    parameters = [p for _, p in named if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless they are two decays from 0 to below 1."""
    if len(betas) != 2:
        raise ValueError(f"optim.betas={list(betas)} must be two numbers, as [0.9, 0.95]")
    for i, beta in enumerate(betas):
        check_below_one(f"optim.betas[{i}]", beta)


def follow_width(optimizer: torch.optim.Optimizer, factors: Mapping[torch.nn.Parameter, float]) -> None:
    """Multiply each parameter's rate by its factor, and divide its weight decay by it.

    So rate × decay stays, as in the reference code of Yang et al. 2022, arXiv:2203.03466. Groups are
    split; those of factor 1 come first. Raises ValueError for optimisers whose steps depend on the
    gradient's size, unlike Adam's.
    """
    if set(factors.values()) == {1.0}:
        return
    if not isinstance(optimizer, torch.optim.AdamW | Lion):
        raise ValueError(
            "param=mup sets rates for optim=adamw and lion: choose one of them, or param=standard"
        )
    split = []
    for group in optimizer.param_groups:
        for factor in sorted({factors[p] for p in group["params"]}, key=lambda factor: factor != 1):
            chosen = [p for p in group["params"] if factors[p] == factor]
            rate, decay = group["lr"] * factor, group["weight_decay"] / factor
            split.append({**group, "params": chosen, "lr": rate, "weight_decay": decay})
    optimizer.param_groups[:] = split


def adamw(
    named: NamedParameters, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; torch's fused kernel."""
    check_not_negative("lr", lr)
    check_betas(betas)
    return torch.optim.AdamW(decay_groups(named, weight_decay), lr=lr, betas=betas, eps=eps, fused=True)


def sgd(
    named: NamedParameters, *, lr: float, momentum: float, nesterov: bool, weight_decay: float
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, Sutskever et al. 2013."""
    check_not_negative("optim.lr", lr)
    check_below_one("optim.momentum", momentum)
    groups = decay_groups(named, weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)


def lion(
    named: NamedParameters, *, lr: float, lr_ratio: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Lion at `lr_ratio` times the learning rate that AdamW would have."""
    check_not_negative("lr", lr)
    check_positive("optim.lr_ratio", lr_ratio)
    check_betas(betas)
    return Lion(decay_groups(named, weight_decay), lr=lr * lr_ratio, betas=betas)


class Lion(torch.optim.Optimizer):
    """w ← w - lr·(sign(β1·m + (1-β1)·g) + λ·w), then m ← β2·m + (1-β2)·g.

    Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = momentum_of(self.state[p], p)
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(torch.lerp(p.grad, m, beta1).sign_(), alpha=lr)
                m.lerp_(p.grad, 1 - beta2)
        return loss


def muon(
    named: NamedParameters,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases."""
    check_not_negative("lr", lr)
    check_betas(betas)
    check_below_one("optim.momentum", momentum)
    check_not_negative("optim.eps", eps)
    hidden, rest = [], []
    for name, p in named:
        (hidden if p.ndim == 2 and ".blocks." in f".{name}" else rest).append((name, p))
    groups = [
        {"params": [p for _, p in hidden], "weight_decay": weight_decay, "momentum": momentum},
        *decay_groups(rest, weight_decay),
    ]
    return Muon(groups, lr=lr, betas=betas, eps=eps)


class Muon(torch.optim.Optimizer):
    """w ← (1-lr·λ)·w - 0.2·√max(rows, columns)·lr·orthogonalised(g + μ·m), m ← μ·m + g. Jordan et al. 2024.

    The scale of the update is Liu et al. 2025, arXiv:2502.16982, eq. 4, so that AdamW's
    learning rate serves both. Groups with a `momentum` take Muon, the others AdamW. Matrices of
    one shape are orthogonalised together.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "momentum": None}
        # `fused` tells torch's load_state_dict that AdamW's count of steps lives on the device too.
        super().__init__(groups, defaults | {"fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = evaluate_closure(closure)
        for group in self.param_groups:
            if group["momentum"] is None:
                self.step_adamw(group)
            else:
                self.step_muon(group)
        return loss

    def step_muon(self, group: dict) -> None:
        """Muon's step, for a group of matrices."""
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.shape].append(p)
        for (rows, columns), parameters in by_shape.items():
            updates = []
            for p in parameters:
                m = momentum_of(self.state[p], p)
                m.mul_(group["momentum"]).add_(p.grad)
                updates.append(torch.add(p.grad, m, alpha=group["momentum"]))
            step = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            for p, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.type_as(p), alpha=step)

    def step_adamw(self, group: dict) -> None:
        """AdamW's step by torch's fused kernel, for a group of other parameters."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        if parameters:
            adamw_update(
                parameters,
                [p.grad for p in parameters],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def momentum_of(state: dict, p: Tensor) -> Tensor:
    """The momentum of `p`, zero before the first step."""
    if not state:
        state["momentum"] = torch.zeros_like(p)
    return state["momentum"]


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """Singular values of each matrix drawn to about 1 by five steps of X ← aX + (bA + cA²)X, A = XXᵀ.

    The values end between about 0.7 and 1.2, which serves as well as exactly 1. In bfloat16, as published:
    Jordan et al. 2024.
    """
    x = matrices_NRC.bfloat16()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def evaluate_closure(closure: Callable[[], Any] | None) -> Any:
    """The loss that an optimiser's closure returns, taken as torch's own optimisers do."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
