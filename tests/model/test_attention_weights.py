"""The weights that a forward pass is said to use, against what it gives and against `transformers`."""

from pathlib import Path

import pytest
import rounding
import torch
from torch.testing import assert_close

from scantling.model.attention_weights import attention_weights
from scantling.model.attn import PatternedAttention
from scantling.model.scores import Scores

CONF = Path(__file__).resolve().parents[2] / "conf"
OPTIONS = [
    *((f"attn={path.stem}",) for path in sorted((CONF / "attn").glob("*.yaml"))),
    *((f"pos={path.stem}",) for path in sorted((CONF / "pos").glob("*.yaml"))),
    ("attn=gqa", "attn/pattern=sliding", "attn/qk_norm=per_head", "pos=alibi", "attn.softcap=3.0"),
    ("attn=mqa", "pos=t5_relative", "decoder.layers_per_block=2"),
    ("attn=mla", "attn/pattern=sinks"),
    ("attn=mha", "param=mup"),
]


@pytest.fixture
def decoder(nano, request):
    return nano(*request.param, "model.bias=true", gain=8).eval()


def repeated(v_BKSE, n_heads):
    """Of each query head the values that it reads."""
    return v_BKSE.repeat_interleave(n_heads // v_BKSE.shape[1], dim=1)


@pytest.mark.parametrize("decoder", OPTIONS, ids=" ".join, indirect=True)
def test_weights_times_values_are_what_attention_gives(decoder, monkeypatch):
    """Beyond 64 keys, where the model's own kernel is PyTorch's, and document by document."""
    if not all(isinstance(block.attn, PatternedAttention) for block in decoder.layers):
        with pytest.raises(ValueError, match="Performer takes no softmax over keys"):
            attention_weights(decoder, torch.zeros(1, 8, dtype=torch.long))
        return
    calls, attend = [], Scores.attend

    def recorded(self, q, k, v, **settings):
        out = attend(self, q, k, v, **settings)
        bias = None if self.bias is None else self.bias(torch.arange(q.shape[1])[:, None, None], t, s)
        calls.append((q, k, v, out, bias, settings))
        return out

    monkeypatch.setattr(Scores, "attend", recorded)
    T = 80 if decoder.pos.max_len is None else decoder.pos.max_len
    tokens = torch.randint(1, 512, (2, T), generator=torch.Generator().manual_seed(0))
    tokens[1, 30] = 0
    t, s = torch.arange(T)[:, None], torch.arange(T)
    of = (tokens == 0).cumsum(1)
    logits = decoder(tokens)
    calls.clear()
    for of_documents in (False, True):
        if of_documents:
            decoder.separate_documents(0)
        weights = attention_weights(decoder, tokens)
        assert len(calls) == len(weights) == len(decoder.layers)
        assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=0, atol=1e-5)
        assert not weights[..., t < s].any()
        assert weights.std() > 0.01  # far from uniform
        for of_layer, (q, k, v, out, bias, settings) in zip(weights, calls, strict=True):
            seen = (s <= t) & settings["pattern"].sees(t, s)
            assert not of_layer[:, :, ~seen].any()
            if of_documents:
                seen = seen & (of[:, None, :, None] == of[:, None, None, :])
            k, v = (repeated(x, decoder.n_heads) for x in (k, v))
            how = {"scale": settings["scale"], "softcap": settings["softcap"], "bias": bias}
            exact, bound = rounding.attention(q, k, v, seen, **how)
            rounding.assert_within(out, exact, bound)
            rounding.assert_within(of_layer @ v, exact, bound)
        assert bool(weights[:, 1, :, 30:, :30].any()) != of_documents
        calls.clear()
    decoder.first_of_document = None
    assert_close(decoder(tokens), logits, rtol=0, atol=0)  # nothing of the watching stays


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_are_those_of_transformers(family, gpt2_pair, llama_pair):
    ours, theirs = gpt2_pair() if family == "gpt2" else llama_pair(attn="gqa", embed="untied")
    tokens = torch.randint(512, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = torch.stack(theirs(tokens, output_attentions=True).attentions)
    assert expected.std() > 0.01
    assert_close(attention_weights(ours, tokens), expected, rtol=0, atol=1e-5)
