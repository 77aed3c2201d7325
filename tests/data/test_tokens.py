"""What is read back from the cache is the corpus, whoever wrote it and whatever went wrong."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from scantling.data import cache_directory, tokens
from scantling.data.corpora import Corpus, TextFiles
from scantling.data.tokenizers import BPE, Byte, Char, Pretrained, Tokenizer, Unigram, WordPiece
from scantling.data.tokens import TokenSplit, prepare_corpus

DOCUMENTS = [
    f"Chapter {i}\r\n\tIt was a dark and <|endoftext|> stormy night; 雨 fell. 😀\n" * (1 + i % 5)
    for i in range(200)
]
KINDS = {
    "byte": Byte(),
    "char": Char(),
    "bpe": BPE(vocab_size=400, train_bytes=None),
    "unigram": Unigram(vocab_size=400, train_bytes=None),
    "wordpiece": WordPiece(vocab_size=600, train_bytes=None),
}


@pytest.fixture
def corpus(tmp_path) -> TextFiles:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return TextFiles(files=str(path), column="text", val_fraction=0.2, split="documents")


def decode(split: TokenSplit, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, cut where document_starts says."""
    ends = [*split.document_starts[1:].tolist(), len(split.tokens)]
    documents = []
    for start, end in zip(split.document_starts.tolist(), ends, strict=True):
        ids = split.tokens[start:end].tolist()
        assert ids[-1] == tokenizer.end_of_text
        assert tokenizer.end_of_text not in ids[:-1]
        documents.append(tokenizer.decode(ids[:-1]))
    return documents


def assert_is(prepared: tokens.TokenizedCorpus, corpus: Corpus) -> None:
    for split in tokens.SPLITS:
        read = getattr(prepared, split)
        written = list(corpus.documents(split))
        assert decode(read, prepared.tokenizer) == written
        assert read.n_bytes == sum(len(document.encode()) for document in written)
    assert prepared.fingerprint == corpus.fingerprint
    assert prepared.description == corpus.describe()


def leftovers(cache: Path) -> list[Path]:
    return [p for p in cache.glob("*/*") if p.name.count(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_back_exactly(corpus, tmp_path, kind):
    prepared = prepare_corpus(corpus, KINDS[kind], tmp_path / "cache")
    assert_is(prepared, corpus)
    assert not prepared.train.tokens.flags.writeable
    assert prepared.val.bytes_per_token == prepared.val.n_bytes / len(prepared.val.tokens)
    again = prepare_corpus(corpus, KINDS[kind], tmp_path / "cache")
    assert np.array_equal(again.train.tokens, prepared.train.tokens)
    assert again.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    assert leftovers(tmp_path / "cache") == []


def test_meta_says_what_it_was_made_from(corpus, tmp_path):
    prepared = prepare_corpus(corpus, KINDS["bpe"], tmp_path)
    [path] = (tmp_path / "tokens").glob("*/meta.json")
    meta = json.loads(path.read_text())
    assert meta["corpus"]["fingerprint"] == corpus.fingerprint
    assert meta["tokenizer"]["kind"] == "BPE"
    assert meta["tokenizer"]["settings"] == {"vocab_size": 400, "train_bytes": None}
    assert meta["dtype"] == "uint16"
    assert meta["vocab_size"] == prepared.tokenizer.vocab_size
    assert meta["val"] == {
        "n_tokens": len(prepared.val.tokens),
        "n_documents": len(prepared.val.document_starts),
        "n_bytes": prepared.val.n_bytes,
    }


def test_the_second_time_neither_reads_nor_trains(corpus, tmp_path, monkeypatch):
    prepare_corpus(corpus, KINDS["bpe"], tmp_path)

    def never(*args):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(BPE, "train", never)
    monkeypatch.setattr(TextFiles, "documents", never)
    prepare_corpus(corpus, KINDS["bpe"], tmp_path)


def test_a_tokenizer_from_its_file_finds_the_tokens_it_made(corpus, tmp_path, monkeypatch):
    """As `evaluate.py` opens a run: with the tokenizer that stands in its directory."""
    first = prepare_corpus(corpus, KINDS["bpe"], tmp_path / "cache")
    first.tokenizer.save(tmp_path / "tokenizer.json")

    def unread(*args):
        raise AssertionError("the cache was not used")
        yield

    monkeypatch.setattr(TextFiles, "documents", unread)
    again = prepare_corpus(corpus, Pretrained(source=str(tmp_path / "tokenizer.json")), tmp_path / "cache")
    assert np.array_equal(again.val.tokens, first.val.tokens)


def test_another_setting_or_text_is_another_cache(corpus, tmp_path):
    first = prepare_corpus(corpus, KINDS["bpe"], tmp_path)
    prepare_corpus(corpus, BPE(vocab_size=300, train_bytes=None), tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert len(first.train.tokens) == len(prepare_corpus(corpus, KINDS["bpe"], tmp_path).train.tokens)


def test_a_vocabulary_past_65536_is_kept_in_uint32(tmp_path):
    # Characters of three planes, more than 65,536 of them, each a document's length apart.
    characters = [chr(c) for c in range(0x10000, 0x30000)]
    text = "".join(characters[:70_000])
    (tmp_path / "many.txt").write_text(text + text[:10_000], encoding="utf-8")
    corpus = TextFiles(files=str(tmp_path / "many.txt"), column="text", val_fraction=0.125, split="tail")
    prepared = prepare_corpus(corpus, Char(), tmp_path / "cache")
    assert prepared.tokenizer.vocab_size == 70_002
    assert prepared.train.tokens.dtype == np.uint32
    assert_is(prepared, corpus)


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_in_pieces_encodes_as_the_whole(tmp_path, monkeypatch, kind):
    text = "".join(DOCUMENTS) + "\n\n \n".join(DOCUMENTS[:50])
    (tmp_path / "long.txt").write_bytes(text.encode())
    corpus = TextFiles(files=str(tmp_path / "long.txt"), column="text", val_fraction=0.1, split="tail")
    monkeypatch.setattr(tokens, "PIECE_CHARACTERS", 1000)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 5000)
    prepared = prepare_corpus(corpus, KINDS[kind], tmp_path / "cache")
    [train] = corpus.documents("train")
    assert len(list(tokens.cut_document(train, prepared.tokenizer))) > 10
    whole = prepared.tokenizer.encode(train)
    assert prepared.train.tokens.tolist() == [*whole, prepared.tokenizer.end_of_text]
    assert prepared.train.document_starts.tolist() == [0]


# --- what can go wrong


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "train.tokens.bin").write_bytes((d / "train.tokens.bin").read_bytes()[:-2]),
        lambda d: (d / "train.tokens.bin").write_bytes((d / "train.tokens.bin").read_bytes()[:-1]),
        lambda d: (d / "val.tokens.bin").write_bytes(b""),
        lambda d: (d / "val.tokens.bin").unlink(),
        lambda d: (d / "val.documents.bin").write_bytes(b"12345678"),
        lambda d: (d / "meta.json").write_text("{"),
        lambda d: (d / "meta.json").write_text("[]"),
        lambda d: (d / "meta.json").unlink(),
    ],
)
def test_a_damaged_cache_is_made_again(corpus, tmp_path, damage):
    prepare_corpus(corpus, KINDS["bpe"], tmp_path)
    [directory] = (tmp_path / "tokens").iterdir()
    damage(directory)
    assert_is(prepare_corpus(corpus, KINDS["bpe"], tmp_path), corpus)
    assert leftovers(tmp_path) == []


def test_tokens_of_another_tokenizer_are_not_used(corpus, tmp_path):
    """A tokenizer that was trained again may differ from the one the tokens were made with."""
    prepare_corpus(corpus, KINDS["bpe"], tmp_path)
    [path] = (tmp_path / "tokenizers").glob("*/tokenizer.json")
    other = BPE(vocab_size=300, train_bytes=None).train(corpus.documents("train"))
    other.save(path)
    prepared = prepare_corpus(corpus, KINDS["bpe"], tmp_path)
    assert prepared.tokenizer.fingerprint == other.fingerprint
    assert_is(prepared, corpus)


def _prepare_at_once(corpus, cache, barrier, results):
    barrier.wait()
    prepared = prepare_corpus(corpus, KINDS["bpe"], cache)
    results.put((prepared.tokenizer.fingerprint, prepared.train.tokens.tolist()))


def test_two_processes_at_once_get_the_same_whole_cache(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    cache = tmp_path / "cache"
    processes = [
        context.Process(target=_prepare_at_once, args=(corpus, cache, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    first, second = results.get(timeout=300), results.get(timeout=300)
    for process in processes:
        process.join()
    assert first == second
    assert leftovers(cache) == []
    assert_is(prepare_corpus(corpus, KINDS["bpe"], cache), corpus)


class SlowCorpus(Corpus):
    """Says when its first validation document is asked for, and never goes on."""

    def __init__(self, corpus: Corpus, signal_file: Path) -> None:
        self.corpus = corpus
        self.signal_file = signal_file
        self.fingerprint_ = corpus.fingerprint

    def documents(self, split) -> Iterator[str]:
        for document in self.corpus.documents(split):
            if split == "val":
                self.signal_file.touch()
                time.sleep(600)
            yield document

    @property
    def fingerprint(self) -> str:
        return self.fingerprint_

    def describe(self) -> str:
        return self.corpus.describe()


def test_a_killed_process_leaves_nothing_that_counts(corpus, tmp_path):
    context = multiprocessing.get_context("spawn")
    cache, signal_file = tmp_path / "cache", tmp_path / "half way"
    slow = SlowCorpus(corpus, signal_file)
    process = context.Process(target=prepare_corpus, args=(slow, KINDS["byte"], cache))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 300
    while not signal_file.exists():
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(leftovers(cache)) == 1  # half the tokens, under another name
    assert_is(prepare_corpus(corpus, KINDS["byte"], cache), corpus)
    assert leftovers(cache) == []  # and swept up


def test_a_failing_corpus_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 50 + '{"body": 1}\n')
    corpus = TextFiles(files=str(tmp_path / "a.jsonl"), column="text", val_fraction=0.5, split="documents")
    with pytest.raises(ValueError, match="line 51 has no column 'text'"):
        prepare_corpus(corpus, Byte(), tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []
    assert not list(tmp_path.glob("cache/tokens/*"))


def test_a_full_disk_gets_one_line(corpus, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokens.os, "fsync", full)
    with pytest.raises(ValueError, match="no space left") as caught:
        prepare_corpus(corpus, Byte(), tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "cache") in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


def test_a_place_that_cannot_be_written_gets_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(PermissionError, match="cannot write to") as caught:
        prepare_corpus(corpus, Byte(), tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)


def test_the_loser_of_a_race_leaves_the_winners_files(tmp_path):
    target = tmp_path / "key"
    with cache_directory.under_construction(target) as late:
        (late / "x").write_text("late")
        with cache_directory.under_construction(target) as early:
            (early / "x").write_text("early")
            cache_directory.publish(early, target, is_usable=lambda: True)
        cache_directory.publish(late, target, is_usable=lambda: True)
    assert (target / "x").read_text() == "early"
    assert list(tmp_path.iterdir()) == [target]
