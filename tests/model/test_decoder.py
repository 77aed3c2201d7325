"""Whole models against `transformers` with the same weights; initialisation; mistakes of the user."""

import pytest
import torch
from torch.testing import assert_close

TOKENS = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    expected = theirs(TOKENS).logits
    assert expected.std() > 0.5  # or the comparison would be one of zeros
    assert_close(ours(TOKENS), expected, rtol=0, atol=1e-4)


def test_logits_equal_gpt2s(gpt2_pair):
    assert_same_logits(*gpt2_pair())


def test_logits_equal_gpt1s(gpt1_pair):
    assert_same_logits(*gpt1_pair())


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("embed", ["tied", "untied"])
def test_logits_equal_llamas(llama_pair, attn, embed):
    assert_same_logits(*llama_pair(attn=attn, embed=embed))


def test_gradients_equal_llamas(llama_pair):
    ours, theirs = llama_pair(attn="gqa", embed="untied")
    for model in (lambda: ours(TOKENS), lambda: theirs(TOKENS).logits):
        model().square().mean().backward()
    layer = theirs.model.layers[0]
    assert_close(ours.embed.tokens.weight.grad, theirs.model.embed_tokens.weight.grad, rtol=1e-3, atol=1e-5)
    q_rows = layer.self_attn.q_proj.weight
    assert_close(ours.blocks[0].attn.qkv.weight.grad[: len(q_rows)], q_rows.grad, rtol=1e-3, atol=1e-5)
    assert_close(
        ours.blocks[0].attn_norm.weight.grad, layer.input_layernorm.weight.grad, rtol=1e-3, atol=1e-5
    )


def test_initialisation_is_gpt2s(nano):
    """Normal, 0.02; layers that write to the residual stream 0.02/√(2·n_layers); biases 0, norms 1."""
    gpt2 = ("norm=layernorm", "pos=learned", "ffn=gelu", "model.bias=true")
    decoder = nano(*gpt2, "embed=untied", "model.n_layers=8", "model.d_model=64")
    seen = set()
    for name, p in decoder.named_parameters():
        kind = name.split(".", 2)[-1] if name.startswith("blocks") else name
        seen.add(kind)
        if name.endswith("bias"):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            std = 0.02 / 4 if kind in ("attn.out.weight", "ffn.out.weight") else 0.02
            error = 1 / (2 * p.numel()) ** 0.5  # relative standard error of a standard deviation
            assert abs(p.std().item() / std - 1) < 5 * error, name
            assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name
    assert {"embed.tokens.weight", "embed.head.weight", "pos.weight", "attn.qkv.weight", "norm.bias"} <= seen


def test_tensors_of_one_shape_start_different(nano):
    weights = [p for p in nano("embed=untied").parameters() if p.ndim >= 2]
    pairs = [(a, b) for i, a in enumerate(weights) for b in weights[:i] if a.shape == b.shape]
    assert pairs
    for a, b in pairs:
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 5 / a.numel() ** 0.5


def test_dropout_falls_on_the_embedding(nano):
    """With every embedding dropped, all tokens look alike."""
    decoder = nano("model.dropout=0.0", "decoder.dropout=1.0", gain=8).train()
    with torch.no_grad():
        assert_close(decoder(TOKENS), torch.zeros(2, 64, 512), rtol=0, atol=0)
        assert decoder.eval()(TOKENS).std() > 0.1


RATES = (
    "decoder.dropout",
    "block.dropout",
    "attn.dropout",
)  # of the embedding, the branches, the attention weights


@pytest.mark.parametrize("rate", RATES)
def test_dropout_is_set_apart_on_embedding_branches_and_attention(nano, rate):
    """One of three at 1/2: that one draws, and draws as it does alone in torch; the others do nothing."""
    drawn = []
    decoder = nano("model.dropout=0.0", f"{rate}=0.5", gain=8).train()
    block = decoder.blocks[0]
    for name, module in (("decoder.dropout", decoder.dropout), ("block.dropout", block.residual.dropout)):
        module.register_forward_hook(
            lambda _, args, out, name=name: drawn.append((name, (out == 0).float().mean(), out, args[0]))
        )
    torch.manual_seed(0)
    logits = decoder(TOKENS)
    assert block.attn.dropout == (0.5 if rate == "attn.dropout" else 0.0)
    for name, zeros, out, given in drawn:
        if name == rate:
            assert 0.45 < zeros < 0.55
            assert_close(out[out != 0], 2 * given[out != 0])
        else:
            assert torch.equal(out, given)
    assert not torch.equal(decoder(TOKENS), logits)
    assert torch.equal(decoder.eval()(TOKENS), nano("model.dropout=0.0", gain=8).eval()(TOKENS))


def test_one_rate_of_dropout_serves_all_unless_one_is_set(nano):
    decoder = nano("model.dropout=0.3", "attn.dropout=0.1")
    rates = (decoder.dropout.p, decoder.blocks[1].residual.dropout.p, decoder.blocks[1].attn.dropout)
    assert rates == (0.3, 0.3, 0.1)


@torch.no_grad()
@pytest.mark.parametrize(("n_layers", "per_block"), [(6, 6), (6, 2)])
def test_layers_that_share_a_block_equal_layers_of_the_same_weights(nano, n_layers, per_block):
    """ALBERT's sharing: as a model without it whose layers hold the same weights, and with the parameters of
    a few."""
    shared = nano(f"model.n_layers={n_layers}", f"decoder.layers_per_block={per_block}", gain=4).eval()
    apart = nano(f"model.n_layers={n_layers}").eval()
    state = apart.state_dict()
    for name in state:
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            state[name] = shared.state_dict()[f"blocks.{int(layer) // per_block}.{rest}"]
        else:
            state[name] = shared.state_dict()[name]
    apart.load_state_dict(state)
    logits = shared(TOKENS)
    assert torch.equal(logits, apart(TOKENS))
    assert logits.std() > 0.1

    sizes = [sum(p.numel() for p in block.parameters()) for block in apart.blocks]
    saved = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters())
    assert saved == sizes[0] * (n_layers - n_layers // per_block)

    cache = shared.new_cache(64)  # keys and values of every layer, shared or not
    pieces = [shared(piece, cache) for piece in TOKENS.split([20, 1, 1, 42], dim=1)]
    assert_close(torch.cat(pieces, 1), logits, rtol=0, atol=5e-5)
    assert len(cache.layers) == n_layers


def test_layers_that_do_not_share_evenly_are_refused(nano):
    with pytest.raises(ValueError, match="layers_per_block=4 does not divide n_layers=6"):
        nano("model.n_layers=6", "decoder.layers_per_block=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.n_heads=3", r"n_heads=3 does not divide d_model=32: use one of \[1, 2, 4\]"),
        ("attn=gqa model.n_kv_heads=3", r"n_kv_heads=3 does not divide n_heads=4: use one of \[1, 2, 4\]"),
        ("pos=learned pos.max_len=32", "seq_len=64 is longer than the 32 positions"),
        ("decoder.layers_per_block=0", "layers_per_block=0 must be a whole number, at least 1"),
        ("decoder.layers_per_block=-1", "layers_per_block=-1 must be"),
        ("model.n_layers=0", "n_layers=0 must be"),
        ("model.n_heads=0", "n_heads=0 must be"),
        ("model.d_model=0", "d_model=0 must be"),
        ("model.d_ff=0", "d_ff=0 must be"),
        ("ffn=moe ffn.n_shared=-1", "n_shared=-1 must be a whole number, at least 0"),
        ("model.seq_len=0", "seq_len=0 must be"),
        ("model.d_head=7", "d_head=7 must be even"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(nano, overrides, message):
    with pytest.raises(ValueError, match=message):
        nano(*overrides.split())


def test_head_width_may_be_set_apart_from_the_model_width(nano):
    """GPT-3 XL and 13B have H·E ≠ D. Query, key and value rows, and the columns of `out`, are H·E."""
    attn = nano("model.d_head=12").blocks[0].attn
    assert attn.qkv.weight.shape == (3 * 4 * 12, 32)
    assert attn.out.weight.shape == (32, 4 * 12)
