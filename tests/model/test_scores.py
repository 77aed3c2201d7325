"""Every kernel against the softmax written out over one query at a time."""

import itertools
from typing import get_args

import jaxtyping
import pytest
import rounding
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from scantling.model import scores as module
from scantling.model.cache import Buffer, KVCache, LayerCache, Placement
from scantling.model.kernels import Kernel
from scantling.model.pattern import BlockGlobal, Dilated, Full, Random, Sinks, Sliding
from scantling.model.pos import ALiBi
from scantling.model.scores import Scores

B, T, H, E = 2, 19, 4, 16
LONG = 70  # above 64 keys torch's kernel takes over on a CPU
SCALE = 0.4
PATTERNS = {
    "full": Full(0),
    "sliding": Sliding(0, window=6),
    "sinks": Sinks(0, window=6, n_sinks=2),
    "dilated": Dilated(0, window=4, dilation=3),
    "block_global": BlockGlobal(0, window=4, every=5),
    "random": Random(1, block=4, n_local=1, n_global=1, n_random=1),
}
over_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
over_shapes_of_scores = pytest.mark.parametrize(
    ("biased", "softcap"), [(False, None), (True, None), (False, 2.0), (True, 2.0)], ids=str
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_heads_of_keys_are_repeated_where_no_kernel_of_a_gpu_shares_them(monkeypatch):
    """Flash alone does, without masks and in half precision; torch's formula would form all scores."""
    asked = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, *, enable_gqa, **_: asked.append((k.shape[1], enable_gqa)) or q,
    )
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (torch.empty(B, heads, T, E, device="cuda", dtype=dtype) for heads in (4, 2))
            placement = Placement.whole(torch.zeros(B, T, dtype=torch.int64))
            kernels = Scores(bias=None, n_heads=H, placement=placement)
            kernels.attend(q, k, k, keys=None, pattern=Full(0), scale=1.0, softcap=None, dropout=0.0)
    assert asked == [(4, False), (2, True)]


def bias(head, query, key):
    """Falls with the square of the distance: a slip in positions would cancel out of a linear one."""
    return -0.02 * (head + 1) * (query - key) ** 2


def formula(q, k, v, pattern, biased, softcap):
    """The last queries of a text over all its keys: softmax(cap(scale·q·k) + bias) over keys seen."""
    B, H, T, _ = q.shape
    groups, start = H // k.shape[1], k.shape[2] - T
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    out = torch.empty(B, H, T, v.shape[-1])
    for t in range(T):
        here = start + t
        seen = torch.arange(here + 1)
        seen = seen[pattern.sees(torch.tensor(here), seen)]
        score = SCALE * torch.einsum("bhe,bhse->bhs", q[:, :, t], k[:, :, seen])
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if biased:
            distance = here - seen
            score = score - 0.02 * torch.arange(1, H + 1)[:, None] * distance**2
        out[:, :, t] = torch.einsum("bhs,bhse->bhe", score.softmax(-1), v[:, :, seen])
    return out


def inputs(n_kv_heads: int, length: int):
    return normal(B, H, length, E), *(normal(B, n_kv_heads, length, E, seed=seed) for seed in (1, 2))


def scores_of(biased: bool, placement: Placement) -> Scores:
    return Scores(bias=bias if biased else None, n_heads=H, placement=placement)


@over_shapes_of_scores
@pytest.mark.parametrize(
    ("pattern", "n_kv_heads"), [*((name, 2) for name in PATTERNS), ("full", 4), ("sinks", 1)], ids=str
)
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_every_kernel_equals_the_formula(monkeypatch, pattern, n_kv_heads, biased, softcap):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # flex cannot trace the checks of shapes
    pattern = PATTERNS[pattern]
    monkeypatch.setattr(module, "compiled_flex_attention", lambda: flex_attention)
    for length, kernel in itertools.product((T, LONG), get_args(Kernel)):
        if softcap is not None and kernel.startswith("sdpa"):
            continue  # which caps no scores
        monkeypatch.setattr(module, "choose_kernel", lambda *_, kernel=kernel, **__: kernel)
        scores = scores_of(biased, Placement.whole(torch.zeros(B, length)))
        q, k, v = inputs(n_kv_heads, length)
        ours = scores.attend(q, k, v, keys=None, pattern=pattern, scale=SCALE, softcap=softcap, dropout=0.0)
        t, s = torch.arange(length)[:, None], torch.arange(length)
        k, v = (x.repeat_interleave(H // n_kv_heads, dim=1) for x in (k, v))
        rounding.assert_within(
            ours,
            *rounding.attention(
                q,
                k,
                v,
                (s <= t) & pattern.sees(t, s),
                scale=SCALE,
                softcap=softcap,
                bias=bias(torch.arange(H)[:, None, None], t, s) if biased else None,
            ),
        )


@over_patterns
@over_shapes_of_scores
@pytest.mark.parametrize("pieces", [[12, 9], [40, 30], [40, 1, 1, 1], [1] * 9, [66, 1]], ids=str)
def test_cached_keys_give_the_formula_too(pattern, biased, softcap, pieces):
    q, k, v = inputs(2, sum(pieces))
    layer = LayerCache(sum(pieces), pattern, Buffer)
    cache, parts = KVCache([layer], sum(pieces)), []
    for of_q, of_k, of_v in zip(*(x.split(pieces, dim=2) for x in (q, k, v)), strict=True):
        placement = cache.advance(torch.zeros(B, of_q.shape[2]), None)
        all_k, all_v, keys = layer.append(of_k.transpose(1, 2), of_v.transpose(1, 2), placement)
        scores = scores_of(biased, placement)
        settings = {"keys": keys, "pattern": pattern, "scale": SCALE, "softcap": softcap, "dropout": 0.0}
        parts.append(scores.attend(of_q, all_k.transpose(1, 2), all_v.transpose(1, 2), **settings))
    assert_close(torch.cat(parts, 2), formula(q, k, v, pattern, biased, softcap), rtol=1e-4, atol=1e-5)


@over_patterns
def test_rows_of_different_length_see_their_own_keys(pattern):
    """Prompts of 9 and 3 tokens, padded on the right, then 30 more, one by one and a few at once."""
    prompt, pieces = torch.tensor([9, 3]), [1, 1, 1, 4, 1, 20, 1, 1]
    q, k, v = inputs(2, 39)
    layer = LayerCache(39, pattern, Buffer)
    cache, parts, before = KVCache([layer], 39), ([], []), torch.zeros(2, dtype=torch.long)
    for n in [9, *pieces]:
        at = before[:, None] + torch.arange(
            n
        )  # of the shorter prompt, tokens of a later step stand for padding
        of_q, of_k, of_v = (torch.stack([x[row][:, at[row]] for row in range(2)]) for x in (q, k, v))
        placement = cache.advance(at, prompt if not before.any() else None)
        all_k, all_v, keys = layer.append(of_k.transpose(1, 2), of_v.transpose(1, 2), placement)
        settings = {"keys": keys, "pattern": pattern, "scale": SCALE, "softcap": None, "dropout": 0.0}
        out = scores_of(True, placement).attend(
            of_q, all_k.transpose(1, 2), all_v.transpose(1, 2), **settings
        )
        real = prompt if not before.any() else torch.full((2,), n)
        for row in range(2):
            parts[row].append(out[row, :, : real[row]])
        before += real
    for row in range(2):
        length = int(before[row])
        q1, k1, v1 = (x[row : row + 1, :, :length] for x in (q, k, v))
        expected = formula(q1, k1, v1, pattern, True, None)[0]
        assert_close(torch.cat(parts[row], 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [T, LONG, 9 * E])  # a CPU without AMX takes another way up to 8·E
def test_bfloat16_attention_is_near_float32(processor, length):
    q, k, v = inputs(H, length)
    placement = Placement.whole(torch.zeros(B, length))
    low, high = (
        Scores(bias=ALiBi(H * E, H, E).bias, n_heads=H, placement=placement).attend(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            keys=None,
            pattern=Full(0),
            scale=0.25,
            softcap=None,
            dropout=0.0,
        )
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), high, rtol=0, atol=0.03)


def test_layers_of_one_pattern_share_a_mask():
    scores = scores_of(False, Placement.whole(torch.zeros(B, T)))
    assert scores.mask(None, Sliding(0, window=6)) is scores.mask(None, Sliding(3, window=6))
    one, other = (Random(layer, block=4, n_local=1, n_global=1, n_random=1) for layer in (0, 1))
    assert not torch.equal(scores.mask(None, one), scores.mask(None, other))


def test_cache_returns_what_was_appended():
    layer = LayerCache(10, Full(0), Buffer)
    cache = KVCache([layer], 10)
    k, v = normal(B, 7, 2, E), normal(B, 7, 2, E, seed=1)
    for new in (slice(0, 4), slice(4, 5), slice(5, 7)):
        placement = cache.advance(k[:, new, 0, 0], None)
        all_k, all_v, keys = layer.append(k[:, new], v[:, new], placement)
        assert_close((all_k, all_v), (k[:, : new.stop], v[:, : new.stop]), rtol=0, atol=0)
        assert keys.positions().tolist() == [list(range(new.stop))]
    with pytest.raises(AssertionError, match="full"):
        layer.append(k[:, :4], v[:, :4], cache.advance(k[:, :4, 0, 0], None))


@pytest.mark.parametrize("slip", ["scale", "a key too many", "a key too few"])
def test_rounding_explains_no_slip(slip):
    """The bound that kernels are held to is no wider than it must be."""
    q, k, v = inputs(H, LONG)
    t, s = torch.arange(LONG)[:, None], torch.arange(LONG)
    how = {"softcap": None, "bias": None}
    exact, bound = rounding.attention(q, k, v, s <= t, scale=SCALE, **how)
    seen = {"scale": s <= t, "a key too many": s <= t + 1, "a key too few": (s <= t) & (s != 1)}[slip]
    scale = SCALE * 1.001 if slip == "scale" else SCALE
    wrong, _ = rounding.attention(q, k, v, seen | (s == 0), scale=scale, **how)
    rounding.assert_within(exact.float(), exact, bound)
    with pytest.raises(AssertionError, match="times what rounding explains"):
        rounding.assert_within(wrong, exact, bound)
