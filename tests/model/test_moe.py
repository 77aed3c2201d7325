"""Mixtures of experts against `transformers` and the papers' formulas."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from scantling.model.ffn import GatedFeedForward
from scantling.model.moe import BiasedRouter, MixtureOfExperts, Router, dense_first

D, D_FF, F, X, ACTIVE = 16, 48, 32, 8, 3  # gated: the hidden width F is 2/3 of D_FF
expert = partial(GatedFeedForward, activation=nn.SiLU, bias=False, multiple_of=8)
softmax = partial(Router, n_active=ACTIVE, renormalised=True, load_balance=0.0, z=0.0)
GROUPS = {"n_groups": 4, "n_active_groups": 2, "scale": 2.5, "speed": 0.01}
biased = partial(BiasedRouter, n_active=ACTIVE, renormalised=True, load_balance=0.0, z=0.0, **GROUPS)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mixture(router, n_shared: int = 0) -> MixtureOfExperts:
    ours = MixtureOfExperts(D, D_FF, 0, expert=expert, router=router, n_experts=X, n_shared=n_shared)
    for i, p in enumerate(ours.parameters()):
        p.data.copy_(0.5 * normal(*p.shape, seed=i))
    return ours


@torch.no_grad()
def copy_experts(ours: Any, theirs: Any):
    theirs.gate.weight.copy_(ours.router.gate.weight)
    for i, one in enumerate(ours.experts):
        theirs.experts.gate_up_proj[i].copy_(torch.cat([one.gate.weight, one.up.weight]))
        theirs.experts.down_proj[i].copy_(one.out.weight)


def assert_same_outputs_and_gradients(ours, theirs):
    outputs, gradients = [], []
    for model in (ours, theirs):
        x = normal(2, 9, D).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        outputs.append(out)
        gradients.append(x.grad)
    assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert_close(ours.router.gate.weight.grad, theirs.gate.weight.grad, rtol=1e-3, atol=1e-3)
    assert ours.router.gate.weight.grad.any()


def test_mixture_equals_mixtrals():
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=X, num_experts_per_tok=ACTIVE
    )
    config._experts_implementation = "eager"
    ours, theirs = mixture(softmax), MixtralSparseMoeBlock(config)
    copy_experts(ours, theirs)
    assert_same_outputs_and_gradients(ours, theirs)


@pytest.mark.parametrize("renormalised", [True, False])
def test_mixture_equals_deepseeks(renormalised):
    """Groups of experts, an offset to the choice, a scale, and a shared expert of twice the width."""
    config = DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=X,
        num_local_experts=X,  # pyright: ignore[reportCallIssue]
        num_experts_per_tok=ACTIVE,
        n_group=4,
        topk_group=2,
        norm_topk_prob=renormalised,
        routed_scaling_factor=2.5,
        n_shared_experts=2,
    )
    config._experts_implementation = "eager"
    ours = mixture(partial(biased, renormalised=renormalised), n_shared=2).eval()
    theirs = DeepseekV3MoE(config).eval()
    copy_experts(ours, theirs)
    for name, mine in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "out")):
        getattr(theirs.shared_experts, name).load_state_dict(getattr(ours.shared, mine).state_dict())
    assert isinstance(ours.router, BiasedRouter)
    ours.router.correction.copy_(0.3 * normal(X))
    theirs.gate.e_score_correction_bias.copy_(ours.router.correction)
    assert_same_outputs_and_gradients(ours, theirs)
    x = normal(50, D)
    _, expected_weights, expected = theirs.gate(x)
    weights, chosen, _ = ours.router(x)
    everywhere = torch.zeros(50, X)
    assert_close(everywhere.scatter(1, chosen, weights), everywhere.scatter(1, expected, expected_weights))
    ours.router.correction.zero_()
    assert (ours.router(x)[1].sort(1).values != chosen.sort(1).values).any()  # the offset had a say


def test_one_expert_is_a_feed_forward():
    ours = MixtureOfExperts(
        D, D_FF, 0, expert=expert, router=partial(softmax, n_active=1), n_experts=1, n_shared=0
    )
    x = normal(2, 9, D)
    assert_close(ours(x), ours.experts[0](x), rtol=1e-6, atol=1e-6)


def losses_of(router: Router, x: torch.Tensor) -> torch.Tensor:
    router.gate.weight.data.copy_(normal(X, D))
    router.train()(x)
    assert router.loss is not None
    return router.loss


def test_load_balance_is_mixtrals_by_the_number_of_active_experts():
    """Theirs adds up the shares of tokens that chose an expert, n_active in all; ours shares of choices, 1 in
    all, so that a perfect balance costs 1 whatever n_active is."""
    x = normal(100, D)
    ours = losses_of(softmax(D, X, load_balance=1.0), x)
    theirs = load_balancing_loss_func((x @ normal(X, D).T,), X, ACTIVE)
    assert_close(ours, theirs / ACTIVE)
    even = softmax(D, X, load_balance=1.0, n_active=X)
    even.gate.weight.data.zero_()
    even.train()(x)
    assert_close(even.loss, torch.tensor(1.0))


def test_z_loss_by_formula():
    """Zoph et al. 2022, eq. 5: the mean over tokens of (log Σ exp)²."""
    x = normal(100, D)
    logits = (x.double() @ normal(X, D).double().T).tolist()
    expected = (
        sum(torch.tensor(row, dtype=torch.float64).exp().sum().log().item() ** 2 for row in logits) / 100
    )
    assert losses_of(softmax(D, X, z=1.0), x).item() == pytest.approx(expected, rel=1e-5)
    both = losses_of(softmax(D, X, z=0.5, load_balance=0.25), x)
    assert_close(both, 0.5 * expected + 0.25 * losses_of(softmax(D, X, load_balance=1.0), x))


def test_a_models_auxiliary_loss_is_that_of_its_routers_in_training(nano):
    decoder = nano("ffn=moe")
    tokens = torch.arange(64)[None]
    decoder.train()(tokens)
    routers = [block.ffn.router for block in decoder.blocks]
    assert_close(decoder.auxiliary_loss(), routers[0].loss + routers[1].loss)
    assert (
        decoder.auxiliary_loss() >= 2 * 0.01
    )  # 0.01 is load balance's factor, and 1 its least value, nearly
    decoder.eval()(tokens)
    assert decoder.auxiliary_loss() == 0.0


def test_a_router_that_serves_several_layers_counts_in_each(nano):
    """With zero weights all p are 1/8, so that load balance is 1 and z is (ln 8)², in each of two layers."""
    shared = nano("ffn=moe", "decoder.layers_per_block=2").train()
    shared.blocks[0].ffn.router.gate.weight.data.zero_()
    once = 0.01 * 1.0 + 0.001 * torch.tensor(8.0).log() ** 2
    for _ in range(2):
        shared(torch.arange(64)[None])
        assert_close(shared.auxiliary_loss(), 2 * once)


@torch.no_grad()
def test_correction_lowers_the_choice_of_busy_experts():
    router = biased(D, X, n_groups=1, n_active_groups=1)
    router.gate.weight.data.copy_(normal(X, D))
    x = normal(400, D) + normal(D, seed=1)  # a mean that favours some experts
    _, chosen, load = router.eval()(x)
    assert not router.correction.any()
    assert_close(load, torch.bincount(chosen.flatten(), minlength=X))
    load = load.float()
    router.train()
    for micro_batch in x.split(100):
        router(micro_batch)
    assert not router.correction.any()
    others = 50 * load.flip(0)  # of another process
    router.rebalance(lambda share: share + others)
    total = load + others
    assert_close(router.correction, 0.01 * torch.sign(total.mean() - total))
    router.correction.zero_()
    for _ in range(300):
        router(x)
        router.rebalance(lambda share: share)
    _, _, after = router.eval()(x)
    after = after.float()
    assert load.std() > 0.5 * load.mean()
    assert after.std() < 0.3 * load.std()  # a step of 0.01 moves some to and fro


def test_the_first_layers_may_be_dense():
    """DeepSeek-V3's first three of 61."""
    rest = partial(MixtureOfExperts, expert=expert, router=softmax, n_experts=X, n_shared=0)
    layers: list[Any] = [
        dense_first(D, D_FF, layer, dense=expert, rest=rest, n_dense=3, d_ff_dense=2 * D_FF)
        for layer in range(5)
    ]
    assert [type(layer) for layer in layers] == [GatedFeedForward] * 3 + [MixtureOfExperts] * 2
    assert layers[0].out.in_features == 2 * F
    assert layers[4].experts[0].out.in_features == F


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_active": 9}, "n_active=9 of n_experts=8"),
        ({"n_groups": 0}, "n_groups=0 must divide n_experts=8"),
        ({"n_groups": 3}, "n_groups=3 must divide n_experts=8"),
        ({"n_active_groups": 5}, "n_groups=4 .* n_active_groups"),
        ({"n_active_groups": 1}, "n_active=3 .* 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        biased(D, X, **settings)
