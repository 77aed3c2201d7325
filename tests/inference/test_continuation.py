"""Pieces of text against the tokenizer's own decoding, and several prompts against each alone."""

import random
from typing import Any

import pytest
import torch

from scantling.data.tokenizers import Byte
from scantling.inference.continuation import GrowingText, continue_prompts, continue_text
from scantling.inference.generation import generate
from scantling.inference.sampling import GenerationSettings

GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}


def settings(n_tokens: int, **given) -> GenerationSettings:
    return GenerationSettings(n_tokens=n_tokens, **(PLAIN | given))


@pytest.fixture(scope="module")
def codec():
    return Byte().train(iter([]))


def stream(decoder, codec, *, n_tokens: int = 60, seed: int = 0, **given) -> list[str]:
    return list(continue_text(decoder, codec, "Où ?", n_tokens=n_tokens, seed=seed, **(PLAIN | given)))


def pieces_of(codec, ids: list[int], *stop: str) -> list[str]:
    """What a text of these ids comes in, until it is done."""
    text, pieces = GrowingText(codec, stop), []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_done:
            break
    return [piece for piece in [*pieces, text.finish()] if piece]


def test_pieces_make_up_the_text_and_never_split_a_character(codec):
    text = "naïve café, π ≈ 3,14 — 日本語 😀👩‍👩‍👧 e\u0301\n\tend"
    pieces = pieces_of(codec, codec.encode(text))
    assert "".join(pieces) == text
    assert pieces == list(text)  # a byte a token: a character comes as soon as it is whole


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_up_the_text_of_broken_utf8(codec, seed):
    """Lead and continuation bytes in any order, cut off anywhere."""
    rng = random.Random(seed)
    ids = [
        rng.choice([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 0xEF, 0xBF, 0xBD])
        for _ in range(50)
    ]
    assert "".join(pieces_of(codec, ids)) == codec.decode(ids) == bytes(ids).decode(errors="replace")


def test_a_character_left_unfinished_is_shown_at_the_end(codec):
    assert pieces_of(codec, [0x41, 0xE2, 0x82]) == ["A", "\N{REPLACEMENT CHARACTER}"]


def test_end_of_text_ends_it(codec):
    ids = [*codec.encode("ab"), codec.end_of_text, *codec.encode("cd")]
    assert "".join(pieces_of(codec, ids)) == "ab"


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_before_the_first_stop_string(codec, seed):
    """Over few letters, so that stop strings begin often and are often not gone on with."""
    rng = random.Random(seed)
    text = "".join(rng.choice("abé") for _ in range(40))
    stop = ["".join(rng.choice("abé") for _ in range(n)) for n in (5, 4)]
    first = min(
        (text.find(s) + len(s), text.find(s)) for s in [*stop, text] if s in text
    )  # the first to be whole
    expected = text[: first[1]] if any(s in text for s in stop) else text
    assert "".join(pieces_of(codec, codec.encode(text), *stop)) == expected


def test_a_model_writes_what_its_ids_decode_to(nano, codec):
    decoder = nano("model.vocab_size=257", "model.dropout=0.5", gain=8).train()
    text = "".join(stream(decoder, codec))
    assert decoder.training, "left as it was found"
    decoder.eval()  # dropout must have been off
    prompt, generator = [codec.end_of_text, *codec.encode("Où ?")], torch.Generator().manual_seed(0)
    ids = [token for ((_, token),) in generate(decoder, [prompt], settings=settings(60), generator=generator)]
    ids = ids[: ids.index(codec.end_of_text)] if codec.end_of_text in ids else ids
    assert text == codec.decode(ids)
    assert text == "".join(stream(decoder, codec))
    assert text != "".join(stream(decoder, codec, seed=1))


@pytest.mark.parametrize("how", [{}, {"beams": 3}, {"draft": True}], ids=str)
def test_several_prompts_give_the_texts_of_each_alone(nano, codec, how):
    decoder = nano("model.vocab_size=257", gain=8)
    draft = nano("model.vocab_size=257", "model.n_layers=1", gain=8) if how.get("draft") else None
    given = settings(20, stop=("e",), **GREEDY, **{k: v for k, v in how.items() if k == "beams"})

    def texts(prompts):
        found, done = [""] * len(prompts), []
        for row, piece in continue_prompts(decoder, codec, prompts, settings=given, seed=0, draft=draft):
            assert row not in done
            if piece is None:
                done.append(row)
            else:
                found[row] += piece
        assert sorted(done) == list(range(len(prompts)))
        return found

    prompts = ["def ", "a longer prompt ", "", "é"]
    assert texts(prompts) == [texts([prompt])[0] for prompt in prompts]


def test_a_prompt_that_does_not_fit_is_refused_at_once(nano, codec):
    given = settings(5)
    with pytest.raises(
        ValueError, match="70 tokens and the model reads 64: shorten it, or let it read on with context=70"
    ):
        continue_prompts(nano("model.vocab_size=257"), codec, ["x" * 69], settings=given, seed=0)
    with pytest.raises(ValueError, match=r"the model reads 64: shorten it$"):
        continue_prompts(
            nano("model.vocab_size=257", "pos=learned"), codec, ["x" * 69], settings=given, seed=0
        )
    beams = settings(5, beams=2)
    with pytest.raises(ValueError, match="room for n_tokens=4"):
        continue_prompts(nano("model.vocab_size=257"), codec, ["x" * 59], settings=beams, seed=0)
