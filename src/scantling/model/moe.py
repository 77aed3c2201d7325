"""Mixture of experts: `ffn=moe` and its relatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.checks import check_not_negative, check_whole
from scantling.model.linear import Linear, linear


class Router(nn.Module):
    """Chooses `n_active` of the experts for each token, and their weights.

    p = softmax(x·Wᵀ); the n largest are chosen, and with `renormalised` their p are divided by their
    sum (Mixtral, arXiv:2401.04088, §2.1). Two losses keep the choice balanced and the logits small,
    each averaged over tokens:

        load balance  n_experts · Σ_e f_e · P_e    f_e the share of choices of e, P_e the mean of p_e
                      (Fedus et al. 2021, arXiv:2101.03961, eq. 4)
        z             mean of (logsumexp of the logits)²    (Zoph et al. 2022, arXiv:2202.08906, eq. 5)
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        n_active: int,
        renormalised: bool,
        load_balance: float,
        z: float,
    ):
        super().__init__()
        if not 1 <= n_active <= n_experts:
            raise ValueError(f"n_active={n_active} of n_experts={n_experts}: use 1 … {n_experts}")
        for name, weight in {"load_balance": load_balance, "z": z}.items():
            check_not_negative(f"ffn.router.{name}", weight)
        self.n_experts, self.n_active, self.renormalised = n_experts, n_active, renormalised
        self.load_balance, self.z = load_balance, z
        self.gate = Linear(d_model, n_experts, bias=False)
        self.loss: Tensor | None = None
        """In training: both terms with their coefficients, summed over the layers that this router serves."""

    def forward(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N A"], Tensor, Tensor]:
        """Weights and indices of each token's experts, and how many tokens chose each expert."""
        logits_NX = self.gate(x_ND).float()
        p_NX = logits_NX.softmax(-1)
        weights_NA, chosen_NA = p_NX.topk(self.n_active, dim=-1)
        if self.renormalised:
            weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
        load_X = counts(chosen_NA, self.n_experts)
        if self.training:
            self.add_loss(logits_NX, p_NX, load_X)
        return weights_NA.type_as(x_ND), chosen_NA, load_X

    def add_loss(self, logits_NX: Tensor, p_NX: Tensor, load_X: Tensor) -> None:
        """Add the terms of one layer, [N, X] logits and probabilities and [X] choices, to `loss`."""
        share_X = load_X / (len(p_NX) * self.n_active)
        balance = self.n_experts * (share_X * p_NX.mean(0)).sum()
        loss = self.load_balance * balance + self.z * logits_NX.logsumexp(-1).square().mean()
        self.loss = loss if self.loss is None else self.loss + loss

    def forget(self) -> None:
        """Drop the loss of the last forward pass, before the next."""
        self.loss = None

    def rebalance(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Once a step, after its last backward pass; `over_ranks` sums a tensor over all processes."""


def counts(chosen: Tensor, n_experts: int) -> Tensor:
    """How often each expert was chosen; without `bincount`, which waits for a GPU."""
    ones = torch.ones_like(chosen.flatten())
    return ones.new_zeros(n_experts).scatter_add_(0, chosen.flatten(), ones)


class BiasedRouter(Router):
    """DeepSeek-V3's: s = sigmoid(x·Wᵀ); experts are chosen by s + b, with b an offset that no
    gradient moves, within the `n_active_groups` groups of experts whose two best are largest; their
    weights are `scale`·s. arXiv:2412.19437, §2.1.2.

    Once a step b falls by `speed` for experts with more than their share of the step's
    tokens, and rises for others.
    """

    correction: Tensor
    load_X: Tensor | int
    """How many tokens chose each expert in this step's micro-batches so far, in all layers of this router."""

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        n_groups: int,
        n_active_groups: int,
        scale: float,
        speed: float,
        **choice,
    ):
        super().__init__(d_model, n_experts, **choice)
        if n_groups < 1 or n_experts % n_groups or not 1 <= n_active_groups <= n_groups:
            raise ValueError(
                f"n_groups={n_groups} must divide n_experts={n_experts}, with n_active_groups of them"
            )
        reached = n_active_groups * n_experts // n_groups
        if self.n_active > reached:
            raise ValueError(
                f"n_active={self.n_active} is more than the {reached} experts of the active groups"
            )
        self.n_groups, self.n_active_groups, self.scale, self.speed = n_groups, n_active_groups, scale, speed
        self.register_buffer("correction", torch.zeros(n_experts))
        self.load_X = 0

    def forward(self, x_ND: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N A"], Tensor, Tensor]:
        logits_NX = linear(x_ND.float(), self.gate.weight.float())
        s_NX = logits_NX.sigmoid()
        groups_NGX = (s_NX + self.correction).detach().unflatten(-1, (self.n_groups, -1))
        best_NG = groups_NGX.topk(min(2, groups_NGX.shape[-1]), dim=-1).values.sum(-1)
        left_out = torch.ones_like(best_NG, dtype=torch.bool)
        left_out.scatter_(-1, best_NG.topk(self.n_active_groups, dim=-1).indices, False)
        ranked_NX = groups_NGX.masked_fill(left_out[..., None], -torch.inf).flatten(1)
        chosen_NA = ranked_NX.topk(self.n_active, dim=-1).indices
        weights_NA = s_NX.gather(-1, chosen_NA)
        if self.renormalised:
            weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
        load_X = counts(chosen_NA, self.n_experts)
        if self.training:
            p_NX = s_NX / s_NX.sum(-1, keepdim=True)
            self.add_loss(logits_NX, p_NX, load_X)
            # With `checkpoint_activations` each is added twice, which changes no expert's share.
            self.load_X = self.load_X + load_X
        return (weights_NA * self.scale).type_as(x_ND), chosen_NA, load_X

    def rebalance(self, over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Never within a step: with `checkpoint_activations` the backward pass must choose the same again."""
        load_X = over_ranks(torch.as_tensor(self.load_X)).float()
        self.correction += self.speed * (load_X.mean() - load_X).sign()
        self.load_X = 0


class MixtureOfExperts(nn.Module):
    """Σ weight_e · expert_e(x) over the experts that the router chose, plus the shared ones. Shazeer et al.
    2017, arXiv:1701.06538, §2; shared experts: DeepSeekMoE, arXiv:2401.06066, §3.2.

    No expert has a capacity: each computes all tokens that chose it, and none is dropped. An expert is a
    feed-forward of its own, of width `d_ff` as any option of `ffn=` reads it.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        layer: int,
        *,
        expert: Callable[[int, int, int], nn.Module],
        router: Callable[[int, int], Router],
        n_experts: int,
        n_shared: int,
    ):
        super().__init__()
        check_whole("n_shared", n_shared, least=0)
        self.router = router(d_model, n_experts)
        self.experts = nn.ModuleList([expert(d_model, d_ff, layer) for _ in range(n_experts)])
        self.shared = expert(d_model, n_shared * d_ff, layer) if n_shared else None

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_NA, chosen_NA, load_X = self.router(x_ND)
        order = chosen_NA.flatten().argsort(stable=True)  # by expert, and for each by token
        tokens = order // chosen_NA.shape[1]
        inputs = x_ND.index_select(0, tokens).split(load_X.tolist())
        outputs = torch.cat([expert(x) for expert, x in zip(self.experts, inputs, strict=True)])
        weighted = outputs * weights_NA.flatten().index_select(0, order)[:, None]
        out_ND = torch.zeros_like(x_ND).index_add(0, tokens, weighted.type_as(x_ND))
        if self.shared is not None:
            out_ND = out_ND + self.shared(x_ND)
        return out_ND.view_as(x_BTD)


def dense_first(
    d_model: int,
    d_ff: int,
    layer: int,
    *,
    dense: Callable[[int, int, int], nn.Module],
    rest: Callable[[int, int, int], nn.Module],
    n_dense: int,
    d_ff_dense: int,
) -> nn.Module:
    """Dense feed-forwards of width `d_ff_dense` in the first `n_dense` layers, experts in the rest.

    DeepSeek-V3, arXiv:2412.19437, §4.2.
    """
    check_whole("ffn.n_dense", n_dense, least=0)
    check_whole("ffn.d_ff_dense", d_ff_dense)
    return dense(d_model, d_ff_dense, layer) if layer < n_dense else rest(d_model, d_ff, layer)
