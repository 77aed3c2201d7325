"""What is read off checkpoints, against the same numbers by PyTorch and by an eigendecomposition."""

import json
import os

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from scantling.data.corpora import TextFiles
from scantling.data.tokenizers import BPE, Byte, Char, Pretrained, Tokenizer, WordPiece
from scantling.data.tokens import prepare_corpus
from scantling.inference.views import (
    BEGINNING,
    frequent_words,
    ids_by_frequency,
    nearest_vectors,
    principal_places,
    token_kind,
    token_label,
    token_text,
    views_of,
)

SMALL = BPE(vocab_size=700, train_bytes=None)


@pytest.fixture
def run(checkpointed, tmp_path):
    """`run("attn=gqa")` -> a run with a vocabulary of its own and three checkpoints, its decoders, its
    tokenizer.
    """

    def run(*overrides, **settings):
        directory, decoders = checkpointed(
            tmp_path / "run", *overrides, **{"steps": (3, 40, 200), "kind": SMALL} | settings
        )
        (directory.path / "env.json").write_text(json.dumps({"corpus": {"fingerprint": "none"}}))
        return directory, decoders, Tokenizer.load(directory.tokenizer)

    return run


def test_neighbours_are_those_of_the_largest_cosine(run):
    directory, decoders, tokenizer = run()
    found = views_of(directory, tokens=["self", " self"], prompt=None).neighbours
    assert found is not None
    assert (found.steps, found.words) == ((3, 40, 200), ("self", "␣self"))
    for i, decoder in enumerate(decoders):
        table = decoder.embed.tokens.weight.detach().double()
        for word, nearest in zip(("self", " self"), found.nearest[i], strict=True):
            (id_,) = tokenizer.encode(word)
            cosines = cosine_similarity(table[id_], table, dim=-1)
            cosines[id_] = -2
            best = cosines.topk(6)
            assert [name for name, _ in nearest] == [token_label(tokenizer, j) for j in best.indices.tolist()]
            assert [cosine for _, cosine in nearest] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_what_a_token_enters_the_model_with_is_compared(run):
    """A factorised table's rows are narrow, and what the model reads is wide and normed."""
    directory, decoders, tokenizer = run("embed=factorised")
    found = views_of(directory, tokens=["self"], prompt=None).neighbours
    assert found is not None
    with torch.no_grad():
        entering = decoders[-1].embed(torch.arange(tokenizer.vocab_size)[None])[0]
    (id_,) = tokenizer.encode("self")
    best = cosine_similarity(entering[id_], entering, dim=-1).topk(7)
    assert [cosine for _, cosine in found.nearest[-1][0]] == pytest.approx(best.values[1:].tolist(), abs=1e-5)


def test_places_are_those_of_an_eigendecomposition():
    """And other steps stand on the axes of the last."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((3, 90, 6)) * [5, 3, 1, 1, 1, 1] @ rng.standard_normal((6, 6)) + 2
    places, shares = principal_places(vectors)
    last = vectors[-1]
    values, axes = np.linalg.eigh(np.cov(last.T))
    for axis in (0, 1):
        direction = axes[:, -1 - axis]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        expected = (vectors - last.mean(0)) @ direction
        np.testing.assert_allclose(places[..., axis], expected, atol=1e-9)
        assert shares[-1, axis] == pytest.approx(values[-1 - axis] / values.sum())
        share = np.var(vectors[0] @ direction) / np.trace(np.cov(vectors[0].T, ddof=0))
        assert shares[0, axis] == pytest.approx(share)


def test_the_map_shows_every_step(run):
    directory, decoders, tokenizer = run()
    found = views_of(directory, tokens=["self"], prompt=None).map
    assert found is not None
    assert found.places.shape == (3, 400, 2)
    assert (found.words[0], found.named[:3]) == ("self", (True, False, False))
    ids = [tokenizer.encode("self")[0], *(i for i in range(400) if i != tokenizer.encode("self")[0])][:400]
    tables = [decoder.embed.tokens.weight.detach().double().numpy()[ids] for decoder in decoders]
    np.testing.assert_allclose(found.places, principal_places(np.stack(tables))[0], atol=1e-6)


def test_a_damaged_checkpoint_is_left_out_and_named(run):
    directory, *_ = run()
    file = directory.checkpoint(40)
    os.truncate(file, file.stat().st_size // 2)
    found = views_of(directory, tokens=None, prompt=None)
    assert found.map is not None
    assert found.map.steps == (3, 200)
    assert f"{file} cannot be read, and is left out." in found.notes
    assert "steps 3 and 200, all that are kept" in found.notes[0]
    assert "checkpoint.keep=" in found.notes[0]


def test_frequent_tokens_and_the_prompt_are_of_the_held_out_text(run, book, tmp_path):
    directory, _, tokenizer = run()
    corpus = TextFiles(files=str(book), column="text", split="tail", val_fraction=0.2)
    tokens = prepare_corpus(
        corpus, Pretrained(source=str(directory.tokenizer)), tmp_path / "cache"
    ).val.tokens
    environment = {"corpus": {"fingerprint": corpus.fingerprint}}
    (directory.path / "env.json").write_text(json.dumps(environment))
    found = views_of(directory, tokens=None, prompt=None)
    ids, counts = np.unique(tokens, return_counts=True)
    words = {i: n for i, n in zip(ids, counts, strict=True) if token_text(tokenizer, i).strip().isalpha()}
    several = {i: n for i, n in words.items() if len(token_text(tokenizer, i).strip()) > 1}
    expected = sorted(several, key=lambda i: (-several[i], i))[:12]
    assert found.neighbours is not None
    assert found.neighbours.words == tuple(token_label(tokenizer, i) for i in expected)
    shown = [tokenizer.end_of_text, *tokens[:BEGINNING].tolist()]
    assert found.attention is not None
    assert found.attention.words == tuple(token_label(tokenizer, i) for i in shown)
    assert len(found.notes) == 1


def test_without_its_text_a_run_begins_as_it_wrote(run):
    directory, _, tokenizer = run()
    directory.samples.write_text(json.dumps({"step": 200, "text": "import os"}) + "\n")
    found = views_of(directory, tokens=None, prompt=None)
    ids = [tokenizer.end_of_text, *tokenizer.encode("import os")]
    assert found.attention is not None
    assert found.attention.words == tuple(token_label(tokenizer, i) for i in ids)
    assert found.attention.weights.shape == (2, 4, len(ids), len(ids))
    assert any("not in the cache" in note for note in found.notes)
    assert list(ids_by_frequency(None, 5)) == [0, 1, 2, 3, 4]


def test_of_a_mixer_without_weights_the_rest_is_shown(run):
    directory, *_ = run("attn=performer")
    directory.samples.write_text(json.dumps({"step": 200, "text": "import os"}) + "\n")
    found = views_of(directory, tokens=None, prompt=None)
    assert found.attention is None
    assert found.map is not None
    assert "No maps of attention: Performer takes no softmax over keys" in found.notes[-1]


REFUSED = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "one + " * 40}, "tokens and the model reads 64: shorten it"),
    ({"prompt": "1 + " * 25}, "and a map is readable up to 48: shorten it"),
    (
        {"tokens": ["self", "selfself"]},
        'tokens: "selfself" is not a token of this run, whose tokenizer cuts it into "self", "self"',
    ),
    ({"tokens": ["def"]}, 'cuts it into "de", "f"; with a space before it is one: tokens=.*" def"'),
    ({"tokens": [""]}, 'tokens: "" is not a token of this run; with a space before it is one: tokens='),
]


def test_what_cannot_be_shown_is_refused(run):
    directory, *_ = run()
    for asked, complaint in REFUSED:
        with pytest.raises(ValueError, match=complaint.replace("+", r"\+")):
            views_of(directory, **{"tokens": None, "prompt": None} | asked)


@pytest.mark.parametrize("tokenizer", [SMALL, Byte(), Char(), WordPiece(vocab_size=700, train_bytes=None)])
def test_labels_spell_out_a_text(tokenizer):
    text = "def f(self):\n    return self.x  # ok 17\n"
    codec = tokenizer.train(iter([text * 20]))
    ids = codec.encode(text)
    assert "".join(token_text(codec, id_) for id_ in ids) == text
    shown = "".join(token_label(codec, id_) for id_ in ids)
    assert shown.replace("␣×4", "␣␣␣␣") == text.replace(" ", "␣").replace("\n", "↵")
    assert token_label(codec, codec.end_of_text) == "<|endoftext|>"


def test_parts_of_characters_are_named_by_their_id():
    codec = Byte().train(iter(()))
    assert [token_label(codec, id_) for id_ in codec.encode("é\x00a")] == ["⟨195⟩", "⟨169⟩", "⟨0⟩", "a"]
    assert [token_kind(text) for text in (" a", "a", "7", " 7", "  ", "(", "")] == [
        "letters after a space",
        "letters",
        "digits",
        "digits",
        *["signs and space"] * 3,
    ]
    order = [*codec.encode("e = 1a"), 200]
    assert [token_text(codec, id_) for id_ in frequent_words(codec, np.array(order))] == ["e", "a"]


def test_no_vector_is_its_own_neighbour():
    found = nearest_vectors(
        np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [-1.0, 0.1]]), n_words=1, n_nearest=8
    )
    assert [i for i, _ in found[0]] == [1, 2, 3]
    assert found[0][0][1] == pytest.approx(1.0)
