"""μP: by its table, and by how far the numbers inside a model move at growing widths."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from scantling.training.optim import adamw, follow_width, lion, muon

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
WIDTHS = (32, 64, 128)
TOKENS = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(0))


def sized(nano, width: int, param: str, *overrides: str):
    """`d_head` grows with the width, so that the scale of scores matters too."""
    shape = (f"model.d_model={width}", f"model.d_ff={4 * width}", "model.n_heads=4", f"param={param}")
    base = ("param.base_width=32", "param.base_d_head=8") if param == "mup" else ()
    return nano(*shape, *base, *overrides)


def movement(decoder, steps: int) -> dict[str, float]:
    """Root mean square of what a few steps changed in each block's output and in the logits."""
    seen = []

    def look() -> dict[str, torch.Tensor]:
        found, hooks = {}, []
        for i, block in enumerate(decoder.blocks):
            hooks.append(
                block.register_forward_hook(lambda _, __, out, i=i: found.update({f"block {i}": out}))
            )
        with torch.no_grad():
            found["logits"] = decoder(TOKENS[:, :-1])
        for hook in hooks:
            hook.remove()
        return found

    optimizer = adamw(decoder.named_parameters(), **ADAMW)
    follow_width(optimizer, decoder.rate_factors())
    seen.append(look())
    for _ in range(steps):
        decoder(TOKENS[:, :-1], targets_BT=TOKENS[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    seen.append(look())
    return {name: (seen[1][name] - seen[0][name]).square().mean().sqrt().item() for name in seen[0]}


def growth(nano, param: str, *overrides: str) -> dict[str, float]:
    """Exponent of the width in each movement, by least squares on logarithms."""
    moved = [movement(sized(nano, width, param, *overrides), steps=3) for width in WIDTHS]
    x = torch.tensor([math.log(width) for width in WIDTHS])
    x = x - x.mean()
    return {
        name: (x @ torch.tensor([math.log(m[name]) for m in moved]) / (x @ x)).item() for name in moved[0]
    }


@pytest.mark.parametrize("embed", ["tied", "untied"])
def test_coordinate_check(nano, embed):
    """Yang et al. 2022, appendix D.1: under μP what a step moves does not depend on the width; otherwise it
    grows."""
    flat = growth(nano, "mup", f"embed={embed}")
    grown = growth(nano, "standard", f"embed={embed}")
    assert all(abs(exponent) < 0.2 for exponent in flat.values()), flat
    assert all(exponent > 0.35 for exponent in grown.values()), grown


def test_at_the_base_it_is_the_standard_parametrisation(nano):
    ours, theirs = sized(nano, 32, "mup"), sized(nano, 32, "standard")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(ours(TOKENS), theirs(TOKENS))
    assert set(ours.rate_factors().values()) == {1.0}


def test_factors_are_those_of_the_table(nano):
    """Table 8 at four times the base: hidden matrices 1/2 of the deviation and 1/4 of the rate, logits by 4,
    the rest as is."""
    ours = sized(nano, 128, "mup", "embed=untied", "norm=layernorm", "pos=learned", "model.bias=true")
    theirs = sized(nano, 128, "standard", "embed=untied", "norm=layernorm", "pos=learned", "model.bias=true")
    factors = {name: ours.rate_factors()[p] for name, p in ours.named_parameters()}
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        hidden = name.startswith("blocks.") and p.ndim == 2
        assert factors[name] == (0.25 if hidden else 1.0), name
        assert_close(p, q * (0.5 if hidden else 1.0))
    x = torch.randn(1, 3, 128)
    assert_close(4 * ours.head.logits(x, theirs.embed), theirs.head.logits(x, theirs.embed))
    assert ours.blocks[0].attn.scale == pytest.approx(
        8**0.5 / 32
    )  # d_head 32: 1/E, and 1/√8 at the base of 8


def test_rates_of_a_group_follow_and_rate_times_decay_stays(nano):
    decoder = sized(nano, 128, "mup")
    optimizer = adamw(decoder.named_parameters(), **ADAMW)
    follow_width(optimizer, decoder.rate_factors())
    hidden = decoder.hidden_matrices
    names = {p: name for name, p in decoder.named_parameters()}
    assert optimizer.param_groups[0]["lr"] == 1e-2  # what is logged
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == (2.5e-3 if names[p] in hidden else 1e-2)
            assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 if p.ndim == 2 else 0)
    assert sorted(names[p] for g in optimizer.param_groups for p in g["params"]) == sorted(names.values())


def test_what_it_is_not_defined_for_is_refused(nano):
    decoder = sized(nano, 128, "mup")
    follow_width(
        lion(decoder.named_parameters(), lr=1e-2, lr_ratio=0.1, betas=(0.9, 0.99), weight_decay=1.0),
        decoder.rate_factors(),
    )
    settings: dict[str, Any] = {**ADAMW, "momentum": 0.95}
    with pytest.raises(ValueError, match="param=mup sets rates for optim=adamw and lion"):
        follow_width(muon(decoder.named_parameters(), **settings), decoder.rate_factors())
    for part in ("attn=mla", "attn=performer", "ffn=moe", "embed=factorised", "head=adaptive"):
        with pytest.raises(Exception, match="param=mup is"):
            sized(nano, 128, "mup", part)
