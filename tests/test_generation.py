"""Generation against the same decoder without a cache, `transformers`, and its tokenizer's own decoding."""

import random

import pytest
import torch
from torch.testing import assert_close
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from scantling import generation
from scantling.data.tokenizers import Byte
from scantling.generation import continuation, filtered, generate

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None}
PROMPT = torch.randint(512, (9,), generator=torch.Generator().manual_seed(0))


def generated(decoder, n_tokens: int, *, prompt=PROMPT, seed: int = 0, **sampling) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return list(generate(decoder, prompt, n_tokens=n_tokens, generator=generator, **sampling))


@torch.no_grad()
def without_cache(decoder, n_tokens: int, prompt=PROMPT) -> list[int]:
    """Greedy, each time over all tokens seen; a full context goes on from its last half."""
    seen, out = prompt[-decoder.seq_len :].tolist(), []
    for _ in range(n_tokens):
        if len(seen) > decoder.seq_len:
            seen = seen[-(decoder.seq_len // 2) :]
        out.append(int(decoder(torch.tensor([seen]))[0, -1].argmax()))
        seen.append(out[-1])
    return out


@pytest.mark.parametrize("pos", ["rope", "learned", "alibi", "sinusoidal"])
@pytest.mark.parametrize("attn", ["mha", "gqa"])
def test_greedy_equals_argmax_without_cache_also_beyond_the_context(nano, pos, attn):
    decoder = nano(f"pos={pos}", f"attn={attn}", "embed=untied", "model.seq_len=24", gain=8)
    ids = generated(decoder, 50, **GREEDY)
    assert ids == without_cache(decoder, 50)
    assert len(set(ids)) > 3


@pytest.mark.parametrize("length", [1, 23, 24, 25, 70])
def test_a_prompt_of_any_length_goes_on(nano, length):
    decoder = nano("pos=learned", "embed=untied", "model.seq_len=24", gain=8)
    prompt = torch.randint(512, (length,), generator=torch.Generator().manual_seed(1))
    assert generated(decoder, 15, prompt=prompt, **GREEDY) == without_cache(decoder, 15, prompt)
    end = prompt[-24:]  # the model's context
    assert generated(decoder, 15, prompt=end, **GREEDY) == generated(decoder, 15, prompt=prompt, **GREEDY)


def test_greedy_equals_transformers_llama(llama_pair):
    ours, theirs = llama_pair(attn="gqa", embed="untied")
    expected = theirs.generate(
        PROMPT[None], do_sample=False, max_new_tokens=50, eos_token_id=None, pad_token_id=0
    )
    assert generated(ours, 50, **GREEDY) == expected[0, len(PROMPT) :].tolist()


def test_greedy_equals_transformers_gpt2(gpt2_pair):
    ours, theirs = gpt2_pair()
    expected = theirs.generate(
        PROMPT[None], do_sample=False, max_new_tokens=50, eos_token_id=None, pad_token_id=0
    )
    assert generated(ours, 50, **GREEDY) == expected[0, len(PROMPT) :].tolist()


LOGITS = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [None, 1, 7, 200, 1000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9, 1.0])
def test_filters_equal_transformers(temperature, top_k, top_p):
    """In the order in which `transformers` applies them: temperature, top-k, top-p."""
    scores = TemperatureLogitsWarper(temperature)(None, LOGITS)
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = filtered(LOGITS, temperature=temperature, top_k=top_k, top_p=top_p)
    assert_close(ours, scores.softmax(-1), rtol=1e-4, atol=1e-7)


def test_top_p_by_hand():
    """Holtzman et al. 2020, eq. 2: the smallest set of likeliest tokens that holds at least p."""
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for top_p, kept in (
        (0.4, [0, 1, 0, 0]),
        (0.6, [0, 2 / 3, 0, 1 / 3]),
        (0.8, [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    ):
        p = filtered(logits, temperature=1.0, top_k=None, top_p=top_p)
        assert_close(p, torch.tensor([kept], dtype=torch.float32))


def test_temperature_zero_is_the_limit():
    near = filtered(LOGITS, temperature=1e-4, top_k=None, top_p=None)
    assert_close(filtered(LOGITS, **GREEDY), near, rtol=0, atol=1e-3)


def test_bfloat16_logits_make_a_distribution():
    p = filtered(LOGITS.bfloat16(), temperature=0.7, top_k=None, top_p=0.95)
    assert_close(p.sum(-1), torch.ones(50))


def test_drawn_tokens_follow_the_probabilities(nano):
    decoder = nano(gain=8)
    with torch.no_grad():
        logits = decoder(PROMPT[None])[:, -1]
    p = filtered(logits, temperature=1.0, top_k=5, top_p=None)[0]
    drawn = [generated(decoder, 1, seed=s, temperature=1.0, top_k=5, top_p=None)[0] for s in range(200)]
    counts = torch.bincount(torch.tensor(drawn), minlength=512)
    expected = 200 * p[p > 0]
    assert counts[p == 0].sum() == 0
    chi2 = ((counts[p > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 18.5  # four degrees of freedom: 0.1 %


def test_a_seed_repeats_and_another_differs(nano):
    decoder = nano(gain=8)
    one, again, other = (generated(decoder, 30, seed=s, **PLAIN) for s in (1, 1, 2))
    assert one == again != other


# --- text


@pytest.fixture(scope="module")
def codec():
    return Byte().train(iter([]))


def stream(decoder, codec, *, n_tokens: int = 60, seed: int = 0, **sampling) -> list[str]:
    return list(continuation(decoder, codec, "Où ?", n_tokens=n_tokens, seed=seed, **(PLAIN | sampling)))


@pytest.fixture
def scripted(nano, monkeypatch):
    """`scripted(ids)` is a decoder that generates these."""

    def scripted(ids: list[int]):
        monkeypatch.setattr(generation, "generate", lambda *_, **__: iter(ids))
        return nano("model.vocab_size=257")

    return scripted


def test_pieces_make_up_the_text_and_never_split_a_character(scripted, codec):
    text = "naïve café, π ≈ 3,14 — 日本語 😀👩‍👩‍👧 e\u0301\n\tend"
    pieces = stream(scripted(codec.encode(text)), codec)
    assert "".join(pieces) == text
    assert pieces == list(text)  # a byte a token: a character comes as soon as it is whole


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_up_the_text_of_broken_utf8(scripted, codec, seed):
    """Lead and continuation bytes in any order, cut off anywhere."""
    rng = random.Random(seed)
    ids = [
        rng.choice([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 0xEF, 0xBF, 0xBD])
        for _ in range(50)
    ]
    pieces = stream(scripted(ids), codec)
    assert "".join(pieces) == codec.decode(ids) == bytes(ids).decode(errors="replace")
    assert "" not in pieces


def test_a_character_left_unfinished_is_shown_at_the_end(scripted, codec):
    assert stream(scripted([0x41, 0xE2, 0x82]), codec) == ["A", "\N{REPLACEMENT CHARACTER}"]


def test_end_of_text_ends_it(scripted, codec):
    ids = [*codec.encode("ab"), codec.end_of_text, *codec.encode("cd")]
    assert "".join(stream(scripted(ids), codec)) == "ab"


def test_a_model_writes_what_its_ids_decode_to(nano, codec):
    decoder = nano("model.vocab_size=257", "model.dropout=0.5", gain=8).train()
    text = "".join(stream(decoder, codec))
    assert decoder.training, "left as it was found"
    decoder.eval()  # dropout must have been off
    prompt = torch.tensor([codec.end_of_text, *codec.encode("Où ?")])
    ids = generated(decoder, 60, prompt=prompt, seed=0, **PLAIN)
    ids = ids[: ids.index(codec.end_of_text)] if codec.end_of_text in ids else ids
    assert text == codec.decode(ids)
    assert text == "".join(stream(decoder, codec))
    assert text != "".join(stream(decoder, codec, seed=1))
