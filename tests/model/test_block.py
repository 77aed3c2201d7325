"""Residual wiring against the papers' formulas; whole models stand in test_decoder.py."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
BLOCKS = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "conf" / "block").glob("*.yaml"))


class Parts:
    """A block, what the decoder shares with it, its parts as functions of x alone; norms made to differ."""

    def __init__(self, decoder, layer: int = 0):
        self.block = decoder.blocks[layer]
        for i, norm in enumerate(m for m in self.block.children() if type(m).__name__ == "RMSNorm"):
            norm.weight.data.copy_(torch.linspace(0.5, 1.5 + i, 32))
        seen = []
        self.block.register_forward_pre_hook(lambda _, args: seen.append(args[1:]))
        decoder(torch.arange(6).repeat(2, 1))
        self.shared = seen[0]
        self.ffn = self.block.ffn

    def attn(self, x):
        return self.block.attn(x, *self.shared)

    def __call__(self, x=X):
        return self.block(x, *self.shared)

    def __getattr__(self, name):
        return getattr(self.block, name)


def pre(p, x):
    """Xiong et al. 2020, table 1, right: x' = x + attn(LN(x)); x'' = x' + ffn(LN(x'))."""
    x = x + p.attn(p.attn_norm(x))
    return x + p.ffn(p.ffn_norm(x))


def post(p, x):
    """Ibid., left: x' = LN(x + attn(x)); x'' = LN(x' + ffn(x'))."""
    x = p.attn_norm(x + p.attn(x))
    return p.ffn_norm(x + p.ffn(x))


def deepnorm(p, x):
    """Wang et al. 2022, fig. 2: LN(α·x + G(x)) with α = (2M)^¼ for a decoder of M layers; nano has 2."""
    x = p.attn_norm(x * 4**0.25 + p.attn(x))
    return p.ffn_norm(x * 4**0.25 + p.ffn(x))


def reordered(p, x):
    """OLMo 2, §3.2, eq. 1 and 2: h = x + RMSNorm(attn(x)); h + RMSNorm(mlp(h))."""
    x = x + p.attn_norm(p.attn(x))
    return x + p.ffn_norm(p.ffn(x))


def sandwich(p, x):
    """CogView, §2.4; Gemma 2's input, post-attention, pre- and post-feed-forward norms."""
    x = x + p.attn_post_norm(p.attn(p.attn_norm(x)))
    return x + p.ffn_post_norm(p.ffn(p.ffn_norm(x)))


def parallel(p, x):
    """PaLM, §2: y = x + MLP(LN(x)) + Attention(LN(x))."""
    return x + p.ffn(p.norm(x)) + p.attn(p.norm(x))


def parallel_two_norms(p, x):
    """GPT-NeoX, §2.1.2: x + Attn(LN₁(x)) + FF(LN₂(x))."""
    return x + p.attn(p.attn_norm(x)) + p.ffn(p.ffn_norm(x))


def rezero(p, x):
    """Bachlechner et al. 2020, eq. 6: x + α·sublayer(x), one α for both sublayers of a layer."""
    x = x + 0.7 * p.attn(x)
    return x + 0.7 * p.ffn(x)


FORMULAS = [pre, post, deepnorm, reordered, sandwich, parallel, parallel_two_norms, rezero]


def test_every_block_has_a_formula():
    assert {formula.__name__ for formula in FORMULAS} | {"stochastic_depth"} == set(BLOCKS)


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_block_equals_its_formula(nano, formula):
    parts = Parts(nano(f"block={formula.__name__}", gain=8))
    if formula is rezero:
        assert torch.equal(parts(), X)  # α starts at 0
        parts.block.alpha.data.fill_(0.7)
    expected = formula(parts, X)
    assert (expected - X).std() > 0.1  # the branches count
    assert_close(parts(), expected, rtol=1e-5, atol=1e-5)


def test_only_a_stream_without_norms_behind_needs_a_final_norm(nano):
    """Xiong et al. 2020: the final LayerNorm belongs to pre-norm; GPT-1 has none (test_decoder.py), nor has
    ReZero."""
    without = {block for block in BLOCKS if not list(nano(f"block={block}").norm.parameters())}
    assert without == {"post", "deepnorm", "rezero"}


@pytest.mark.parametrize("block", BLOCKS)
def test_dropout_falls_on_branches_not_on_the_residual(nano, block):
    """With every branch dropped, post-norm is its two norms, and a block without norms on the stream the
    identity."""
    parts = Parts(nano(f"block={block}", "block.dropout=1.0", gain=8).train())
    if block == "rezero":
        parts.block.alpha.data.fill_(0.7)
    with_alpha = {"post": 1.0, "deepnorm": 4**0.25}
    expected = X
    if block in with_alpha:
        expected = parts.ffn_norm(with_alpha[block] * parts.attn_norm(with_alpha[block] * X))
    assert_close(parts(), expected, rtol=1e-6, atol=1e-6)
    parts.block.eval()
    assert not torch.allclose(parts(), expected)


def test_residual_scale_multiplies_each_branch(nano):
    """Granite's `residual_multiplier`; in pre-norm attention and feed-forward are each scaled."""
    parts = Parts(nano("block=pre", "block.residual_scale=0.22", gain=8))
    between = X + 0.22 * parts.attn(parts.attn_norm(X))
    assert_close(parts(), between + 0.22 * parts.ffn(parts.ffn_norm(between)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_stochastic_depth_grows_linearly_and_is_right_on_average(nano):
    """Huang et al. 2016, eq. 4: p_l = 1 - l/L·(1 - p_L) of staying. A branch is left out for a whole
    sequence, or divided by p_l; 4000 sequences put the share within four standard errors."""
    decoder = nano("block=stochastic_depth", "block.drop_path=0.6", "model.n_layers=3", gain=8)
    ones = torch.ones(4000, 5, 8)
    torch.manual_seed(0)
    for layer, block in enumerate(decoder.blocks):
        stays = 1 - 0.6 * (layer + 1) / 3
        out = block.residual.train()(ones)
        assert torch.equal(out, out[:, :1, :1].expand_as(out))
        share = (out[:, 0, 0] > 0).float().mean().item()
        assert abs(share - stays) < 4 * (stays * (1 - stays) / 4000) ** 0.5
        assert_close(out[out > 0].unique(), torch.tensor([1 / stays]))
        assert out.mean().item() == pytest.approx(1.0, abs=4 * ((1 - stays) / stays / 4000) ** 0.5)
        assert block.residual.eval()(ones) is ones


def test_the_two_branches_are_left_out_apart(nano):
    """At a rate of 1/2: both stay, one or the other, or none, each in a quarter."""
    parts = Parts(nano("block=stochastic_depth", "block.drop_path=0.5", "model.n_layers=1", gain=8).train())
    torch.manual_seed(0)
    x = X[:1].expand(2000, -1, -1)
    with torch.no_grad():
        out = parts(x)
        only_ffn = X[:1] + 2 * parts.ffn(parts.ffn_norm(X[:1]))
        only_attn = X[:1] + 2 * parts.attn(parts.attn_norm(X[:1]))
        both = only_attn + 2 * parts.ffn(parts.ffn_norm(only_attn))
    shares = [
        (out - kind).abs().amax((1, 2)).lt(1e-4).float().mean().item()
        for kind in (X[:1], only_attn, only_ffn, both)
    ]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([0.25] * 4, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)


@pytest.mark.parametrize(("block", "scale"), [("pre", (2 * 8) ** -0.5), ("deepnorm", (8 * 8) ** -0.25)])
def test_layers_that_write_to_the_stream_start_smaller(nano, block, scale):
    """GPT-2's 1/√(2·n_layers), and DeepNorm's β of a decoder, (8·n_layers)^-¼, over 8 layers."""
    decoder = nano(f"block={block}", "model.n_layers=8")
    for kind, std in (("out", 0.02 * scale), ("up", 0.02)):
        weights = torch.cat([getattr(b.ffn, kind).weight.flatten() for b in decoder.blocks])
        assert weights.std().item() == pytest.approx(std, rel=5 / (2 * len(weights)) ** 0.5)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_leaves_nothing_is_refused(nano, rate):
    with pytest.raises(ValueError, match=r"drop_path=.* below 1"):
        nano(f"block.drop_path={rate}")
