"""Attention against torch.nn.MultiheadAttention and `transformers`."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from scantling.model.attn import Attention, NoQKNorm
from scantling.model.cache import Step
from scantling.model.pattern import Full
from scantling.model.pos import RoPE, unrotated
from scantling.model.rope_scaling import unscaled
from scantling.model.scores import Scores

B, T, H, E = 2, 19, 4, 16
D = 48  # H·E is 64: the two must not be taken for each other
POSITIONS = torch.arange(T)[None]
HIDDEN = torch.full((T, T), -torch.inf).triu(1)[None, None]
PLAIN = {
    "qk_norm": NoQKNorm,
    "clip_qkv": None,
    "scale": None,
    "softcap": None,
    "pattern": Full,
    "dropout": 0.0,
}
attention = partial(Attention, layer=0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scores(length: int = T) -> Scores:
    return Scores(bias=None, n_heads=H, step=Step.whole(torch.zeros(B, length)))


def biases(qkv: bool, out: bool) -> dict[str, bool]:
    return {"q_bias": qkv, "k_bias": qkv, "v_bias": qkv, "out_bias": out}


def rotation(d_head: int = E, interleaved: bool = False):
    rope = RoPE(D, H, d_head, theta=10000.0, fraction=1.0, interleaved=interleaved, scaling=unscaled)
    return rope.rotate(POSITIONS)


@torch.no_grad()
def randomised(module: torch.nn.Module, std: float = 0.3):
    for i, p in enumerate(module.parameters()):
        p.copy_(std * normal(*p.shape, seed=i))
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_mha_equals_torchs(bias):
    ours = randomised(attention(64, H, 16, n_kv_heads=H, **biases(bias, bias), **PLAIN))
    theirs = torch.nn.MultiheadAttention(64, H, bias=bias, batch_first=True)
    theirs.in_proj_weight.data.copy_(ours.qkv.weight)
    theirs.out_proj.weight.data.copy_(ours.out.weight)
    if bias:
        theirs.in_proj_bias.data.copy_(torch.cat([ours.q_bias, ours.k_bias, ours.v_bias]))
        theirs.out_proj.bias.data.copy_(ours.out.bias)
    x = normal(B, T, 64)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(T)
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=True)
    assert_close(ours(x, unrotated, scores(), None), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def copy_projections(ours: Attention, theirs: torch.nn.Module):
    """Their separate matrices of queries, keys and values from our one."""
    rows = [heads * ours.d_head for heads in ours.heads]
    for name, weight in zip("qkv", ours.qkv.weight.split(rows), strict=True):
        projection, bias = getattr(theirs, f"{name}_proj"), getattr(ours, f"{name}_bias")
        projection.weight.copy_(weight)
        assert (projection.bias is None) is (bias is None)
        if bias is not None:
            projection.bias.copy_(bias)
    theirs.o_proj.load_state_dict(ours.out.state_dict())


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
    ours = randomised(attention(D, H, E, n_kv_heads=n_kv_heads, **biases(bias, bias), **PLAIN))
    theirs = LlamaAttention(config, layer_idx=0)
    copy_projections(ours, theirs)
    x = normal(B, T, D)
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, POSITIONS), HIDDEN)
    assert_close(ours(x, rotation(), scores(), None), expected, rtol=1e-4, atol=1e-5)


def test_dropout_falls_on_the_weights_and_only_in_training():
    """With all values 1, weights that lost a share p and gained 1/(1-p) still add up to 1 on average."""
    half = attention(H * E, H, E, n_kv_heads=H, **biases(True, True), **PLAIN | {"dropout": 0.5})
    half.qkv.weight.data.zero_()
    half.v_bias.data.fill_(1.0)
    half.out = torch.nn.Identity()
    torch.manual_seed(0)
    for length in (64, 256):  # written out, and by torch's kernel
        x, shared = normal(B, length, H * E).repeat(4, 1, 1), scores(length)
        assert_close(half.eval()(x, unrotated, shared, None), torch.ones(8, length, H * E))
        sums = half.train()(x, unrotated, shared, None)[..., ::E]  # one channel a head
        assert_close(sums.mean(), torch.tensor(1.0), rtol=0, atol=0.05)
        assert sums[:, 0].unique().tolist() == [0.0, 2.0]  # a single key: kept and doubled, or lost


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_are_refused(n_kv_heads):
    with pytest.raises(ValueError, match=rf"n_kv_heads={n_kv_heads} .* use one of \[1, 2, 4\]"):
        attention(D, H, E, n_kv_heads=n_kv_heads, **biases(False, False), **PLAIN)


def test_mixing_flops_by_hand():
    """2 products of 2·E FLOPs for each of the H query heads and each key, however many key/value heads there are."""
    for n_kv_heads in (4, 1):
        ours = attention(D, H, E, n_kv_heads=n_kv_heads, **biases(False, False), **PLAIN)
        assert ours.mixing_flops(100.0) == 100 * H * (2 * E + 2 * E)
