"""Token embedding and head against torch's functions."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from scantling.model.embed import Tied, Untied

TOKENS = torch.tensor([[3, 1, 4], [1, 5, 9]])
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def test_tied_head_is_the_table():
    tied = Tied(10, 8)
    table = tied.tokens.weight
    assert_close(tied(TOKENS), F.embedding(TOKENS, table), rtol=0, atol=0)
    assert_close(tied.logits(X), X @ table.T)
    assert [p.shape for p in tied.parameters()] == [(10, 8)]


def test_tied_gradient_is_the_sum_of_both_uses():
    tied, untied = Tied(10, 8), Untied(10, 8)
    untied.tokens.weight.data.copy_(tied.tokens.weight)
    untied.head.weight.data.copy_(tied.tokens.weight)
    for embed in (tied, untied):
        embed.logits(embed(TOKENS)).logsumexp(-1).sum().backward()
    assert_close(tied.tokens.weight.grad, untied.tokens.weight.grad + untied.head.weight.grad)


def test_untied_head_is_a_matrix_of_its_own():
    untied = Untied(10, 8)
    assert_close(untied(TOKENS), F.embedding(TOKENS, untied.tokens.weight), rtol=0, atol=0)
    assert_close(untied.logits(X), X @ untied.head.weight.T)
    assert [p.shape for p in untied.parameters()] == [(10, 8), (10, 8)]
