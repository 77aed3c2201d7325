"""Heads by formula, against torch's adaptive softmax, and the sampled one against the full on average."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from scantling.model.cross_entropy import IGNORED
from scantling.model.embed import Tied, Untied
from scantling.model.head import Adaptive, Full, Sampled

B, T, D, V = 2, 50, 16, 300
PLAIN = {"scale": 1.0, "width_exponent": 0.0, "norm": None}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(B, T, D)


def untied() -> Untied:
    embed = Untied(V, D, **PLAIN, bias=True)
    embed.head.weight.data.copy_(0.4 * normal(V, D, seed=1))
    embed.head.bias.data.copy_(0.4 * normal(V, seed=2))
    return embed


def targets_of(embed) -> torch.Tensor:
    """Drawn from the model itself, so that the loss is of the size it has in training."""
    p = (X @ embed.head.weight.T + embed.head.bias).softmax(-1).flatten(0, 1)
    return torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3)).view(B, T)


@pytest.mark.parametrize("scale", [None, 0.25])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_full_by_formula(scale, softcap):
    """Gemma 2, §2: c·tanh(z/c); Command R's `logit_scale` multiplies z."""
    embed = untied()
    z = (X @ embed.head.weight.T + embed.head.bias) * (1 if scale is None else scale)
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    head = Full(V, D, scale=scale, softcap=softcap)
    assert_close(head.logits(X, embed), z)
    targets = targets_of(embed)
    log_p = z.double() - z.double().exp().sum(-1, keepdim=True).log()
    expected = -sum(log_p[b, t, targets[b, t]] for b in range(B) for t in range(T))
    assert_close(head.nats(X, embed, targets).double(), expected, rtol=1e-5, atol=0)


def adaptive() -> Adaptive:
    head = Adaptive(V, D, cutoffs=[0.1, 0.4], narrower=4.0)
    for i, p in enumerate(head.parameters()):
        p.data.copy_(normal(*p.shape, seed=i))
    return head


def test_adaptive_equals_torchs():
    head, embed = adaptive(), Tied(V, D, **PLAIN)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, [30, 120], div_value=4.0)
    theirs.load_state_dict(head.softmax.state_dict())
    targets = targets_of(untied())
    log_p = theirs.log_prob(X.flatten(0, 1))
    assert_close(head.logits(X, embed).flatten(0, 1), log_p)
    assert_close(head.nats(X, embed, targets), theirs(X.flatten(0, 1), targets.flatten()).loss * B * T)
    assert_close(log_p.exp().sum(-1), torch.ones(B * T))


def test_adaptive_by_formula():
    """Grave et al. 2017, §4: a rare token's probability is its cluster's times its own within the cluster."""
    head = adaptive()
    log_p = head.logits(X, Tied(V, D, **PLAIN))
    matrices = [p for p in head.parameters() if p.ndim == 2]
    assert [p.shape for p in matrices] == [(30 + 2, D), (4, D), (90, 4), (1, D), (180, 1)]
    first = (X @ matrices[0].T).softmax(-1)
    clusters = [(X @ down.T @ up.T).softmax(-1) for down, up in (matrices[1:3], matrices[3:])]
    p = torch.cat([first[..., :30], *(first[..., 30 + i, None] * c for i, c in enumerate(clusters))], -1)
    assert_close(log_p.exp(), p, rtol=1e-4, atol=1e-7)


def mean_of_sampled(n_samples: int, draws: int):
    """Loss a token and gradient of x on average over draws, and those of the full softmax."""
    embed, head = untied(), Sampled(V, D, scale=0.8, softcap=20.0, n_samples=n_samples)
    targets = targets_of(embed)
    torch.manual_seed(0)
    x = X.clone().requires_grad_()
    sampled = torch.stack([head.train().nats(x, embed, targets) for _ in range(draws)]).mean()
    full = Full(V, D, scale=0.8, softcap=20.0).nats(x, embed, targets)
    assert torch.equal(head.eval().nats(x, embed, targets), full)
    (of_sampled,), (of_full,) = (torch.autograd.grad(loss, x) for loss in (sampled, full))
    error = (of_sampled - of_full).norm() / of_full.norm()
    return sampled.item() / (B * T), full.item() / (B * T), error.item()


def test_sampled_softmax_is_the_full_one_on_average():
    """By Jensen its loss is too low by about half the relative variance of the sum of exponentials, which
    falls as 1/n. Means of 300 draws are good to about 0.01; the tolerances are twice what was seen."""
    few, full, error_of_few = mean_of_sampled(16, 300)
    many, _, error_of_many = mean_of_sampled(256, 300)
    assert full - 0.6 < few < full
    assert full - 0.05 < many < full
    assert error_of_many < 0.06
    assert error_of_many < error_of_few / 3


@pytest.mark.parametrize("target", [0, 2, 150])
@torch.no_grad()
def test_the_sampled_sum_of_exponentials_is_right_on_average(target):
    """exp(loss)·exp(z_target) of a token is the sum that the draws stand for; a drawn target must not count
    twice."""
    embed, head = untied(), Sampled(V, D, scale=None, softcap=None, n_samples=50).train()
    z = X[0, 0] @ embed.head.weight.T + embed.head.bias
    others = torch.arange(V) != target
    embed.head.bias[target] += z[others].logsumexp(0) - z[target]  # half of the sum is the target's
    z[target] = z[others].logsumexp(0)
    targets = torch.tensor([[target]])
    torch.manual_seed(0)
    losses = torch.stack([head.nats(X[:1, :1], embed, targets) for _ in range(600)])
    sums, expected = (losses + z[target]).exp(), z.exp().sum()
    assert_close(2 * z[target].exp(), expected)
    assert abs(sums.mean() - expected) < 4 * sums.std() / 600**0.5
    assert sums.std() / 600**0.5 < 0.02 * expected


def test_sampled_entries_are_drawn_as_often_as_is_taken_off(monkeypatch):
    """Counted in 200 000 draws; a count's standard error is its root."""
    embed, drawn = untied(), torch.zeros(V)
    head = Sampled(V, D, scale=None, softcap=None, n_samples=200)
    log_expected = head.log_expected

    def count(tokens):
        drawn.add_(torch.bincount(tokens, minlength=V))
        return log_expected(tokens)

    monkeypatch.setattr(head, "log_expected", count)
    torch.manual_seed(0)
    for _ in range(1000):
        head.nats(X[:1, :1], embed, torch.zeros(1, 1, dtype=torch.long))
    expected = 1000 * log_expected(torch.arange(V)).exp()
    assert_close(expected.sum(), torch.tensor(200_000.0))
    assert ((drawn - expected) / expected.sqrt()).abs().max() < 4.5
    assert ((drawn - expected) / expected.sqrt()).std() < 1.2


HEADS = {
    "full": Full(V, D, scale=None, softcap=None),
    "adaptive": adaptive(),
    "sampled": Sampled(V, D, scale=None, softcap=None, n_samples=64),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("train", [True, False])
def test_ignored_targets_are_left_out(head, train):
    """The loss is that of the others alone, and no gradient reaches what is ignored; with nothing left it is
    0."""
    embed = untied()
    targets = targets_of(embed)
    kept = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.5
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    loss = head.train(train).nats(x, embed, targets.where(kept, IGNORED))
    torch.manual_seed(0)
    assert_close(loss, head.nats(X[kept][None], embed, targets[kept][None]))
    loss.backward()
    assert x.grad is not None
    assert not x.grad[~kept].any()
    assert x.grad[kept].any(-1).all()
    assert head.nats(X, embed, torch.full((B, T), IGNORED)).item() == 0.0


@pytest.mark.parametrize("n_samples", [0, V])
def test_more_samples_than_entries_are_refused(n_samples):
    with pytest.raises(ValueError, match=f"n_samples={n_samples} must be at least 1, and below"):
        Sampled(V, D, scale=None, softcap=None, n_samples=n_samples)
