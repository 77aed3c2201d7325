"""`trainer.precision=fp8` against products of matrices that are rounded here, and against bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scantling.training import float8


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To `dtype`, scaled so that the largest of the tensor is the largest number of `dtype`."""
    scale = torch.finfo(dtype).max / x.abs().max()
    return (x * scale).to(dtype).float() / scale


def test_products_and_gradients_are_those_of_rounded_matrices(nano):
    decoder = nano("attn=gqa", "ffn=gelu", gain=10)
    before = decoder.state_dict()
    float8.convert_to_float8(decoder)
    assert decoder.state_dict().keys() == before.keys()
    layer, generator = decoder.layers[0].ffn.up, torch.Generator().manual_seed(0)
    n_tokens = 21  # no multiple of 16
    x = torch.randn(n_tokens, layer.in_features, generator=generator, requires_grad=True)
    g = torch.randn(n_tokens, layer.out_features, generator=generator)
    y = layer(x)
    y.backward(g)
    x_, w_, g_ = (
        rounded(x.detach(), torch.float8_e4m3fn),
        rounded(layer.weight.detach(), torch.float8_e4m3fn),
        rounded(g, torch.float8_e5m2),
    )
    for ours, formula, exact in (
        (y, x_ @ w_.T, x @ layer.weight.T),
        (x.grad, g_ @ w_, g @ layer.weight),
        (layer.weight.grad, g_.T @ x_, g.T @ x),
    ):
        assert ours is not None
        torch.testing.assert_close(ours, formula, rtol=1e-3, atol=1e-3 * formula.abs().max().item())
        assert 0.01 < (ours - exact).norm() / exact.norm() < 0.1


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (("attn=mha", "ffn=gelu"), "8 of 8"),
        (("ffn=swiglu",), "4 of 10"),  # 32 × 88
        (("ffn=moe",), "4 of 4"),
    ],
)
def test_layers_of_blocks_are_converted_where_they_fit_but_no_experts(nano, overrides, line):
    decoder = nano(*overrides)
    assert float8.convert_to_float8(decoder) == f"fp8 in {line} linear layers of the blocks"
    converted = [name for name, m in decoder.named_modules() if type(m).__name__ == "Float8Linear"]
    assert len(converted) == int(line.split()[0])
    assert not any("router" in name or "experts" in name for name in converted)


@pytest.mark.slow
def test_a_run_learns_as_in_bfloat16_and_is_evaluated_in_it(shop):
    run, half = (
        shop.run("trainer=cpu", f"trainer.precision={precision}", "lr=3e-3", runs=precision)
        for precision in ("fp8", "bf16")
    )
    losses, expected = ([row["train/loss"] for row in r.metrics()] for r in (run, half))
    assert losses != expected
    assert losses == pytest.approx(expected, abs=0.02)
    assert expected[0] - expected[-1] > 0.5
    said = shop.entry("evaluate", f"run={run.path}")
    assert f"{run.metrics()[-1]['val/loss']:.2f}" in said


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2"])
def test_engines_train_in_it(shop, engine):
    """Each process rounds by the largest of its own tokens: more than sums differ."""
    chosen = ("trainer.precision=fp8", "lr=3e-3")
    single = shop.run("trainer=cpu", *chosen, runs=f"alone-{engine}")
    run = shop.run(f"trainer={engine}", "trainer.devices=2", *chosen, runs=engine)
    losses, expected = ([row["train/loss"] for row in r.metrics()] for r in (run, single))
    assert losses == pytest.approx(expected, abs=0.02)


def test_what_cannot_be_had_is_said(command, monkeypatch):
    assert_refused(command, "choose model.d_model and d_ff so", "model.d_model=24", "model.d_ff=40")
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    assert_refused(command, "needs torchao: pip install torchao, or use bf16")


def test_older_gpus_are_refused(nano, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(ValueError, match=r"capability 8\.9 .* and NVIDIA A100 is older: use bf16"):
        float8.check_float8("fp8", torch.device("cuda"), nano())


def assert_refused(command, expected: str, *overrides: str) -> None:
    code, _, err = command("trainer.precision=fp8", *overrides)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
