"""Token embeddings and output matrices against torch's functions and the formulas."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from scantling.model.embed import Factorised, Tied, Untied
from scantling.model.head import Full

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, Any] = {"scale": 1.0, "width_exponent": 0.0, "norm": None}


def logits(embed, x=X):
    return Full(10, 8, scale=None, softcap=None).logits(x, embed)


def test_tied_head_is_the_table():
    tied = Tied(10, 8, **PLAIN)
    table = tied.tokens.weight
    assert_close(tied(TOKENS), F.embedding(TOKENS, table), rtol=0, atol=0)
    assert_close(logits(tied), X @ table.T)
    assert [p.shape for p in tied.parameters()] == [(10, 8)]


def test_tied_gradient_is_the_sum_of_both_uses():
    tied, untied = Tied(10, 8, **PLAIN), Untied(10, 8, **PLAIN, bias=False)
    untied.tokens.weight.data.copy_(tied.tokens.weight)
    untied.head.weight.data.copy_(tied.tokens.weight)
    for embed in (tied, untied):
        logits(embed, embed(TOKENS)).logsumexp(-1).sum().backward()
    of_table, of_head = untied.tokens.weight.grad, untied.head.weight.grad
    assert of_table is not None
    assert of_head is not None
    assert_close(tied.tokens.weight.grad, of_table + of_head)


def test_untied_head_is_a_matrix_of_its_own():
    untied = Untied(10, 8, **PLAIN, bias=False)
    assert_close(untied(TOKENS), F.embedding(TOKENS, untied.tokens.weight), rtol=0, atol=0)
    assert_close(logits(untied), X @ untied.head.weight.T)
    assert [p.shape for p in untied.parameters()] == [(10, 8), (10, 8)]


def test_untied_head_may_have_a_bias():
    """GPT-J's."""
    untied = Untied(10, 8, **PLAIN, bias=True)
    untied.head.bias.data.copy_(torch.arange(10.0))
    assert_close(logits(untied), X @ untied.head.weight.T + torch.arange(10.0))


def test_factorised_by_formula():
    """Lan et al. 2019, §3.1: a V×R table and an R×D matrix; the way back is D×R and the table."""
    factorised = Factorised(10, 8, rank=3, **PLAIN)
    table, wide, narrow = factorised.tokens.weight, factorised.wide.weight, factorised.narrow.weight
    assert [p.shape for p in factorised.parameters()] == [(10, 3), (8, 3), (3, 8)]
    assert_close(factorised(TOKENS), table[TOKENS] @ wide.T)
    assert_close(logits(factorised), X @ narrow.T @ table.T)


@pytest.mark.parametrize("kind", [Tied, lambda *shape, **settings: Untied(*shape, **settings, bias=False)])
@pytest.mark.parametrize(
    ("scale", "exponent", "expected"), [(1.0, 0.5, 8**0.5), (12.0, 0.0, 12.0), (3.0, 1.0, 24.0)]
)
def test_scale_multiplies_the_input_alone(kind, scale, exponent, expected):
    """Vaswani et al. 2017, §3.4: times √d_model; Granite's `embedding_multiplier` is 12."""
    embed = kind(10, 8, scale=scale, width_exponent=exponent, norm=None)
    assert_close(embed(TOKENS), expected * embed.tokens.weight[TOKENS])
    assert_close(logits(embed), X @ embed.output.T)


def test_scaled_input_equals_gemmas():
    from transformers.models.gemma2.modeling_gemma2 import Gemma2TextScaledWordEmbedding

    theirs = Gemma2TextScaledWordEmbedding(10, 8, padding_idx=0, embed_scale=8**0.5)
    settings: dict[str, Any] = {**PLAIN, "width_exponent": 0.5}
    ours = Tied(10, 8, **settings)
    ours.load_state_dict({"tokens.weight": theirs.weight})
    assert_close(ours(TOKENS), theirs(TOKENS))


def test_norm_falls_on_the_scaled_input_alone():
    """BLOOM's `word_embeddings_layernorm`."""
    embed = Tied(10, 8, scale=5.0, width_exponent=0.0, norm=lambda width: nn.LayerNorm(width, eps=0.1))
    rows = 5 * embed.tokens.weight[TOKENS]
    centred = rows - rows.mean(-1, keepdim=True)
    assert_close(embed(TOKENS), centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt())
    assert_close(logits(embed), X @ embed.tokens.weight.T)
