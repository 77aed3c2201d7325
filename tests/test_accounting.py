"""Counts of parameters, FLOPs and bytes against published numbers, hand formulas and torch."""

import pytest
import torch
from hydra.utils import instantiate

from scantling.accounting import CONVENTIONS, forward_flops_per_token, parameter_counts, training_memory
from scantling.training.optim import adamw


@pytest.fixture
def preset(composed):
    def preset(name: str, *overrides: str):
        config = composed(f"model={name}", *overrides)
        with torch.device("meta"):
            return instantiate(config.decoder, vocab_size=config.model.vocab_size)

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
        "feed-forward": layers * 3 * d * d_ff,
        "norm": layers * 2 * d + d,
    }
    assert sum(counts.values()) == 6_738_415_616


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
    """By hand: forward 2 a weight of the blocks' matrices and the head, 4·d·(T+1)/2 a layer for QKᵀ and ·V; ×3."""
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


def test_memory_of_weights_gradients_and_adamw_equals_torchs(nano):
    decoder = nano()
    optimizer = adamw(decoder.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decoder(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum(t.nbytes for t in tensors)

    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    memory = training_memory(decoder, sequences=1, seq_len=8, half_precision=False)
    assert memory.weights == size(decoder.parameters())
    assert memory.gradients == size(p.grad for p in decoder.parameters())
    assert memory.optimizer == size(states)
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


@pytest.mark.parametrize("parts", ["norm=rmsnorm ffn=swiglu pos=rope", "norm=layernorm ffn=gelu pos=learned"])
@pytest.mark.parametrize("half", [False, True])
def test_memory_of_activations_is_within_a_factor_of_two_of_what_autograd_keeps(nano, parts, half):
    decoder = nano(*parts.split(), "model.d_model=128", "model.d_ff=512", "model.n_layers=4")
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = decoder(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    measured = sum(n for n, _ in kept.values())
    estimate = training_memory(decoder, sequences=4, seq_len=64, half_precision=half).activations
    assert loss > 0
    assert 0.5 < estimate / measured < 2
