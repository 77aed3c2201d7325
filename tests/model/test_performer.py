"""Linear attention against its own sums over all pairs and the softmax that its features stand for."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from scantling.model.accounting import forward_flops_per_token
from scantling.model.cache import Placement
from scantling.model.performer import Performer, causal_sums, orthogonal_features
from scantling.model.pos import unrotated
from scantling.model.scores import Scores

B, H, T, E, M = 2, 3, 150, 8, 16  # two whole chunks and a part of one


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_chunks_add_up_to_the_sum_over_all_earlier_keys():
    q, k, v = normal(B, H, T, M).exp(), normal(B, H, T, M, seed=1).exp(), normal(B, H, T, E, seed=2)
    weights = (q @ k.mT).tril()
    expected = weights @ v / weights.sum(-1, keepdim=True)
    assert_close(causal_sums(q, k, v, None)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_features", [8192, 512])
def test_features_stand_for_the_softmax(n_features):
    """φ(q)·φ(k) is exp(q·k/√E) on average (Choromanski et al. 2020, lemma 1); the error falls with 1/√M."""
    torch.manual_seed(0)  # of the linear layers
    layer = Performer(H * E, H, E, 0, n_features=n_features, bias=False)
    x = 0.5 * normal(B, T, H * E)  # far apart, queries and keys need many more features
    placement = Placement.whole(torch.zeros(B, T, dtype=torch.long))
    layer.out = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        ours = layer(x, unrotated, Scores(bias=None, n_heads=H, placement=placement), None)
        q, k, v = (y.unflatten(-1, (H, E)).transpose(1, 2) for y in layer.qkv(x).chunk(3, -1))
        theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = (ours - theirs.transpose(1, 2).flatten(2)).square().mean().sqrt() / theirs.std()
    assert error < 2.0 / n_features**0.5


def test_features_are_orthogonal_and_as_long_as_normal_ones():
    rows = orthogonal_features(64, 16, seed=0)
    for block in rows.split(16):
        gram = block @ block.T
        assert_close(gram, torch.diag(gram.diag()), rtol=0, atol=1e-4)
    # |w|² of 16 standard normals has mean 16 and variance 32
    assert rows.square().sum(1).mean().item() == pytest.approx(16, abs=4 * (32 / 64) ** 0.5)
    assert_close(rows, orthogonal_features(64, 16, seed=0), rtol=0, atol=0)


@pytest.mark.parametrize("n_tokens", [1, 16, 128])
@torch.no_grad()
def test_flops_of_texts_shorter_than_a_chunk(nano, n_tokens):
    decoder = nano("attn=performer", "model.seq_len=128")
    with FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, n_tokens, dtype=torch.long))
    assert n_tokens * forward_flops_per_token(decoder, n_tokens, n_tokens) == counter.get_total_flops()


def test_a_position_that_adds_to_scores_is_refused(nano):
    with pytest.raises(ValueError, match=r"no scores .* use pos=rope"):
        nano("attn=performer", "pos=alibi")
