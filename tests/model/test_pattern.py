"""Patterns against masks written out from the papers' words, one query and key at a time."""

import pytest
import torch
from transformers import Gemma2Config, Gemma3TextConfig
from transformers.masking_utils import sliding_window_causal_mask_function

from scantling.model.pattern import BlockGlobal, Dilated, Full, Random, Sinks, Sliding, local_global

T = 60


def seen_by(pattern, length: int = T) -> torch.Tensor:
    at = torch.arange(length)
    return (at <= at[:, None]) & pattern.sees(at[:, None], at)


def dilated(t, s):
    return s in [t - i * 3 for i in range(5)]


def block_global(t, s):
    return t - s in range(7) or s in range(0, T, 10) or t in range(0, T, 10)


CASES = {
    "full": (Full(0), lambda t, s: True),
    "sliding": (Sliding(0, window=7), lambda t, s: s in range(t - 6, t + 1)),
    "itself": (Sliding(0, window=1), lambda t, s: s == t),
    "sinks": (Sinks(0, window=7, n_sinks=4), lambda t, s: s in range(4) or s in range(t - 6, t + 1)),
    "dilated": (Dilated(0, window=5, dilation=3), dilated),
    "block_global": (BlockGlobal(0, window=7, every=10), block_global),
    "random_of_none": (
        Random(0, block=4, n_local=2, n_global=1, n_random=0),
        lambda t, s: s // 4 in (t // 4, t // 4 - 1, 0),
    ),
}
over_cases = pytest.mark.parametrize(("pattern", "rule"), CASES.values(), ids=CASES.keys())


@over_cases
def test_pattern_equals_its_description(pattern, rule):
    expected = torch.tensor([[s <= t and rule(t, s) for s in range(T)] for t in range(T)])
    assert torch.equal(seen_by(pattern), expected)
    assert pattern.is_full is bool(expected.sum() == T * (T + 1) / 2)


@over_cases
@pytest.mark.parametrize("seq_len", [1, 5, 33, T])
def test_mean_keys_is_a_count(pattern, rule, seq_len):
    count = sum(bool(rule(t, s)) for t in range(seq_len) for s in range(t + 1))
    assert pattern.mean_keys(seq_len) == pytest.approx(count / seq_len, rel=1e-12)


def test_mean_keys_counts_long_texts_in_pieces():
    """More than 2^24 pairs: 5 sinks and, from the 12th token on, 7 more."""
    n = 5000
    pattern = Sinks(0, window=7, n_sinks=5)
    assert pattern.mean_keys(n) == sum(min(t + 1, 12) for t in range(n)) / n


@over_cases
def test_nothing_beyond_reach_is_seen_but_the_first(pattern, rule):
    if pattern.reach is None:
        return
    t, s = torch.arange(T)[:, None], torch.arange(T)
    seen = seen_by(pattern)
    assert not seen[(t - s >= pattern.reach) & (s >= pattern.n_first)].any()
    assert seen[(s <= t) & (t - s < pattern.reach)].all()
    assert seen[(s <= t) & (s < pattern.n_first)].all()


@pytest.mark.parametrize("window", [1, 8, 200])
def test_sliding_window_is_mistrals(window):
    """Its window counts the token itself."""
    at = torch.arange(T)
    zero = torch.tensor(0)
    expected = sliding_window_causal_mask_function(window)(zero, zero, at[:, None], at)
    assert torch.equal(seen_by(Sliding(0, window=window)), expected)


@pytest.mark.parametrize(
    ("refused", "least"),
    [
        (lambda: Sliding(0, window=0), 1),
        (lambda: Sinks(0, window=0, n_sinks=4), 1),
        (lambda: Sinks(0, window=4, n_sinks=-1), 0),
        (lambda: Dilated(0, window=4, dilation=0), 1),
        (lambda: BlockGlobal(0, window=4, every=0), 1),
        (lambda: Random(0, block=4, n_local=0, n_global=1, n_random=1), 1),
        (lambda: Random(0, block=4, n_local=1, n_global=1, n_random=-1), 0),
    ],
)
def test_what_a_query_sees_is_counted(refused, least):
    """A query sees at least itself."""
    with pytest.raises(ValueError, match=f"must be a whole number, at least {least}"):
        refused()


@pytest.mark.parametrize("every", [0, -2])
def test_a_period_of_layers_is_a_whole_number(every):
    with pytest.raises(ValueError, match=f"attn.pattern.every={every} must be a whole number, at least 1"):
        local_global(0, window=4, every=every)


@pytest.mark.parametrize(("config", "every"), [(Gemma2Config, 2), (Gemma3TextConfig, 6)])
def test_local_and_global_layers_are_gemmas(config, every):
    kinds = {Full: "full_attention", Sliding: "sliding_attention"}
    layer_types = config(num_hidden_layers=12).layer_types
    assert [kinds[type(local_global(i, window=8, every=every))] for i in range(12)] == layer_types


def blocks_seen(pattern: Random, n_blocks: int) -> list[set[int]]:
    """Of each block of queries, the blocks of keys; every query of a block must see alike."""
    seen, size = seen_by(pattern, n_blocks * pattern.block), pattern.block
    rows = []
    for own in range(n_blocks):
        last = seen[(own + 1) * size - 1].view(n_blocks, size)
        assert (last.all(1) == last.any(1)).all()
        for t in range(own * size, (own + 1) * size):
            assert torch.equal(seen[t, : t + 1], last.flatten()[: t + 1])
        rows.append(set(last[:, 0].nonzero().flatten().tolist()))
    return rows


def test_random_blocks_are_seen_whole_and_as_many_as_were_drawn():
    with_two = Random(3, block=4, n_local=2, n_global=1, n_random=2)
    for own, blocks in enumerate(blocks_seen(with_two, 40)):
        fixed = {own, max(own - 1, 0), 0}
        assert fixed <= blocks <= set(range(own + 1))
        assert len(blocks - fixed) <= 2
    total = sum(len(blocks) for blocks in blocks_seen(with_two, 40))
    assert total > 40 * 4  # 5 at most; a draw now and then falls on a block that is seen anyway


def test_random_blocks_are_even_over_the_past_and_differ_between_layers():
    """Drawn blocks, as shares of the past, have the mean 1/2 and the variance 1/12 of a uniform number."""
    shares, agree = [], 0
    for layer in range(24):
        pattern = Random(layer, block=1, n_local=1, n_global=0, n_random=1)
        other = Random(layer + 1, block=1, n_local=1, n_global=0, n_random=1)
        own, key = torch.arange(100, 400)[:, None], torch.arange(400)
        drawn, drawn_next = (p.sees(own, key).float().argmax(1) for p in (pattern, other))
        shares.append((drawn + 0.5) / (own[:, 0] + 1))
        agree += int((drawn == drawn_next).sum())
    shares = torch.cat(shares)
    error = len(shares) ** -0.5
    assert abs(shares.mean() - 1 / 2) < 4 * error * 12**-0.5
    assert abs(shares.var() - 1 / 12) < 4 * error * 180**-0.5  # the variance of (U - 1/2)²
    assert agree < 0.05 * len(shares)
