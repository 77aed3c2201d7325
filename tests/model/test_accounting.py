"""Counts of parameters, FLOPs and bytes against published numbers, hand formulas and torch."""

from functools import cache
from pathlib import Path

import pytest
import torch

from scantling.config.composition import PARTS
from scantling.config.decoder import build_decoder
from scantling.model.accounting import (
    CACHED,
    CONVENTIONS,
    active_counts,
    active_parameters,
    cache_bytes,
    forward_flops_by_part,
    forward_flops_per_token,
    non_embedding,
    parameter_counts,
)
from scantling.training.budget import steps_for

CONF = Path(__file__).resolve().parents[2] / "conf"
EVERY = [f"{group}={path.stem}" for group in PARTS for path in sorted((CONF / group).glob("*.yaml"))]
ATTENTIONS = [option for option in EVERY if option.startswith("attn=")]


@pytest.fixture(scope="module")
def preset(composed):
    """`preset("llama1_7b", "attn=gqa")`: the model's shapes, without memory."""

    @cache
    def preset(name: str, *overrides: str):
        config = composed(f"model={name}", *overrides)
        return build_decoder(config, config.model.vocab_size, "meta")

    return preset


def test_gpt2_by_group(preset):
    """nanoGPT reports 124M as 123.65M, leaving positions out; the groups by hand from d = 768, L = 12."""
    d, layers = 768, 12
    counts = parameter_counts(preset("gpt2_small"))
    assert counts == {
        "embedding": 50257 * d,
        "head": 0,
        "position": 1024 * d,
        "attention": layers * (3 * d * d + 3 * d + d * d + d),
        "router": 0,
        "feed-forward": layers * (4 * d * d + 4 * d + 4 * d * d + d),
        "norm": layers * 4 * d + 2 * d,
    }
    assert sum(counts.values()) == 124_439_808
    assert sum(counts.values()) - counts["position"] == 123_653_376


def test_llama_7b_by_group(preset):
    d, layers, d_ff = 4096, 32, 11008
    counts = parameter_counts(preset("llama1_7b"))
    assert counts == {
        "embedding": 32000 * d,
        "head": 32000 * d,
        "position": 0,
        "attention": layers * 4 * d * d,
        "router": 0,
        "feed-forward": layers * 3 * d * d_ff,
        "norm": layers * 2 * d + d,
    }
    assert sum(counts.values()) == 6_738_415_616


@pytest.mark.parametrize("option", EVERY)
def test_groups_add_up_and_belong_where_they_say(nano, option):
    """Each group against the sizes of the modules themselves, whatever their parameters are called."""
    decoder = nano(option)
    counts = parameter_counts(decoder)

    def size(*modules) -> int:
        return sum({p: p.numel() for module in modules for p in module.parameters()}.values())

    assert sum(counts.values()) == size(decoder)
    assert counts["position"] == size(decoder.pos)
    assert counts["attention"] == size(*(block.attn for block in decoder.blocks))
    assert counts["feed-forward"] + counts["router"] == size(*(block.ffn for block in decoder.blocks))
    assert counts["embedding"] + counts["head"] == size(decoder.embed, decoder.head)
    assert counts["router"] == size(*decoder.routers)


def test_shared_layers_count_once_and_compute_each_time(preset):
    """ALBERT: parameters of one layer, FLOPs of all, under every convention."""
    own, shared = (preset("gpt2_small", f"decoder.layers_per_block={n}") for n in (1, 12))
    ours, theirs = parameter_counts(shared), parameter_counts(own)
    for group in ("attention", "feed-forward"):
        assert 12 * ours[group] == theirs[group]
    for name, convention in CONVENTIONS.items():
        assert convention(shared, 1024) == convention(own, 1024), name
    assert cache_bytes(shared, context=7, batch=1, precision="bf16") == cache_bytes(
        own, context=7, batch=1, precision="bf16"
    )


def test_active_parameters_leave_idle_experts_out(preset):
    """By hand: of 8 experts of three matrices 6 are idle."""
    decoder = preset("llama_125m", "ffn=moe")
    experts = 12 * 8 * 3 * 768 * 2048
    counts, active = parameter_counts(decoder), active_counts(decoder)
    assert counts["feed-forward"] == experts
    assert counts["router"] == active["router"] == 12 * 768 * 8
    assert active["feed-forward"] == experts / 4
    assert active_parameters(decoder) == sum(counts.values()) - experts * 3 / 4


D, LAYERS, V, T = 768, 12, 50257, 1024
MATRICES = LAYERS * 12 * D * D
"""Of GPT-2 124M: Kaplan et al. 2020, table 1, N = 12·L·d² without biases and norms."""


def test_kaplan_is_6n_without_embeddings(preset):
    flops = CONVENTIONS["kaplan"](preset("gpt2_small"), T)
    assert flops == 6 * (124_439_808 - V * D - T * D)
    assert flops == pytest.approx(6 * MATRICES, rel=2e-3)


def test_6n_is_of_all_parameters(preset):
    assert CONVENTIONS["6n"](preset("gpt2_small"), T) == 6 * 124_439_808


def test_palm_is_6n_and_12lhqt(preset):
    """Chowdhery et al. 2022, appendix B: 6N + 12·L·H·Q·T."""
    assert CONVENTIONS["palm"](preset("gpt2_small"), T) == 6 * 124_439_808 + 12 * LAYERS * 12 * 64 * T


def test_exact_counts_each_product_once_and_half_of_attention(preset):
    """By hand: forward 2 a weight of the blocks' matrices and head, 4·d·(T+1)/2 a layer for QKᵀ and ·V;
    ×3."""
    forward = 2 * (MATRICES + V * D) + LAYERS * 4 * D * (T + 1) / 2
    assert CONVENTIONS["exact"](preset("gpt2_small"), T) == 3 * forward


@pytest.mark.parametrize("embed", ["tied", "untied"])
def test_exact_counts_the_head_once_tied_or_not(preset, embed):
    forward = 2 * (MATRICES + V * D) + LAYERS * 4 * D * (T + 1) / 2
    assert CONVENTIONS["exact"](preset("gpt2_small", f"embed={embed}"), T) == 3 * forward


def test_exact_is_the_mean_over_positions(preset):
    """Query t attends to t keys, t = 1 … T."""
    decoder = preset("nano")
    mean = sum(forward_flops_per_token(decoder, t, 64) for t in range(1, 65)) / 64
    assert CONVENTIONS["exact"](decoder, 64) == pytest.approx(3 * mean)


def test_exact_full_has_every_key(preset):
    forward = 2 * (MATRICES + V * D) + LAYERS * 4 * D * T
    assert CONVENTIONS["exact_full"](preset("gpt2_small"), T) == 3 * forward


def test_kaplans_context_term(preset):
    """Kaplan et al. 2020, table 1: C_forward = 2N + 2·n_layer·n_ctx·d_attn, and §2.1: three times that in
    training."""
    decoder = preset("gpt2_small")
    n = non_embedding(parameter_counts(decoder))
    assert CONVENTIONS["kaplan_context"](decoder, T) == 3 * (2 * n + 2 * LAYERS * T * D)


TABLE_A4 = {  # layers, d_model, d_ff, heads, width of a head, and the ratio of Hoffmann's count to 6·N·D
    "73M": (10, 640, 2560, 10, 64, 1.03),
    "305M": (20, 1024, 4096, 16, 64, 1.10),
    "552M": (24, 1280, 5120, 10, 128, 1.08),
    "1.1B": (26, 1792, 7168, 14, 128, 1.04),
    "1.6B": (28, 2048, 8192, 16, 128, 1.03),
    "6.8B": (40, 3584, 14336, 28, 128, 0.99),
}


@pytest.mark.parametrize("name", TABLE_A4)
def test_hoffmanns_count_is_appendix_f_and_table_a4(preset, name):
    """Term by term as appendix F lists them, for 32,000 entries and 2048 tokens.

    The ratios printed in table A4 come out to the last digit with the two terms of the vocabulary left out,
    and with Gopher's matrix for relative positions (D² a layer, arXiv:2112.11446, §2.1) in N.
    """
    layers, d, d_ff, heads, key, ratio = TABLE_A4[name]
    sizes = {"n_layers": layers, "d_model": d, "d_ff": d_ff, "n_heads": heads, "d_head": key, "seq_len": 2048}
    shape = [f"model.{setting}={value}" for setting, value in (sizes | {"vocab_size": 32000}).items()]
    decoder = preset("gpt2_small", "pos=none", "norm=rmsnorm", "model.bias=false", *shape)
    seq, vocab = 2048, 32000
    attention = 2 * 3 * seq * d * key * heads + 2 * seq * seq * key * heads + 3 * heads * seq * seq
    attention += 2 * seq * seq * key * heads + 2 * seq * key * heads * d
    dense = 2 * seq * (d * d_ff + d * d_ff)
    vocabulary = 2 * seq * vocab * d
    forward = vocabulary + layers * (attention + dense) + vocabulary
    ours = CONVENTIONS["hoffmann"](decoder, seq)
    assert seq * ours == 3 * forward
    n = sum(parameter_counts(decoder).values()) + layers * d * d
    assert (ours - 3 * 2 * vocabulary / seq) / (6 * n) == pytest.approx(ratio, abs=0.0055)


def test_n_of_a_mixture_is_of_its_active_parameters(preset):
    dense, mixture = (preset("llama_125m", f"ffn={ffn}", "model.d_ff=1536") for ffn in ("swiglu", "moe"))
    router = parameter_counts(mixture)["router"]
    one_more_expert = parameter_counts(dense)["feed-forward"]
    for name, convention in CONVENTIONS.items():
        more = convention(mixture, 1024) - convention(dense, 1024)
        assert more == 6 * (router + one_more_expert), name


@pytest.mark.parametrize("option", EVERY)
def test_parts_of_the_forward_pass_add_up(nano, option):
    """Each part against a matrix of the module that has it; the rest is attention to 64 keys and the head."""
    decoder = nano(option)
    parts = forward_flops_by_part(decoder, 64, 64)
    assert sum(parts.values()) == forward_flops_per_token(decoder, 64, 64)
    assert parts["block"] == 0
    assert parts["head"] == decoder.head.flops(decoder.embed)
    active = active_counts(decoder)
    vectors = sum(p.numel() for block in decoder.blocks for p in block.ffn.parameters() if p.ndim < 2)
    assert parts["feed-forward"] == 2 * (active["feed-forward"] - vectors)
    assert parts["router"] == 2 * active["router"]
    assert parts["attention mixing"] == sum(block.attn.mixing_flops(64.0) for block in decoder.layers)


def test_every_budget_names_a_convention_there_is(composed):
    for path in (CONF / "budget").glob("*.yaml"):
        budget = dict(composed(f"budget={path.stem}").budget)
        assert budget.pop("convention", "exact") in CONVENTIONS
        assert steps_for(tokens_per_step=1, n_params=1, flops_per_token=1.0, **budget) > 0
        if "convention" in path.read_text():
            assert all(name in path.read_text() for name in CONVENTIONS), "the comment lists them"


def test_llama_7b_takes_its_published_flops(preset):
    """Touvron et al. 2023: a trillion tokens at 6.7e9 parameters, 4.0e22 by 6N."""
    decoder = preset("llama1_7b")
    assert 1e12 * CONVENTIONS["6n"](decoder, 2048) == pytest.approx(4.04e22, rel=0.002)
    # 6N counts a table whose lookup costs nothing, and leaves attention out
    lookup, attention = 6 * 32000 * 4096, 12 * 32 * 4096 * 2049 / 2
    small = 6 * (65 * 4096)  # norms
    assert CONVENTIONS["exact"](decoder, 2048) == 6 * 6_738_415_616 - lookup - small + attention


def test_gqa_lowers_linear_flops_alone(preset):
    """Fewer key/value heads have fewer weights; every query still meets every key."""
    mha, gqa = (preset("nano", f"attn={attn}") for attn in ("mha", "gqa"))
    fewer = 2 * 2 * 2 * 32 * 16  # layers, k and v, d_model, two heads of 8
    assert forward_flops_per_token(mha, 64, 64) - forward_flops_per_token(gqa, 64, 64) == 2 * fewer / 2
    mixing = {float(d.blocks[0].attn.mixing_flops(64.0)) for d in (mha, gqa)}
    assert mixing == {4.0 * 32 * 64}


@pytest.mark.parametrize(
    ("precision", "kept", "context"),
    [
        ("fp32", "full", 7),
        ("fp32", "full", 40),
        ("bf16", "full", 40),
        ("int8", "int8", 40),
        ("fp8", "fp8", 40),
    ],
)
@pytest.mark.parametrize("option", [*ATTENTIONS, "attn=mla attn.d_rotated=0 pos=none"])
@torch.no_grad()
def test_a_cache_takes_its_bytes(nano, option, precision, kept, context):
    """The buffers themselves, scales and windows included; nano's window is 16."""
    decoder = nano(*option.split())
    cache = decoder.new_cache(context, kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        decoder(torch.zeros(3, context, dtype=torch.long), cache)
    assert cache.nbytes == cache_bytes(decoder, context=context, batch=3, precision=precision)


def test_a_cache_in_bfloat16_is_half_of_float32(nano):
    full, half = (cache_bytes(nano(), context=10, batch=2, precision=p) for p in ("fp32", "bf16"))
    assert full == 2 * half == 4 * 2 * 10 * (2 * 2 * 32)


def test_an_unknown_precision_of_a_cache(nano):
    with pytest.raises(ValueError, match=f"int4 is unknown: use one of {', '.join(CACHED)}"):
        cache_bytes(nano(), context=1, batch=1, precision="int4")


@pytest.mark.parametrize(
    ("name", "option", "kibibytes"),
    [
        ("llama2_7b", None, 512),  # 2 × 32 layers × 4096 × 2 bytes; "0.5 MB" in many texts
        ("llama3_8b", None, 128),
        ("mistral_7b", None, 128),  # 2 × 32 layers × 8 heads × 128 × 2 bytes
        ("mixtral_8x7b", None, 128),
        ("llama2_70b", None, 320),
        ("llama2_7b", "attn=mqa", 16),
    ],
)
def test_cached_bytes_of_published_models(preset, name, option, kibibytes):
    decoder = preset(name, *([option] if option else []))
    assert cache_bytes(decoder, context=1, batch=1, precision="bf16") == kibibytes * 1024


@pytest.fixture
def of_deepseek_v3(preset):
    """A count of all 61 layers: of four, three of them dense, and 57 times what a fifth adds."""

    def of_deepseek_v3(count):
        four, five = (count(preset("deepseek_v3", f"model.n_layers={n}")) for n in (4, 5))
        return four + 57 * (five - four)

    return of_deepseek_v3


def test_deepseek_v3_keeps_70_kilobytes_a_token(preset, of_deepseek_v3):
    """DeepSeek-AI 2025, arXiv:2505.09343, table 1: 70.272 KB a token in bf16, where LLaMA-3.1 405B keeps
    516.096."""

    def size(decoder):
        return cache_bytes(decoder, context=1, batch=1, precision="bf16")

    assert of_deepseek_v3(size) == 70_272
    assert size(preset("llama3_405b")) == 516_096


def test_a_window_bounds_the_cache(preset):
    """Jiang et al. 2023 (Mistral 7B), arXiv:2310.06825, §2: at 32k tokens a window of 4096 spares a factor of
    8."""
    decoder = preset("mistral_7b")
    at = {n: cache_bytes(decoder, context=n, batch=1, precision="bf16") for n in (1, 4096, 32768)}
    assert at[4096] == 4096 * at[1]
    assert at[32768] == at[4096]


def test_mixtral_and_deepseek_have_their_published_sizes(preset, of_deepseek_v3):
    """Mixtral: 46.7 B, 12.9 B active (Mistral AI, December 2023). DeepSeek-V3: 671 B, 37 B active,
    arXiv:2412.19437."""
    mixtral = preset("mixtral_8x7b")
    assert sum(parameter_counts(mixtral).values()) == 46_702_792_704
    assert round(active_parameters(mixtral) / 1e9, 1) == 12.9
    assert round(of_deepseek_v3(lambda decoder: sum(parameter_counts(decoder).values())) / 1e9) == 671
    assert of_deepseek_v3(active_parameters) // 1e9 == 37
