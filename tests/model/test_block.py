"""Residual wiring against the papers' formulas; whole models stand in test_decoder.py."""

import pytest
import torch
from torch.testing import assert_close

X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


def parts(decoder):
    """The block, its attention as a function of x alone, its feed-forward and norms; norms made to differ."""
    block = decoder.blocks[0]
    for i, norm in enumerate((block.attn_norm, block.ffn_norm)):
        norm.weight.data.copy_(torch.linspace(0.5, 1.5 + i, 32))
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
    decoder(torch.arange(6).repeat(2, 1))
    shared = seen[0]
    return block, shared, lambda x: block.attn(x, *shared), block.ffn, block.attn_norm, block.ffn_norm


def test_pre_norm_by_formula(nano):
    """Xiong et al. 2020, table 1, right: x' = x + attn(LN(x)); x'' = x' + ffn(LN(x'))."""
    block, shared, attn, ffn, norm1, norm2 = parts(nano("block=pre", gain=8))
    between = X + attn(norm1(X))
    assert_close(block(X, *shared), between + ffn(norm2(between)), rtol=1e-6, atol=1e-6)


def test_post_norm_by_formula(nano):
    """Ibid., left: x' = LN(x + attn(x)); x'' = LN(x' + ffn(x'))."""
    block, shared, attn, ffn, norm1, norm2 = parts(nano("block=post", gain=8))
    between = norm1(X + attn(X))
    assert_close(block(X, *shared), norm2(between + ffn(between)), rtol=1e-6, atol=1e-6)


def test_only_pre_norm_needs_a_final_norm(nano):
    """Ibid.: the final LayerNorm belongs to the pre-norm transformer; GPT-1 has none (test_decoder.py)."""
    assert list(nano("block=pre").norm.parameters())
    assert not list(nano("block=post").norm.parameters())


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_dropout_falls_on_branches_not_on_the_residual(nano, kind):
    """With every branch dropped, pre-norm is the identity and post-norm its two norms."""
    block, shared, _, _, norm1, norm2 = parts(nano(f"block={kind}", "block.dropout=1.0", gain=8).train())
    expected = X if kind == "pre" else norm2(norm1(X))
    assert_close(block(X, *shared), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(block.eval()(X, *shared), expected)
