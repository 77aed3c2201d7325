"""Attention against torch.nn.MultiheadAttention, `transformers`' Llama and a softmax written out."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from scantling.model.attn import Attention, CausalScores
from scantling.model.cache import LayerCache
from scantling.model.pos import ALiBi, RoPE, unrotated

B, T, H, E = 2, 19, 4, 16
D = 48  # H·E is 64: the two must not be taken for each other
CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_scores(length: int = T, start: int = 0, bias=None) -> CausalScores:
    return CausalScores(bias=bias, n_heads=H, start=start, length=length, device=CPU)


def random_attention(d_model: int, d_head: int, n_kv_heads: int, bias: bool) -> Attention:
    attention = Attention(d_model, H, d_head, n_kv_heads=n_kv_heads, bias=bias, dropout=0.0)
    for i, p in enumerate(attention.parameters()):
        p.data.copy_(0.3 * normal(*p.shape, seed=i))
    return attention


@pytest.mark.parametrize("bias", [True, False])
def test_mha_equals_torchs(bias):
    ours = random_attention(64, 16, n_kv_heads=H, bias=bias)
    theirs = torch.nn.MultiheadAttention(64, H, bias=bias, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.out_proj.weight.data.copy_(ours.out.weight)
    if bias:
        theirs.in_proj_bias.data.copy_(ours.qkv.bias)
        theirs.out_proj.bias.data.copy_(ours.out.bias)
    x = normal(B, T, 64)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(T)
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=True)
    assert_close(ours(x, unrotated, plain_scores(), None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_llamas(n_kv_heads, bias):
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=H,
        num_key_value_heads=n_kv_heads,
        head_dim=E,
        attention_bias=bias,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._attn_implementation = "eager"
    ours, theirs = random_attention(D, E, n_kv_heads, bias), LlamaAttention(config, layer_idx=0)
    projections = (theirs.q_proj, theirs.k_proj, theirs.v_proj)
    rows = [H * E, n_kv_heads * E, n_kv_heads * E]
    for projection, weight in zip(projections, ours.qkv.weight.split(rows), strict=True):
        projection.weight.data.copy_(weight)
    theirs.o_proj.weight.data.copy_(ours.out.weight)
    if bias:
        for projection, b in zip(projections, ours.qkv.bias.split(rows), strict=True):
            projection.bias.data.copy_(b)
        theirs.o_proj.bias.data.copy_(ours.out.bias)

    x, positions = normal(B, T, D), torch.arange(T)
    hidden = torch.full((T, T), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, positions[None]), hidden)
    rotate = RoPE(D, H, E, theta=10000.0).rotate(positions)
    assert_close(ours(x, rotate, plain_scores(), None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
def test_every_kernel_equals_the_formula(n_kv_heads, start, biased):
    """Query t stands at start + t; its weights are softmax(q·k/√E + bias) over keys 0 … start + t.

    The bias falls with the square of the distance: a slip in positions would cancel out of a linear one.
    """

    def bias(head, query, key):
        return -0.02 * (head + 1) * (query - key) ** 2

    scores = plain_scores(start=start, bias=bias if biased else None)
    q = normal(B, H, T, E)
    k, v = (normal(B, n_kv_heads, start + T, E, seed=seed) for seed in (1, 2))

    keys, values = (x.repeat_interleave(H // n_kv_heads, dim=1) for x in (k, v))
    expected = torch.empty(B, H, T, E)
    for t in range(T):
        upto = start + t + 1
        score = torch.einsum("bhe,bhse->bhs", q[:, :, t], keys[:, :, :upto]) / E**0.5
        if biased:
            score = score - 0.02 * torch.arange(1, H + 1)[:, None] * torch.arange(upto - 1, -1, -1) ** 2
        expected[:, :, t] = torch.einsum("bhs,bhse->bhe", score.softmax(-1), values[:, :, :upto])

    assert_close(scores.dense(q, k, v, 0.0), expected, rtol=1e-4, atol=1e-5)
    assert_close(scores.flex(q, k, v), expected, rtol=1e-4, atol=1e-5)
    assert_close(scores.written_out(q, k, v, 0.0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("length", [T, 9 * E])  # a CPU without AMX takes another way up to 8·E
def test_bfloat16_attention_is_near_float32(monkeypatch, amx, length):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    q, k, v = (normal(B, H, length, E, seed=seed) for seed in range(3))
    scores = plain_scores(length, bias=ALiBi(H * E, H, E).bias)
    out = scores.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), scores.attend(q, k, v, 0.0), rtol=0, atol=0.03)


def test_dropout_falls_on_the_weights_and_only_in_training():
    """With all values 1, weights that lost a share p and gained 1/(1-p) still add up to 1 on average."""
    attention = Attention(H * E, H, E, n_kv_heads=H, bias=True, dropout=0.5)
    attention.qkv.weight.data.zero_()
    attention.qkv.bias.data.copy_(torch.cat([torch.zeros(2 * H * E), torch.ones(H * E)]))
    attention.out = torch.nn.Identity()
    torch.manual_seed(0)
    length = 256
    x, scores = normal(8, length, H * E), plain_scores(length)
    assert_close(attention.eval()(x, unrotated, scores, None), torch.ones(8, length, H * E))
    sums = attention.train()(x, unrotated, scores, None)[..., ::E]  # one channel a head
    assert_close(sums.mean(), torch.tensor(1.0), rtol=0, atol=0.05)
    assert sums[:, 0].unique().tolist() == [0.0, 2.0]  # a single key: kept and doubled, or lost


def test_cache_returns_what_was_appended():
    cache = LayerCache(max_len=10)
    k, v = normal(B, 7, 2, E), normal(B, 7, 2, E, seed=1)
    for new in (slice(0, 4), slice(4, 5), slice(5, 7)):
        all_k, all_v = cache.append(k[:, new], v[:, new])
        assert_close((all_k, all_v), (k[:, : new.stop], v[:, : new.stop]), rtol=0, atol=0)
    with pytest.raises(AssertionError, match="full"):
        cache.append(k[:, :4], v[:, :4])


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_are_refused(n_kv_heads):
    with pytest.raises(ValueError, match=rf"n_kv_heads={n_kv_heads} .* use one of \[1, 2, 4\]"):
        Attention(D, H, E, n_kv_heads=n_kv_heads, bias=False, dropout=0.0)


def test_mixing_flops_by_hand():
    """2 products of 2·E FLOPs for each of the H query heads and each key, however many key/value heads there are."""
    for n_kv_heads in (4, 1):
        attention = Attention(D, H, E, n_kv_heads=n_kv_heads, bias=False, dropout=0.0)
        assert attention.mixing_flops(100.0) == 100 * H * (2 * E + 2 * E)
