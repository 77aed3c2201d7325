"""Attention against torch.nn.MultiheadAttention and `transformers`."""

from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.olmo.modeling_olmo import OlmoAttention
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.stablelm.modeling_stablelm import StableLmAttention, StableLmRotaryEmbedding

from scantling.model.attn import (
    Attention,
    EachHeadNorm,
    FullWidthNorm,
    LatentAttention,
    NoQKNorm,
    PerHeadNorm,
)
from scantling.model.cache import Buffer, KVCache, Placement
from scantling.model.norm import LayerNorm, RMSNorm
from scantling.model.pattern import Full, Sliding
from scantling.model.pos import RoPE, unrotated
from scantling.model.rope_scaling import unscaled
from scantling.model.scores import Scores

B, T, H, E = 2, 19, 4, 16
D = 48  # H·E is 64: the two must not be taken for each other
POSITIONS = torch.arange(T)[None]
HIDDEN = torch.full((T, T), -torch.inf).triu(1)[None, None]
PLAIN: dict[str, Any] = {
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
    return Scores(bias=None, n_heads=H, placement=Placement.whole(torch.zeros(B, length)))


def biases(qkv: bool, out: bool) -> dict[str, bool]:
    return {"q_bias": qkv, "k_bias": qkv, "v_bias": qkv, "out_bias": out}


def rope(d_head: int = E, fraction: float = 1.0, interleaved: bool = False) -> RoPE:
    return RoPE(D, H, d_head, theta=10000.0, fraction=fraction, interleaved=interleaved, scaling=unscaled)


Part = TypeVar("Part", bound=torch.nn.Module)


@torch.no_grad()
def randomised(module: Part, std: float = 0.3) -> Part:
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
        parts: list[torch.Tensor] = [
            bias for bias in (ours.q_bias, ours.k_bias, ours.v_bias) if bias is not None
        ]
        theirs.in_proj_bias.data.copy_(torch.cat(parts))
        theirs.out_proj.bias.data.copy_(ours.out.bias)
    x = normal(B, T, 64)
    hidden = torch.nn.Transformer.generate_square_subsequent_mask(T)
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=True)
    assert_close(ours(x, unrotated, scores(), None), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def copy_projections(ours: Attention, theirs: Any):
    """Their separate matrices of queries, keys and values from our one."""
    rows = [heads * ours.d_head for heads in ours.heads]
    for name, weight in zip("qkv", ours.qkv.weight.split(rows), strict=True):
        projection, bias = getattr(theirs, f"{name}_proj"), getattr(ours, f"{name}_bias")
        projection.weight.copy_(weight)
        assert (projection.bias is None) is (bias is None)
        if bias is not None:
            projection.bias.copy_(bias)
    theirs.o_proj.load_state_dict(ours.out.state_dict())


def config_of(kind, **settings):
    shape = {"hidden_size": D, "num_attention_heads": H, "num_key_value_heads": 2, "head_dim": E}
    rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    config = kind(**shape | {"rope_parameters": rope_parameters} | settings)
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_llamas(n_kv_heads, bias):
    config = config_of(LlamaConfig, num_key_value_heads=n_kv_heads, attention_bias=bias)
    ours = randomised(attention(D, H, E, n_kv_heads=n_kv_heads, **biases(bias, bias), **PLAIN))
    theirs = LlamaAttention(config, layer_idx=0)
    copy_projections(ours, theirs)
    x = normal(B, T, D)
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, POSITIONS), HIDDEN)
    assert_close(ours(x, rope().rotate(POSITIONS), scores(), None), expected, rtol=1e-4, atol=1e-5)


rms = partial(RMSNorm, eps=1e-6, unit_offset=False)
no_bias = partial(LayerNorm, eps=1e-5, weight=True, bias=False, unit_offset=False)
RELATIVES = {
    # theirs, its configuration, our settings, whether q, k and v have biases, and the one norm's name
    "qwen2": (Qwen2Attention, Qwen2Config, {}, {}, True, None),
    "gemma2": (
        Gemma2Attention,
        Gemma2Config,
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 9},
        {"softcap": 2.0, "scale": 1 / 3},
        False,
        None,
    ),
    "olmo": (OlmoAttention, OlmoConfig, {"clip_qkv": 0.7}, {"clip_qkv": 0.7}, False, None),
    "mistral": (MistralAttention, MistralConfig, {}, {"pattern": partial(Sliding, window=6)}, False, None),
    "qwen3": (Qwen3Attention, Qwen3Config, {}, {"qk_norm": partial(PerHeadNorm, norm=rms)}, False, "norm"),
    "olmo2": (
        Olmo2Attention,
        Olmo2Config,
        {"rms_norm_eps": 1e-6},
        {"qk_norm": partial(FullWidthNorm, norm=rms)},
        False,
        "norm",
    ),
}


@pytest.mark.parametrize(
    ("kind", "config", "theirs_has", "ours_has", "bias", "norm"), RELATIVES.values(), ids=RELATIVES.keys()
)
def test_attention_equals_its_relatives(kind, config, theirs_has, ours_has, bias, norm):
    config = config_of(config, **theirs_has)
    ours = randomised(attention(D, H, E, n_kv_heads=2, **biases(bias, False), **PLAIN | ours_has))
    theirs = kind(config, layer_idx=0).eval()
    copy_projections(ours, theirs)
    if norm is not None:
        for part in ("q", "k"):
            getattr(theirs, f"{part}_norm").load_state_dict(getattr(ours, f"{part}_norm").norm.state_dict())
    at, zero = torch.arange(T), torch.tensor(0)
    hidden = HIDDEN
    if "pattern" in ours_has:
        seen = sliding_window_causal_mask_function(6)(zero, zero, at[:, None], at)
        hidden = torch.zeros(1, 1, T, T).masked_fill(~seen, -torch.inf)
    x = normal(B, T, D)
    expected, _ = theirs(x, LlamaRotaryEmbedding(config)(x, POSITIONS), hidden)
    assert_close(ours(x, rope().rotate(POSITIONS), scores(), None), expected, rtol=1e-4, atol=1e-5)


def test_a_norm_for_each_head_equals_stablelms():
    config = config_of(
        StableLmConfig,
        hidden_size=H * E,
        qk_layernorm=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    settings: dict[str, Any] = {**PLAIN, "qk_norm": partial(EachHeadNorm, norm=no_bias)}
    ours = randomised(attention(H * E, H, E, n_kv_heads=2, **biases(False, False), **settings))
    theirs = StableLmAttention(config, layer_idx=0).eval()
    copy_projections(ours, theirs)
    theirs.q_layernorm.load_state_dict(ours.q_norm.state_dict())
    theirs.k_layernorm.load_state_dict(ours.k_norm.state_dict())
    x = normal(B, T, H * E)
    angles = StableLmRotaryEmbedding(config)(x, POSITIONS)
    expected, _ = theirs(x, HIDDEN, POSITIONS, position_embeddings=angles)
    rotate = rope(fraction=0.25).rotate(POSITIONS)
    assert_close(ours(x, rotate, scores(), None), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("q_rank", [None, 24])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@torch.no_grad()
def test_latent_attention_equals_deepseeks(q_rank, bias, interleaved):
    """At once, and over a cache of latents in pieces, where W_k and W_v move to the other side."""
    config = config_of(
        DeepseekV3Config,
        num_key_value_heads=H,
        head_dim=8,
        q_lora_rank=q_rank,
        kv_lora_rank=20,
        qk_nope_head_dim=E,
        qk_rope_head_dim=8,
        v_head_dim=12,
        attention_bias=bias,
        rope_interleave=interleaved,
    )
    ours = randomised(
        LatentAttention(
            D,
            H,
            E,
            0,
            q_rank=q_rank,
            kv_rank=20,
            d_rotated=8,
            d_value=12,
            bias=bias,
            norm=rms,
            scale=None,
            softcap=None,
            pattern=Full,
            dropout=0.0,
        )
    )
    theirs = DeepseekV3Attention(config, layer_idx=0)
    names = {
        "kv_down": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_up": "kv_b_proj",
        "out": "o_proj",
    }
    names |= (
        {"q": "q_proj"} if q_rank is None else {"q.0": "q_a_proj", "q.1": "q_a_layernorm", "q.2": "q_b_proj"}
    )
    for mine, yours in names.items():
        theirs.get_submodule(yours).load_state_dict(ours.get_submodule(mine).state_dict())
    x, turns = normal(B, T, D), rope(8, interleaved=interleaved)
    expected, _ = theirs(x, DeepseekV3RotaryEmbedding(config)(x, POSITIONS), HIDDEN)
    assert_close(ours(x, turns.rotate(POSITIONS), scores(), None), expected, rtol=1e-4, atol=1e-5)

    layer = ours.new_cache(T, Buffer)
    cache, parts = KVCache([layer], T), []
    for piece in x.split([7, 1, 5, 1, 5], dim=1):
        placement = cache.advance(piece[..., 0], None)
        shared = Scores(bias=None, n_heads=H, placement=placement)
        parts.append(ours(piece, turns.rotate(placement.positions_BT), shared, layer))
    assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    assert layer.nbytes == 4 * B * ours.cached_numbers(T) == 4 * B * T * (20 + 8)


def test_dropout_falls_on_the_weights_and_only_in_training():
    """With all values 1, weights that lost a share p and gained 1/(1-p) still add up to 1 on average."""
    settings: dict[str, Any] = {**PLAIN, "dropout": 0.5}
    half = attention(H * E, H, E, n_kv_heads=H, **biases(True, True), **settings)
    half.qkv.weight.data.zero_()
    assert half.v_bias is not None
    half.v_bias.data.fill_(1.0)
    half.out = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
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
    """2 products of 2·E FLOPs for each of the H query heads and each key, however many key/value heads there
    are."""
    for n_kv_heads in (4, 1):
        ours = attention(D, H, E, n_kv_heads=n_kv_heads, **biases(False, False), **PLAIN)
        assert ours.mixing_flops(100.0) == 100 * H * (2 * E + 2 * E)
