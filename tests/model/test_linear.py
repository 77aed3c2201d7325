"""Against torch's own linear layer."""

from dataclasses import replace

import pytest
import rounding
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from scantling.model import linear as module
from scantling.model import processors
from scantling.model.linear import Linear, OneDNNLinear, by_slices, linear

onednn_only = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def operands(shape: tuple[int, ...], width: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (shape, (width, 16), (width,))
    return [torch.randn(s, generator=generator, dtype=torch.float32, requires_grad=True) for s in shapes]


@onednn_only
@pytest.mark.parametrize("shape", [(1, 16), (5, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_onednn_gives_torchs_values_and_gradients(processor, shape, biased):
    x, weight, bias = operands(shape)
    bias = bias if biased else None
    ours, torchs = OneDNNLinear.apply(x, weight, bias), functional.linear(x, weight, bias)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)
    inputs = [t for t in (x, weight, bias) if t is not None]
    factor = torch.randn_like(torchs)
    for a, b in zip(
        torch.autograd.grad((ours * factor).sum(), inputs),
        torch.autograd.grad((torchs * factor).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [24, 7])  # 7 rows cannot be shared out evenly
@pytest.mark.parametrize("shape", [(16,), (1, 16), (5, 16), (2, 3, 16)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_slices_give_torchs_values(shape, width, biased):
    x, weight, bias = operands(shape, width)
    bias = bias if biased else None
    ours = by_slices(x, weight, bias)
    assert ours.is_contiguous()
    rounding.assert_within(ours, *rounding.products(x, weight, bias))


@onednn_only
@torch.no_grad()
@pytest.mark.parametrize("rows", [module.FEW, module.FEW + 1])
def test_few_rows_are_as_many(monkeypatch, rows):
    """Every way that a product without gradients may take."""
    monkeypatch.setattr(processors, "HERE", "zen5")
    x, weight, bias = operands((rows, 16))
    for w in (weight, module.packed(weight)):
        rounding.assert_within(linear(x, w, bias), *rounding.products(x, weight, bias))


@onednn_only
@pytest.mark.parametrize("little", [0, 2**30])
def test_a_product_with_gradients_goes_to_onednn_by_its_size(monkeypatch, little):
    monkeypatch.setattr(processors, "HERE", "zen4")
    monkeypatch.setitem(module.ONEDNN, "zen4", replace(module.ONEDNN["zen4"], little=little))
    x, weight, bias = operands((5, 16))
    ours, torchs = linear(x, weight, bias), functional.linear(x, weight, bias)
    assert ours.grad_fn is not None
    assert torchs.grad_fn is not None
    assert (ours.grad_fn.name() == torchs.grad_fn.name()) == (little >= 5 * 16 * 24)
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@onednn_only
def test_no_gradient_where_none_is_asked_for():
    x, weight, bias = operands((5, 16))
    OneDNNLinear.apply(x.detach(), weight, bias).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(24, 16))


def test_layer_is_torchs():
    layer = Linear(16, 24)
    x = operands((2, 3, 16))[0]
    torch.testing.assert_close(layer(x), torch.nn.Linear.forward(layer, x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), torch.nn.Linear.forward(layer, x))
    assert layer.to("meta")(x.to("meta")).shape == (2, 3, 24)


@onednn_only
def test_torch_counts_its_flops():
    x, weight, bias = operands((5, 16))
    with FlopCounterMode(display=False) as counter:
        OneDNNLinear.apply(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 16 * 24
