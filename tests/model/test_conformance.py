"""What every option of every part must do, one at a time in the `nano` model: a new yaml is tested by being there."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from scantling.accounting import forward_flops_per_token
from scantling.model.cache import KVCache

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = [
    f"{group}={path.stem}"
    for group in ("norm", "pos", "attn", "ffn", "block", "embed")
    for path in sorted((CONF / group).glob("*.yaml"))
]
T = 64
TOKENS = torch.randint(512, (3, T), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.parametrize("option", OPTIONS)


@pytest.fixture
def lively(nano, option):
    """nano with the option and biases, weights large enough for attention to be far from uniform."""
    return nano(option, "model.bias=true", gain=8).eval()


@torch.no_grad()
def test_a_future_token_never_changes_past_logits(lively):
    logits = lively(TOKENS)
    for t in (1, 20, T - 1):
        changed = TOKENS.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 512
        after = lively(changed)
        assert_close(after[:, :t], logits[:, :t], rtol=0, atol=1e-5)
        assert (after[:, t:] - logits[:, t:]).abs().amax((0, 2)).min() > 1e-2  # every later one does change


@torch.no_grad()
def test_a_past_token_changes_all_later_logits(lively):
    """Nothing is attended to only within a layer's own position."""
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 512
    assert (lively(changed) - lively(TOKENS))[:, 3:].abs().amax((0, 2)).min() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize("splits", [[20], [1] * 20, [12] + [1] * 8, [5, 1, 7, 1, 6]], ids=len)
def test_cached_logits_equal_uncached(lively, splits):
    tokens = TOKENS[:, :20]
    cache = KVCache(len(lively.blocks), max_len=24)
    pieces = [lively(piece, cache) for piece in tokens.split(splits, dim=1)]
    assert cache.length == 20
    assert_close(torch.cat(pieces, 1), lively(tokens), rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_batch_equals_its_rows(lively):
    rows = torch.cat([lively(row[None]) for row in TOKENS])
    assert_close(lively(TOKENS), rows, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_shorter_context_gives_the_same_logits(lively):
    assert_close(lively(TOKENS[:, :11]), lively(TOKENS)[:, :11], rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient(nano, option):
    decoder = nano(option, "model.bias=true")
    logits = decoder(TOKENS)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.any(), name


@torch.no_grad()
def test_forward_flops_equal_torchs_count(nano, option):
    """torch counts attention over all T keys, causal or not, and on CPU only by the math kernel's products."""
    decoder = nano(option)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(TOKENS)
    assert TOKENS.numel() * forward_flops_per_token(decoder, T) == counter.get_total_flops()


@torch.no_grad()
def test_bfloat16_autocast_stays_near_float32(lively):
    with torch.autocast("cpu", torch.bfloat16):
        low = lively(TOKENS)
    high = lively(TOKENS)
    assert (low.float() - high).std() < 0.03 * high.std()


def test_a_seed_repeats_and_another_differs(nano, option):
    first, again, other = (dict(nano(option, seed=s).named_parameters()) for s in (1, 1, 2))
    for name, p in first.items():
        assert torch.equal(p, again[name]), name
        assert p.ndim < 2 or not torch.equal(p, other[name]), name


def test_what_two_models_share_starts_equal(nano, option):
    """Runs that differ in one part are paired: each tensor of one name and shape has the same values in both."""
    default, ours = (dict(nano(*overrides).named_parameters()) for overrides in ((), (option,)))
    shared = [name for name in default.keys() & ours.keys() if default[name].shape == ours[name].shape]
    assert {"embed.tokens.weight", "blocks.0.attn.out.weight", "blocks.1.attn.out.weight"} <= set(shared)
    for name in shared:
        assert torch.equal(default[name], ours[name]), name
