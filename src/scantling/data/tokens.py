"""The token ids of a corpus, kept on disk and read through a memory map.

    <cache_dir>/tokenizers/<key>/tokenizer.json
    <cache_dir>/tokens/<key>/{train,val}.tokens.bin      flat ids, uint16 or uint32
                             {train,val}.documents.bin   int64: where each document starts
                             meta.json                   what it was made from, and counts

A document is followed by the end-of-text id. `key` is a hash of the corpus's fingerprint, the
tokenizer's kind and its settings. A directory is made under another name and then renamed, so
it is there whole or not at all; the scheme follows OLMo-core's flat token files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scantling.data.cache_directory import publish, under_construction
from scantling.data.corpora import Corpus, Split
from scantling.data.progress import Progress
from scantling.data.tokenizers import Tokenizer, TokenizerKind

FORMAT = 1  # part of the key: raise it when the meaning of the files changes
SPLITS: tuple[Split, ...] = ("train", "val")
# Encodings take some hundred bytes of memory per token, so text is encoded in batches of a few
# MB; a longer document goes in pieces, which also gives every core work.
BATCH_CHARACTERS = 2_000_000
PIECE_CHARACTERS = 100_000
# Between these two characters a line break is a word of its own to the byte-level tokenizers,
# so pieces cut after it encode to the same ids as the whole.
SAFE_CUT = re.compile(r"(?<=\S)\n(?=[A-Za-z])")


@dataclass(frozen=True)
class TokenSplit:
    """One split. `tokens`: read-only memory map [n_tokens] of uint16 or uint32.

    `document_starts`: int64 [n_documents], offsets into `tokens`. `n_bytes`: UTF-8 bytes of the
    documents' text (end-of-text has none).
    """

    tokens: np.memmap
    document_starts: np.ndarray
    n_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end-of-text tokens counted: turns nats into bits per byte."""
        return self.n_bytes / len(self.tokens)


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus in ids. `fingerprint` and `description` are the corpus's own."""

    train: TokenSplit
    val: TokenSplit
    tokenizer: Tokenizer
    fingerprint: str
    description: str

    @property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text behind each id [V]; the validation split's mean where the tokenizer cannot tell."""
        exact = self.tokenizer.token_bytes
        mean = self.val.bytes_per_token
        return np.full(self.tokenizer.vocab_size, mean) if exact is None else exact


def prepare_corpus(corpus: Corpus, tokenizer_kind: TokenizerKind, cache_dir: Path) -> TokenizedCorpus:
    """Train the tokenizer and tokenize the corpus, or read both from the cache.

    Safe to call from several processes at once: each works under a name of its own, the first to
    finish provides the result and the others use it. A cache that is damaged is made again.

    Raises PermissionError where the cache cannot be written, ValueError where the disk is full
    or the corpus is at fault, and what the corpus raises.
    """
    cache_dir = absolute(cache_dir)
    kind = type(tokenizer_kind).__name__
    made_from = {
        "format": FORMAT,
        "corpus": corpus.fingerprint,
        "kind": kind,
        "settings": tokenizer_kind.settings,
    }
    try:
        tokenizer = prepare_tokenizer(corpus, tokenizer_kind, cache_dir / "tokenizers" / cache_key(made_from))
        directory = tokens_directory(corpus.fingerprint, tokenizer, cache_dir)
        return prepare_tokens(corpus, tokenizer, made_from, directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"no space left for tokens in {cache_dir}; free some or choose another cache_dir"
            ) from None
        raise


def cached_tokens(fingerprint: str, tokenizer: Tokenizer, cache_dir: Path) -> TokenizedCorpus | None:
    """What `prepare_corpus` made of the corpus of this fingerprint, where the cache still has it."""
    return open_tokens(tokens_directory(fingerprint, tokenizer, absolute(cache_dir)), tokenizer)


def absolute(cache_dir: Path) -> Path:
    """The path from the root, `~` spelled out."""
    return cache_dir.expanduser().absolute()


def tokens_directory(fingerprint: str, tokenizer: Tokenizer, cache_dir: Path) -> Path:
    """Where a tokenizer's ids of a corpus are kept, however the tokenizer came about."""
    tokens_from = {"format": FORMAT, "corpus": fingerprint, "tokenizer": tokenizer.fingerprint}
    return cache_dir / "tokens" / cache_key(tokens_from)


def cache_key(made_from: dict[str, Any]) -> str:
    """24 hex digits of the sha256 of what a cached directory was made from."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:24]


def prepare_tokenizer(corpus: Corpus, kind: TokenizerKind, directory: Path) -> Tokenizer:
    """Read the tokenizer from `directory`, or train it on the training split and write it there."""

    def usable() -> Tokenizer | None:
        try:
            return Tokenizer.load(directory / "tokenizer.json")
        except (FileNotFoundError, ValueError):
            return None

    tokenizer = usable()
    if tokenizer is not None:
        return tokenizer
    with under_construction(directory) as building:
        with Progress(f"training the {type(kind).__name__} tokenizer") as progress:
            kind.train(progress.count(corpus.documents("train"))).save(building / "tokenizer.json")
        publish(building, directory, is_usable=lambda: usable() is not None)
    tokenizer = usable()
    assert tokenizer is not None, directory
    return tokenizer


def prepare_tokens(
    corpus: Corpus, tokenizer: Tokenizer, made_from: dict[str, Any], directory: Path
) -> TokenizedCorpus:
    """Read the tokens from `directory`, or tokenize both splits and write them there."""
    prepared = open_tokens(directory, tokenizer)
    if prepared is not None:
        return prepared
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    with under_construction(directory) as building:
        counts = {split: write_split(corpus, split, tokenizer, dtype, building) for split in SPLITS}
        meta = {
            "format": FORMAT,
            "corpus": {"fingerprint": corpus.fingerprint, "description": corpus.describe()},
            "tokenizer": {
                "kind": made_from["kind"],
                "settings": made_from["settings"],
                "fingerprint": tokenizer.fingerprint,
            },
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype.name,
            **counts,
        }
        (building / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        publish(building, directory, is_usable=lambda: open_tokens(directory, tokenizer) is not None)
    prepared = open_tokens(directory, tokenizer)
    assert prepared is not None, directory
    return prepared


def open_tokens(directory: Path, tokenizer: Tokenizer) -> TokenizedCorpus | None:
    """The cache, or None where it is missing, damaged, or made with another tokenizer."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        if meta["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
            return None
        splits = {}
        for split in SPLITS:
            tokens = np.memmap(directory / f"{split}.tokens.bin", np.dtype(meta["dtype"]), "r")
            starts = np.fromfile(directory / f"{split}.documents.bin", np.int64)
            counts = meta[split]
            if len(tokens) != counts["n_tokens"] or len(starts) != counts["n_documents"]:
                return None
            splits[split] = TokenSplit(tokens, starts, counts["n_bytes"])
        return TokenizedCorpus(
            **splits,
            tokenizer=tokenizer,
            fingerprint=meta["corpus"]["fingerprint"],
            description=meta["corpus"]["description"],
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None  # ValueError: broken JSON, or a file that is no whole number of ids


def write_split(
    corpus: Corpus, split: Split, tokenizer: Tokenizer, dtype: np.dtype, directory: Path
) -> dict[str, int]:
    """Write the two files of a split; returns the counts for meta.json."""
    n_tokens = n_bytes = 0
    starts: list[int] = []
    end = np.array([tokenizer.end_of_text], dtype)
    with (
        (directory / f"{split}.tokens.bin").open("wb") as file,
        Progress(f"tokenizing the {split} split") as progress,
    ):
        for batch in batch_pieces(progress.count(corpus.documents(split)), tokenizer):
            encoded = tokenizer.encode_batch([text for text, _, _ in batch])
            for (text, is_start, is_end), ids in zip(batch, encoded, strict=True):
                if is_start:
                    starts.append(n_tokens)
                file.write(np.array(ids, dtype).tobytes())
                n_tokens += len(ids)
                n_bytes += len(text.encode())
                if is_end:
                    file.write(end.tobytes())
                    n_tokens += 1
        file.flush()
        os.fsync(file.fileno())
    np.array(starts, np.int64).tofile(directory / f"{split}.documents.bin")
    return {"n_tokens": n_tokens, "n_documents": len(starts), "n_bytes": n_bytes}


Piece = tuple[str, bool, bool]  # text, whether it starts a document, whether it ends one


def batch_pieces(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Pieces of documents in order, in lists of about `BATCH_CHARACTERS`."""
    batch: list[Piece] = []
    size = 0
    for document in documents:
        for piece in cut_document(document, tokenizer):
            batch.append(piece)
            size += len(piece[0])
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def cut_document(document: str, tokenizer: Tokenizer) -> Iterator[Piece]:
    """A long document in pieces that encode to the ids of the whole."""
    start = 0
    # Only where tokens are bytes of the text as it stands: others may act on a text's start.
    if tokenizer.token_bytes is not None:
        while len(document) - start > PIECE_CHARACTERS:
            cut = SAFE_CUT.search(document, start + PIECE_CHARACTERS)
            if cut is None:
                break
            yield document[start : cut.end()], start == 0, False
            start = cut.end()
    yield document[start:], start == 0, True
