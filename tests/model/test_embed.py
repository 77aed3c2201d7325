"""Token embeddings and output matrices against torch's functions and the formulas."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from scantling.model.embed import Tied, Untied
from scantling.model.head import Full

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
PLAIN = {"scale": 1.0, "width_exponent": 0.0, "norm": None}


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
    assert_close(tied.tokens.weight.grad, untied.tokens.weight.grad + untied.head.weight.grad)


def test_untied_head_is_a_matrix_of_its_own():
    untied = Untied(10, 8, **PLAIN, bias=False)
    assert_close(untied(TOKENS), F.embedding(TOKENS, untied.tokens.weight), rtol=0, atol=0)
    assert_close(logits(untied), X @ untied.head.weight.T)
    assert [p.shape for p in untied.parameters()] == [(10, 8), (10, 8)]
