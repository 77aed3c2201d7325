"""Tokenizers: text to ids and back, and how each kind is trained.

Byte, BPE, Unigram and WordPiece work on bytes, written as the 256 printable characters of GPT-2
(`ByteLevel`): every text goes through them unchanged, also bytes never seen in training. A text
that spells out a special token, such as `<|endoftext|>`, is encoded as ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from scantling.data.hub_access import hub_is_reachable
from scantling.data.token_bytes import count_token_bytes

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
# The byte alphabet in the order of GPT-2's vocabulary, so that ids do not vary between runs.
BYTE_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# What pretrained tokenizers call the end of a document, the commonest first.
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the one special id that language modelling needs.

    Raises ValueError when no end-of-text token is among its special tokens.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        raw.no_truncation()
        raw.no_padding()
        self.fingerprint = hashlib.sha256(raw.to_str().encode()).hexdigest()
        raw.encode_special_tokens = True  # not part of the JSON: set on every load
        self.raw = raw
        added = raw.get_added_tokens_decoder()
        special = {token.content: id_ for id_, token in added.items() if token.special}
        name = next((name for name in END_OF_TEXT_NAMES if name in special), None)
        if name is None:
            raise ValueError(
                f"no end-of-text token: looked for {', '.join(END_OF_TEXT_NAMES)} "
                f"among the special tokens {sorted(special)}"
            )
        self.end_of_text_name, self.end_of_text = name, special[name]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: what an embedding needs."""
        return max(self.raw.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added, and none comes out of the text."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, encoded on all cores."""
        encodings = self.raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens give none, and broken UTF-8 gives U+FFFD."""
        return self.raw.decode(list(ids), skip_special_tokens=True)

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """int64 [vocab_size]: UTF-8 bytes of text that each id stands for, 0 where special.

        Over the ids of a text they add up to its length in bytes. None where that cannot be
        promised, as for SentencePiece-like pretrained tokenizers. An unknown character of a
        `Char` tokenizer counts 0.
        """
        return count_token_bytes(json.loads(self.raw.to_str()), self.vocab_size)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`, the format of the tokenizers library."""
        path.write_text(self.raw.to_str(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read a `tokenizer.json`. Raises ValueError for another file."""
        try:
            return cls(RawTokenizer.from_str(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise FileNotFoundError(f"no tokenizer at {path}") from None
        except Exception as error:
            raise ValueError(f"{path} is not a usable tokenizer.json: {error}") from None


class TokenizerKind(ABC):
    """A way to get a tokenizer from a corpus; `settings` is what the result depends on."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What, beside the kind's name and the corpus, decides the tokenizer. JSON values."""

    @property
    def entries(self) -> int | None:
        """The most entries that the vocabulary can have; None where the corpus alone says."""
        return self.settings.get("vocab_size")

    @abstractmethod
    def train(self, documents: Iterator[str]) -> Tokenizer:
        """The tokenizer for these documents, the training split of a corpus."""


class Byte(TokenizerKind):
    """One id per byte, its value, and end-of-text: a vocabulary of 257."""

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    @property
    def entries(self) -> int:
        return len(BYTE_ALPHABET) + 1

    def train(self, documents: Iterator[str]) -> Tokenizer:
        by_value = {byte_character(value): value for value in range(256)}
        raw = RawTokenizer(models.BPE(vocab=by_value, merges=[]))
        # No cutting into words: with nothing to merge they would only cost time.
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return finish_tokenizer(raw, decoders.ByteLevel())


def byte_character(value: int) -> str:
    """GPT-2's printable character for a byte (bytes_to_unicode in openai/gpt-2's encoder.py).

    Printable Latin-1 stands for itself; the other 68 bytes follow from U+0100 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if value in printable:
        return chr(value)
    return chr(256 + sum(other not in printable for other in range(value)))


class Char(TokenizerKind):
    """One id per character of the training split in code point order, `<unk>`, end-of-text.

    Not lossless: a character that the training split lacks becomes `<unk>`.
    """

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def train(self, documents: Iterator[str]) -> Tokenizer:
        characters: set[str] = set()
        for document in documents:
            characters.update(document)
        vocab = {token: id_ for id_, token in enumerate([*sorted(characters), UNKNOWN])}
        raw = RawTokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
        return finish_tokenizer(raw, decoders.Fuse())


class LearnedKind(TokenizerKind):
    """A kind whose pieces of bytes are learned from the training split.

    `vocab_size`: most tokens in all, end-of-text included; a small corpus gives fewer.
    `train_bytes`: how many bytes from the start of the training split to learn from; None: all.

    Raises ValueError for a vocabulary without room for every byte, and for no bytes to learn from.
    """

    ENTRIES_PER_BYTE: ClassVar[int] = 1

    def __init__(self, *, vocab_size: int, train_bytes: int | None) -> None:
        kind, least = type(self).__name__.lower(), self.ENTRIES_PER_BYTE * len(BYTE_ALPHABET) + 1
        if vocab_size < least:
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} is too small for {kind}: "
                f"the bytes and end-of-text alone need {least}"
            )
        if train_bytes is not None and train_bytes < 1:
            raise ValueError(f"tokenizer.train_bytes={train_bytes} must be at least 1; null takes all")
        self.vocab_size, self.train_bytes = vocab_size, train_bytes

    @property
    def settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "train_bytes": self.train_bytes}


class BPE(LearnedKind):
    """Byte-level byte-pair encoding with GPT-2's pre-tokenisation.

    Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2).
    """

    def train(self, documents: Iterator[str]) -> Tokenizer:
        raw = RawTokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size - 1,  # end-of-text comes on top
            initial_alphabet=BYTE_ALPHABET,
            show_progress=False,
        )
        raw.train_from_iterator(take_bytes(documents, self.train_bytes), trainer)
        return finish_tokenizer(raw, decoders.ByteLevel())


class Unigram(LearnedKind):
    """A unigram language model over pieces of bytes. Kudo 2018, arXiv:1804.10959.

    Training is slow: several times BPE's.
    """

    def train(self, documents: Iterator[str]) -> Tokenizer:
        raw = RawTokenizer(models.Unigram())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.UnigramTrainer(
            vocab_size=self.vocab_size - 1,
            initial_alphabet=BYTE_ALPHABET,
            show_progress=False,
        )
        raw.train_from_iterator(take_bytes(documents, self.train_bytes), trainer)
        # Rounded: the library's JSON reader is exact only for short numbers, and a tokenizer
        # must keep its fingerprint when it is saved and loaded.
        learned = json.loads(raw.to_str())["model"]["vocab"]
        pieces = [(piece, round(score, 6)) for piece, score in learned]
        raw.model = models.Unigram(vocab=self.with_all_bytes(pieces))
        return finish_tokenizer(raw, decoders.ByteLevel())

    def with_all_bytes(self, pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
        """The best-scored pieces, and every byte: a byte without a piece could not be encoded."""
        room = self.vocab_size - 1 - len(BYTE_ALPHABET)
        longer = [entry for entry in pieces if len(entry[0]) > 1]
        longer = sorted(longer, key=lambda entry: -entry[1])[:room]
        scores = dict(pieces)
        lowest = min(scores.values(), default=0.0) - 1.0
        return [(byte, scores.get(byte, lowest)) for byte in BYTE_ALPHABET] + longer


class WordPiece(LearnedKind):
    """WordPiece on bytes: the longest known piece first. Wu et al. 2016, arXiv:1609.08144.

    A piece inside a word is marked with a fullwidth ＃＃ instead of BERT's ##: no byte is
    written that way, so a text containing "##" cannot be taken for the mark. Words are cut after
    64 bytes, because longest-match takes quadratic time in the length of a word. Each byte needs
    two entries, at the start of a word and inside.
    """

    ENTRIES_PER_BYTE = 2
    INSIDE = "＃＃"
    LONGEST_WORD = 64  # bytes

    def train(self, documents: Iterator[str]) -> Tokenizer:
        raw = RawTokenizer(models.WordPiece())
        raw.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.FixedLength(length=self.LONGEST_WORD),
            ]
        )
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size - 1,
            initial_alphabet=BYTE_ALPHABET,
            continuing_subword_prefix=self.INSIDE,
            show_progress=False,
        )
        raw.train_from_iterator(take_bytes(documents, self.train_bytes), trainer)
        learned = json.loads(raw.to_str())["model"]["vocab"]
        bytes_twice = [*BYTE_ALPHABET, *(self.INSIDE + byte for byte in BYTE_ALPHABET)]
        required = set(bytes_twice)
        # In the order learned: what has to go for the missing bytes is the least frequent.
        longer = [piece for piece in sorted(learned, key=learned.get) if piece not in required]
        pieces = [*bytes_twice, *longer[: self.vocab_size - 1 - len(bytes_twice)]]
        raw.model = models.WordPiece(
            vocab={piece: id_ for id_, piece in enumerate(pieces)},
            unk_token=pieces[0],  # must exist, never used: every byte has a piece
            max_input_chars_per_word=self.LONGEST_WORD,
            continuing_subword_prefix=self.INSIDE,
        )
        strip = decoders.Replace(self.INSIDE, "")
        return finish_tokenizer(raw, decoders.Sequence([strip, decoders.ByteLevel()]))


class Pretrained(TokenizerKind):
    """A tokenizer made elsewhere.

    `source`: a tokenizer.json, a directory holding one, or a name on the Hugging Face Hub.
    Raises FileNotFoundError for a name that is neither here nor on a Hub that answers, and
    ValueError where the file is not a tokenizer or has no end-of-text token.
    """

    def __init__(self, *, source: str) -> None:
        self.source = source

    @property
    def settings(self) -> dict[str, Any]:
        # What it is and not where it came from: moving the file must not miss the cache.
        return {"tokenizer": self.tokenizer.fingerprint}

    @property
    def entries(self) -> int:
        return self.tokenizer.vocab_size

    def train(self, documents: Iterator[str]) -> Tokenizer:
        return self.tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Read once, from a file or from the Hub."""
        path = Path(self.source).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        if path.exists() or path.suffix == ".json":
            return Tokenizer.load(path)
        reachable = hub_is_reachable()
        try:
            raw = RawTokenizer.from_pretrained(self.source)
        except Exception as error:
            why = str(error).splitlines()[0] if reachable else "the Hub cannot be reached"
            raise FileNotFoundError(
                f"no tokenizer {self.source!r}: not a file or directory here, not in the Hub's "
                f"cache, and {why}"
            ) from None
        return Tokenizer(raw)


def finish_tokenizer(raw: RawTokenizer, decoder: decoders.Decoder) -> Tokenizer:
    """Set the decoder and give end-of-text the id after the last."""
    raw.decoder = decoder
    raw.add_special_tokens([END_OF_TEXT])
    return Tokenizer(raw)


def take_bytes(documents: Iterator[str], limit: int | None) -> Iterator[str]:
    """Whole documents until `limit` bytes of UTF-8 have come."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document.encode())
        if limit is not None and seen >= limit:
            return
