"""The loss in chunks of tokens, against the loss from whole logits in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from scantling.model import cross_entropy
from scantling.model.cross_entropy import IGNORED
from scantling.model.embed import Factorised, Tied, Untied
from scantling.model.head import Full

B, T, D, V = 2, 37, 16, 300
PLAIN = {"scale": 1.0, "width_exponent": 0.0, "norm": None}
EMBEDDINGS = {
    "tied": lambda: Tied(V, D, **PLAIN),
    "untied": lambda: Untied(V, D, **PLAIN, bias=True),
    "factorised": lambda: Factorised(V, D, rank=8, **PLAIN),
}


@pytest.fixture(params=EMBEDDINGS)
def embed(request):
    embed = EMBEDDINGS[request.param]()
    generator = torch.Generator().manual_seed(0)
    for p in embed.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    return embed


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=generator)
    targets = torch.randint(V, (B, T), generator=generator)
    return x, targets.masked_fill(torch.rand(B, T, generator=generator) < 0.3, IGNORED)


def head_of(scale, softcap, z_loss) -> Full:
    head = Full(V, D, scale=scale, softcap=softcap)
    head.z_loss = z_loss
    return head


def gradients(loss, x, embed):
    used = list(embed.parameters())
    return torch.autograd.grad(loss, [x, *used], allow_unused=True)


def by_formula(x, embed, targets, scale, softcap, z_loss):
    """Loss, and gradients of the loss with the z-loss, in float64."""
    z = embed.narrowed(x) @ embed.output.T
    z = z if embed.output_bias is None else z + embed.output_bias
    z = z * (scale or 1.0)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_z, valid = z.exp().sum(-1).log(), targets != IGNORED
    nats = (log_z - z.gather(-1, targets.clamp(min=0)[..., None])[..., 0])[valid].sum()
    return nats, gradients(nats + z_loss * (log_z[valid] ** 2).sum(), x, embed)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize(
    ("scale", "softcap", "z_loss"), [(None, None, 0.0), (0.5, None, 0.1), (None, 3.0, 0.0), (0.5, 3.0, 0.1)]
)
def test_loss_and_gradients_by_formula(monkeypatch, embed, rows, scale, softcap, z_loss):
    """In chunks of one token, of 7, and in one piece, which is the path of small vocabularies."""
    monkeypatch.setattr(cross_entropy, "CHUNK", rows * V)
    x, targets = data()
    x.requires_grad_()
    nats = head_of(scale, softcap, z_loss).nats(x, embed, targets)
    found = gradients(3.0 * nats, x, embed)
    _, whole = by_formula(x, embed, targets, scale, softcap, z_loss)
    x = x.detach().double().requires_grad_()
    expected, wanted = by_formula(x, embed.double(), targets, scale, softcap, z_loss)
    assert_close(nats.double(), expected, rtol=1e-6, atol=0)
    for g, w, low in zip(found, wanted, whole, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            # Wider only where whole logits in float32 are themselves as far from the truth.
            rounding = 3.0 * float((low - w).abs().max())
            assert_close(g.double(), 3.0 * w, rtol=1e-5, atol=max(1e-5, 1.5 * rounding))


def test_under_autocast_as_near_to_the_truth_as_whole_logits(monkeypatch, embed):
    x, targets = data()
    _, truth = by_formula(x.clone().requires_grad_(), embed, targets, 0.5, 3.0, 0.1)
    errors = []
    for rows in (7, 1000):
        monkeypatch.setattr(cross_entropy, "CHUNK", rows * V)
        x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            nats = head_of(0.5, 3.0, 0.1).nats(x, embed, targets)
        assert nats.dtype == torch.float32
        found = gradients(nats, x, embed)
        pairs = [(g, w) for g, w in zip(found, truth, strict=True) if w is not None]
        assert all(g.dtype == torch.float32 for g, _ in pairs)
        errors.append([((g - w).norm() / w.norm()).item() for g, w in pairs])
    for chunked, whole in zip(*errors, strict=True):
        assert chunked < max(1.5 * whole, 1e-6) < 0.05


class Largest(TorchDispatchMode):
    """Notes the most numbers that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("trains", [True, False])
def test_logits_are_never_whole(monkeypatch, trains):
    monkeypatch.setattr(cross_entropy, "CHUNK", 20 * V)
    embed, (x, targets) = EMBEDDINGS["tied"](), data()
    with Largest() as largest, torch.set_grad_enabled(trains):
        nats = head_of(None, None, 1e-4).nats(x, embed, targets)
        if trains:
            nats.backward()
    assert largest.numbers == max(20 * V, V * D)
    expected = nn.functional.cross_entropy(
        (x @ embed.output.T).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    assert_close(nats, expected)


def test_a_step_with_and_without_chunks(monkeypatch, nano):
    """A whole model with a tied table, whose gradient has two parts, over two micro-batches."""
    tokens = torch.randint(512, (2, 4, 65), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (2**25, 512 * 50):
        monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
        decoder = nano("embed=tied", "head=softcap", gain=4)
        for rows in tokens:
            decoder(rows[:, :-1], targets_BT=rows[:, 1:]).backward()
        found.append([p.grad for p in decoder.parameters()])
    for ours, whole in zip(*found, strict=True):
        assert_close(ours, whole, rtol=1e-4, atol=1e-5)


def test_z_loss_moves_the_gradient_and_not_the_loss(nano):
    decoder, tokens = nano(gain=4), torch.arange(64)[None]
    losses = []
    for weight in (0.0, 1e-2):
        decoder.head.z_loss = weight
        losses.append(decoder(tokens, targets_BT=tokens))
    without, with_z = (torch.autograd.grad(loss, list(decoder.parameters())) for loss in losses)
    assert torch.equal(losses[0], losses[1])
    log_z = decoder(tokens).logsumexp(-1)
    expected = torch.autograd.grad(1e-2 * log_z.square().sum(), list(decoder.parameters()))
    for a, b, z in itertools.zip_longest(without, with_z, expected):
        assert_close(b - a, z, rtol=1e-3, atol=1e-4)
