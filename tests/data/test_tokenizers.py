"""Tokenizers give every text back, and agree with the tokenizers library."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from scantling.data.tokenizers import (
    BPE,
    Byte,
    Char,
    Pretrained,
    Tokenizer,
    Unigram,
    WordPiece,
    byte_character,
)

ENGLISH = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 5,
    "def fox(dog):\n    return dog.sleeps()  # the dog sleeps\n\n" * 5,
    "When shall we three meet again? In thunder, lightning, or in rain?\n" * 5,
]
ADVERSARIAL = [
    "",
    " ",
    "a\r\n\t  b\n\n\n   c  ",
    "##! ## ##a ##",
    "＃＃a ▁b Ġc Ċ",
    "<|endoftext|>",
    "x<|endoftext|><unk></s>y",
    "[UNK] [PAD]",
    "日本語 עברית हिन्दी",
    "😀 👩\u200d👩\u200d👧\u200d👦 e\u0301 é \ufeff\u202e",
    "\x00\x01\x7f\x80\x85\u2028",
    "it's they'll I'D",
    "\ud7ff\ue000\uffff\U0010ffff",
    " " * 700 + "x" * 700 + "=" * 700,
]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Of a tokenizer that can tell."""
    counts = tokenizer.token_bytes
    assert counts is not None
    return counts


def random_texts(n: int) -> list[str]:
    """Random code points from every plane but the surrogates."""
    rng = random.Random(5)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 60))) for _ in range(n)
    ]


LOSSLESS = {
    "byte": Byte(),
    "bpe": BPE(vocab_size=320, train_bytes=None),
    "bpe without room": BPE(vocab_size=257, train_bytes=None),
    "unigram": Unigram(vocab_size=320, train_bytes=None),
    "unigram without room": Unigram(vocab_size=257, train_bytes=None),
    "wordpiece": WordPiece(vocab_size=560, train_bytes=None),
    "wordpiece without room": WordPiece(vocab_size=513, train_bytes=None),
}


@pytest.fixture(scope="module", params=LOSSLESS)
def lossless(request) -> tuple[Tokenizer, int]:
    kind = LOSSLESS[request.param]
    return kind.train(iter(ENGLISH)), kind.settings.get("vocab_size", 257)


def test_every_text_comes_back_and_its_bytes_add_up(lossless):
    tokenizer, _ = lossless
    texts = ADVERSARIAL + random_texts(300) + ENGLISH
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode(text)
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
        assert tokenizer.end_of_text not in ids


def test_size_is_never_exceeded_and_end_of_text_is_last(lossless):
    tokenizer, vocab_size = lossless
    assert tokenizer.vocab_size <= vocab_size
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert token_bytes(tokenizer)[tokenizer.end_of_text] == 0
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


def test_a_saved_tokenizer_is_the_same_tokenizer(lossless, tmp_path):
    tokenizer, _ = lossless
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    texts = ADVERSARIAL + ENGLISH
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert np.array_equal(token_bytes(loaded), token_bytes(tokenizer))


# Little text gives Unigram few pieces that are worth keeping.
@pytest.mark.parametrize(("name", "ratio"), [("bpe", 0.6), ("unigram", 0.9), ("wordpiece", 0.6)])
def test_training_learns_to_shorten_its_text(name, ratio):
    tokenizer = LOSSLESS[name].train(iter(ENGLISH))
    n_ids = sum(len(ids) for ids in tokenizer.encode_batch(ENGLISH))
    assert n_ids < ratio * sum(len(text.encode()) for text in ENGLISH)


def words(text: str) -> list[str]:
    """GPT-2's words of a text, in the byte alphabet."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]


def model_of(tokenizer: Tokenizer, path) -> dict:
    tokenizer.save(path)
    return json.loads(path.read_text(encoding="utf-8"))["model"]


def test_unigram_finds_the_likeliest_segmentation(tmp_path):
    """Kudo 2018: the pieces with the largest sum of log probabilities, found here by recursion."""
    tokenizer = LOSSLESS["unigram"].train(iter(ENGLISH))
    vocab = model_of(tokenizer, tmp_path / "t.json")["vocab"]
    score = dict(vocab)

    def best(word: str) -> float:
        sums = [0.0]
        for end in range(1, len(word) + 1):
            known = [start for start in range(end) if word[start:end] in score]
            sums.append(max(sums[start] + score[word[start:end]] for start in known))
        return sums[-1]

    for text in ENGLISH:
        found = sum(vocab[i][1] for i in tokenizer.encode(text))
        assert found == pytest.approx(sum(best(word) for word in words(text)), abs=1e-6)


def test_wordpiece_takes_the_longest_piece_first(tmp_path):
    """Wu et al. 2016, as BERT's tokenization.py does it."""
    tokenizer = LOSSLESS["wordpiece"].train(iter(ENGLISH))
    vocab = model_of(tokenizer, tmp_path / "t.json")["vocab"]

    def greedy(word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word):
            mark = WordPiece.INSIDE if start else ""
            end = max(e for e in range(start + 1, len(word) + 1) if mark + word[start:e] in vocab)
            ids.append(vocab[mark + word[start:end]])
            start = end
        return ids

    for text in ENGLISH:
        assert tokenizer.encode(text) == [i for word in words(text) for i in greedy(word)]


def test_byte_ids_are_the_bytes():
    tokenizer = Byte().train(iter([]))
    for text in ADVERSARIAL + random_texts(50):
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.vocab_size == 257


def test_byte_characters_are_the_librarys():
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(chr(i) for i in range(0x100)) + "ÿ€\U0001f600\U000c0000"
    [(written, _)] = pre_tokenizer.pre_tokenize_str(text)
    assert written == "".join(byte_character(byte) for byte in text.encode())
    alphabet = {byte_character(value) for value in range(256)}
    assert alphabet == set(pre_tokenizers.ByteLevel.alphabet())


def test_bpe_encodes_as_the_library_alone_does():
    """Another way to the same ids: the library's own byte-level BPE on the same merges."""
    tokenizer = BPE(vocab_size=400, train_bytes=None).train(iter(ENGLISH))
    reference = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    reference.train_from_iterator(ENGLISH, vocab_size=399, min_frequency=1, show_progress=False)
    for text in ENGLISH + ADVERSARIAL:
        ours = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        theirs = [reference.decode([i]) for i in reference.encode(text).ids]
        assert ours == theirs


def test_char_is_nanogpts_with_two_more():
    """nanoGPT numbers sorted(set(text)) from 0."""
    text = "".join(ENGLISH)
    tokenizer = Char().train(iter(ENGLISH))
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text) == [ids[c] for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(ids) + 2
    assert tokenizer.decode(tokenizer.encode("dog é")) == "dog <unk>"
    assert token_bytes(tokenizer)[tokenizer.encode("dog é")].tolist() == [1, 1, 1, 1, 0]


def test_char_counts_bytes_not_characters():
    tokenizer = Char().train(iter(["aé日😀"]))
    assert token_bytes(tokenizer)[tokenizer.encode("aé日😀")].tolist() == [1, 2, 3, 4]


def test_train_bytes_stops_reading():
    def documents():
        yield from ENGLISH
        raise AssertionError("read on")

    n = sum(len(text.encode()) for text in ENGLISH)
    BPE(vocab_size=300, train_bytes=n).train(documents())


@pytest.mark.parametrize(("kind", "least"), [(BPE, 257), (Unigram, 257), (WordPiece, 513)])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(kind, least):
    kind(vocab_size=least, train_bytes=None)
    with pytest.raises(ValueError, match=f"vocab_size={least - 1} .*need {least}"):
        kind(vocab_size=least - 1, train_bytes=None)
    with pytest.raises(ValueError, match="train_bytes=0"):
        kind(vocab_size=least, train_bytes=0)


# --- tokenizers made elsewhere


def word_tokenizer(end: str) -> tokenizers.Tokenizer:
    raw = tokenizers.Tokenizer(models.WordLevel({"the": 0, "dog": 1, "?": 2}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_special_tokens([end])
    raw.enable_truncation(1)
    raw.enable_padding(length=9)
    raw.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=[(end, 3)])
    return raw


def test_pretrained_finds_end_of_text_and_leaves_text_whole(tmp_path):
    word_tokenizer("</s>").save(str(tmp_path / "tokenizer.json"))
    for source in [tmp_path, tmp_path / "tokenizer.json"]:
        kind = Pretrained(source=str(source))
        tokenizer = kind.train(iter([]))
        assert tokenizer.end_of_text == 3
        assert tokenizer.encode("the dog the") == [0, 1, 0]  # not cut, padded or wrapped
        assert tokenizer.token_bytes is None  # it drops the spaces
        assert kind.settings == {"tokenizer": tokenizer.fingerprint}


def test_pretrained_byte_level_counts_bytes_and_others_do_not(tmp_path):
    source = tmp_path / "tokenizer.json"
    BPE(vocab_size=300, train_bytes=None).train(iter(ENGLISH)).save(source)
    tokenizer = Pretrained(source=str(source)).train(iter([]))
    for text in ADVERSARIAL:
        assert token_bytes(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())
    raw = tokenizers.Tokenizer.from_file(str(source))
    raw.normalizer = normalizers.NFC()
    assert Tokenizer(raw).token_bytes is None
    raw = tokenizers.Tokenizer.from_file(str(source))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert Tokenizer(raw).token_bytes is None
    raw = tokenizers.Tokenizer.from_file(str(source))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert Tokenizer(raw).token_bytes is None


def test_pretrained_mistakes_get_one_line(tmp_path):
    word_tokenizer("<cls>").save(str(tmp_path / "no_end.json"))
    (tmp_path / "broken.json").write_text("{")
    for name, kind, words in [
        ("no_end.json", ValueError, "no end-of-text token"),
        ("broken.json", ValueError, "not a usable tokenizer.json"),
        ("missing.json", FileNotFoundError, "no tokenizer at"),
        ("", FileNotFoundError, "no tokenizer at"),  # a directory without one
    ]:
        with pytest.raises(kind, match=words) as caught:
            Pretrained(source=str(tmp_path / name)).train(iter([]))
        assert "\n" not in str(caught.value)
