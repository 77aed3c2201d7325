"""Normalisation against torch, `transformers` and the formulas."""

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch.testing import assert_close
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from scantling.model.norm import LayerNorm, NoNorm, RMSNorm

D = 48
PLAIN = {
    LayerNorm: {"eps": 1e-5, "weight": True, "bias": True, "unit_offset": False},
    RMSNorm: {"eps": 1e-5, "unit_offset": False},
}


@pytest.fixture
def x() -> torch.Tensor:
    return 3 * torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0)) + 1


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3, eps = 1e-5 outweighs mean(x²)
def test_rmsnorm_equals_llamas(x, weight, dtype, scale):
    ours, theirs = RMSNorm(D, eps=1e-5, unit_offset=False), LlamaRMSNorm(D, eps=1e-5)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
        norm.to(dtype)
    x = (scale * x).to(dtype)
    assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_rmsnorm_equals_its_formula(x, weight):
    norm = RMSNorm(D, eps=1e-5, unit_offset=False)
    norm.weight.data.copy_(weight)
    x64 = x.double()
    expected = x64 / (x64.pow(2).sum(-1, keepdim=True) / D + 1e-5).sqrt() * weight.double()
    assert_close(norm(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_rmsnorm_takes_its_statistics_in_float32_under_autocast(x, weight, grad):
    """Which would take products of vectors in bfloat16."""
    ours, theirs = RMSNorm(D, eps=1e-5, unit_offset=False), LlamaRMSNorm(D, eps=1e-5)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("wanted", ["both", "x", "weight"])
def test_rmsnorms_gradients_are_its_formulas(x, weight, unit_offset, wanted):
    norm = RMSNorm(D, eps=1e-5, unit_offset=unit_offset)
    norm.weight.data.copy_(weight)
    norm.weight.requires_grad_(wanted != "x")
    x = x.transpose(0, 1).requires_grad_(wanted != "weight")
    inputs = [t for t in (x, norm.weight) if t.requires_grad]
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    exact = [t.detach().double().requires_grad_() for t in (x, norm.weight)]
    y = exact[0] / (exact[0].pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (exact[1] + unit_offset)
    expected = dict(zip((x, norm.weight), torch.autograd.grad(y, exact, g.double()), strict=True))
    for t, gradient in zip(inputs, torch.autograd.grad(norm(x), inputs, g), strict=True):
        assert_close(gradient.double(), expected[t], rtol=1e-5, atol=2e-5)


def test_rmsnorm_equals_torchs_fused_one_that_the_gpu_takes(x, weight):
    norm = RMSNorm(D, eps=1e-5, unit_offset=False)
    norm.weight.data.copy_(weight)
    assert_close(norm(x), torch.nn.functional.rms_norm(x, (D,), weight, 1e-5))


def test_rmsnorm_takes_its_statistics_of_bfloat16_in_float32(weight):
    """In bfloat16, adding up 4096 ones would stop at 256."""
    norm = RMSNorm(4096, eps=0.0, unit_offset=False)
    x = torch.full((4096,), 2.0, dtype=torch.bfloat16)
    assert_close(norm(x), torch.ones(4096))


@pytest.mark.parametrize("bias", [True, False])
def test_layernorm_equals_torchs(x, weight, bias):
    norm = LayerNorm(D, eps=1e-3, weight=True, bias=bias, unit_offset=False)
    assert norm.weight is not None
    norm.weight.data.copy_(weight)
    b = None
    if bias:
        b = torch.linspace(-1, 1, D)
        assert norm.bias is not None
        norm.bias.data.copy_(b)
    assert_close(norm(x), torch.nn.functional.layer_norm(x, (D,), weight, b, 1e-3), rtol=0, atol=0)
    assert dict(norm.named_parameters()).keys() == ({"weight", "bias"} if bias else {"weight"})


def test_layernorm_equals_its_formula(x):
    x64 = x.double()
    centred = x64 - x64.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    norm = LayerNorm(D, eps=1e-5, weight=True, bias=True, unit_offset=False)
    assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)


RELATIVES = {
    "layernorm_1p": NemotronLayerNorm1P(D, eps=1e-5),
    "layernorm_no_bias": CohereLayerNorm(D, eps=1e-5),
    "layernorm_plain": OlmoLayerNorm(D),
    "rmsnorm_1p": GemmaRMSNorm(D, eps=1e-5),
}


@pytest.mark.parametrize(("option", "theirs"), RELATIVES.items(), ids=RELATIVES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_norm_equals_its_relative(composed, x, option, theirs, dtype):
    """Gemma multiplies by the factor before it rounds to bfloat16 and we after, as Llama does."""
    ours = instantiate(composed("model=nano", f"norm={option}").norm)(D)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if "1p" in option:
        assert_close(ours(x), type(ours)(D, **PLAIN[type(ours)])(x))  # w starts where the factor is 1
    for i, p in enumerate(ours.parameters()):
        p.copy_(torch.randn(D, generator=torch.Generator().manual_seed(i)))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    tolerance: dict[str, Any] = {"rtol": 0.01, "atol": 0.01} if dtype == torch.bfloat16 else {}
    assert_close(ours(x), theirs(x), **tolerance)


def test_no_norm_is_the_identity(x):
    assert NoNorm(D)(x) is x
    assert not list(NoNorm(D).parameters())
