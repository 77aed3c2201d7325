"""Corpora give the text that lies in the files, split as documented."""

from __future__ import annotations

import gzip
import json
import socket
import sysconfig
import time
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from scantling.data.corpora import HubDataset, StandardLibrary, TextFiles

DOCUMENTS = [f"Document {i}: naïve café\r\n\tπ ≈ 3,14 😀\n\n" * (1 + i % 3) for i in range(400)]


def text_files(
    files, *, split: Literal["tail", "documents"] = "documents", val_fraction=0.1, column="text"
) -> TextFiles:
    return TextFiles(files=files, column=column, val_fraction=val_fraction, split=split)


def both_splits(corpus) -> tuple[list[str], list[str]]:
    return list(corpus.documents("train")), list(corpus.documents("val"))


def write_json_lines(path: Path, documents: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: d, "n": 1}) + "\n" for d in documents))
    return path


# --- the standard library


def test_stdlib_is_every_source_file_but_tests_once():
    root = Path(sysconfig.get_path("stdlib"))
    corpus = StandardLibrary(val_fraction=0.05)
    train, val = both_splits(corpus)
    assert (root / "json/decoder.py").read_text(encoding="utf-8") in train + val
    assert (root / "_pydecimal.py").read_text(encoding="utf-8") in train + val
    tests = root / "test" / "test_json"  # Debian splits it off
    for left_out in [*tests.glob("test_dec*.py"), *root.glob("site-packages/pip/__init__.py")]:
        assert left_out.read_text(encoding="utf-8") not in train + val
    assert 0.02 < len(val) / len(train + val) < 0.09  # 5 % of some 700 files by hash


def test_stdlib_split_keeps_a_file_on_its_side():
    """With a larger fraction, held-out files stay held out: the hash does not move."""
    small = set(StandardLibrary(val_fraction=0.05).documents("val"))
    assert small < set(StandardLibrary(val_fraction=0.2).documents("val"))


def test_stdlib_fingerprint_depends_on_the_text_and_the_split(tmp_path, monkeypatch):
    def fingerprint(content: str, val_fraction: float, place: str) -> str:
        root = tmp_path / place
        root.mkdir(exist_ok=True)
        (root / "a.py").write_text(content)
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
        return StandardLibrary(val_fraction=val_fraction).fingerprint

    here = fingerprint("x = 1", 0.1, "here")
    assert here == fingerprint("x = 1", 0.1, "there")
    assert here != fingerprint("x = 2", 0.1, "here")
    assert here != fingerprint("x = 1", 0.2, "here")


# --- text files: the tail split


@pytest.mark.parametrize("n", [10, 11, 999, 1000, 12_345])
def test_tail_split_of_one_file_is_nanogpts(tmp_path, n):
    """nanoGPT, data/shakespeare_char/prepare.py: train is data[:int(n*0.9)], val the rest."""
    text = "".join(chr(97 + (i * 7) % 26) + "é"[: i % 2] for i in range(n))[:n]
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    train, val = both_splits(text_files(str(tmp_path / "input.txt"), split="tail"))
    assert train == [text[: int(n * 0.9)]]
    assert val == [text[int(n * 0.9) :]]


@pytest.mark.parametrize(("val_fraction", "n_train"), [(0.1, 9), (0.3, 7), (0.4, 6), (0.7, 3)])
def test_tail_split_is_exact_where_floating_point_is_not(tmp_path, val_fraction, n_train):
    (tmp_path / "a.txt").write_text("0123456789" * 10)
    corpus = text_files(str(tmp_path / "a.txt"), split="tail", val_fraction=val_fraction)
    assert "".join(corpus.documents("train")) == ("0123456789" * 10)[: 10 * n_train]


def test_tail_split_goes_over_the_whole_corpus_in_order(tmp_path):
    path = write_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    train, val = both_splits(text_files(str(path), split="tail", val_fraction=0.25))
    everything = "".join(DOCUMENTS)
    assert "".join(train) == everything[: len(everything) * 3 // 4]
    assert "".join(train + val) == everything
    assert train[:-1] == DOCUMENTS[: len(train) - 1]  # at most one document is cut


# --- text files: formats


def write_every_format(directory: Path) -> dict[str, str]:
    """The same documents in every format; returns what to pass as `files`."""
    plain = directory / "plain"
    plain.mkdir()
    packed = directory / "packed"
    packed.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (plain / f"{i:03}.txt").write_bytes(document.encode())
        (packed / f"{i:03}.md.gz").write_bytes(gzip.compress(document.encode()))
    lines = write_json_lines(directory / "a.jsonl", DOCUMENTS).read_bytes()
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # Two frames, as parallel compressors write.
    half = len(lines) // 2
    frames = [zstandard.compress(lines[:half]), zstandard.compress(lines[half:])]
    (directory / "c.jsonl.zst").write_bytes(b"".join(frames))
    table = pyarrow.table({"id": range(400), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, directory / "d.parquet", row_group_size=150)
    return {
        "directory": str(plain),
        "glob": str(plain / "*.txt"),
        "deep glob": str(directory / "**" / "*.txt"),
        "gz": str(packed),
        "jsonl": str(directory / "a.jsonl"),
        "jsonl.gz": str(directory / "b.jsonl.gz"),
        "jsonl.zst": str(directory / "c.jsonl.zst"),
        "parquet": str(directory / "d.parquet"),
    }


@pytest.mark.parametrize("split", ["tail", "documents"])
def test_every_format_gives_the_same_documents(tmp_path, split):
    ways = write_every_format(tmp_path)
    expected = both_splits(text_files(ways.pop("directory"), split=split))
    if split == "documents":
        assert sorted(expected[0] + expected[1]) == sorted(DOCUMENTS)
    for name, files in ways.items():
        assert both_splits(text_files(files, split=split)) == expected, name


def test_a_list_keeps_its_order_and_counts_a_file_once(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 10)
    files = [str(tmp_path / "b.txt"), str(tmp_path / "*.txt")]
    corpus = text_files(files, split="tail")
    assert "".join(corpus.documents("train")) == "b" * 10 + "a" * 8


def test_fingerprint_of_files_moves_with_text_order_and_split_not_with_the_place(tmp_path):
    def fingerprint(place: str, first: str, **settings) -> str:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / "1.txt").write_text(first)
        (tmp_path / place / "2.txt").write_text("two")
        return text_files(str(tmp_path / place), **settings).fingerprint

    base = fingerprint("x", "one")
    assert base == fingerprint("y", "one")
    others = [
        fingerprint("x", "One"),
        fingerprint("x", "one", split="tail"),
        fingerprint("x", "one", val_fraction=0.2),
        text_files([str(tmp_path / "y/2.txt"), str(tmp_path / "y/1.txt")]).fingerprint,
    ]
    assert len({base, *others}) == 5


# --- text files: mistakes


def error_line(kind: type[Exception], files: str, **settings) -> str:
    with pytest.raises(kind) as caught:
        both_splits(text_files(files, **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_is_not_text_gets_one_line_naming_the_file_and_the_place(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes("na\u00efve".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-9])
    (tmp_path / "cut.txt.zst").write_bytes(zstandard.compress(b"abc" * 1000)[:-3])
    whole_and_cut = zstandard.compress(b'{"text": "a"}\n') + zstandard.compress(b"{}" * 50)[:-3]
    (tmp_path / "cut.jsonl.zst").write_bytes(whole_and_cut)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    write_json_lines(tmp_path / "body.jsonl", ["a", "b"], column="body")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "body.parquet")

    def line(name: str, kind: type[Exception] = ValueError, **settings) -> str:
        return error_line(kind, str(tmp_path / name), **settings)

    assert "nul.txt" in line("nul.txt")
    assert "byte offset 3" in line("nul.txt")
    assert "latin.txt" in line("latin.txt")
    assert "byte offset 2" in line("latin.txt")
    assert "empty" in line("empty.txt")
    assert "does not unpack" in line("cut.txt.gz")
    assert "does not unpack" in line("cut.txt.zst")
    assert "does not unpack" in line("cut.jsonl.zst")
    assert "not a Parquet file" in line("no.parquet")
    assert "line 2 is not JSON" in line("bad.jsonl")
    assert "no column 'text'; it has ['body', 'n']" in line("body.jsonl")
    assert "no column 'text'; it has ['body', 'n']" in line("body.parquet")
    assert "int64, not text" in line("body.parquet", column="n")
    assert "*.csv" in line("*.csv", FileNotFoundError)


def test_a_split_that_comes_out_empty_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("short")
    message = error_line(ValueError, str(tmp_path / "one.txt"), split="documents")
    assert "split is empty" in message
    assert "split=tail" in message
    with pytest.raises(ValueError, match="between 0 and 1"):
        text_files(str(tmp_path / "one.txt"), val_fraction=1.0)
    with pytest.raises(ValueError, match="use tail or documents"):
        text_files(str(tmp_path / "one.txt"), split=cast(Any, "random"))


# --- datasets of the Hub, driven with local files


def hub_dataset(**settings) -> HubDataset:
    everything = {
        "path": "json",
        "name": None,
        "column": "text",
        "train_split": "train",
        "val_split": None,
        "val_fraction": 0.1,
        "max_documents": None,
        "data_files": None,
        "revision": None,
    }
    return HubDataset(**{**everything, **settings})


def test_hub_dataset_by_hash_equals_text_files_by_hash(tmp_path):
    """Two readers, one rule: the same documents are held out."""
    path = write_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    corpus = hub_dataset(data_files=str(path))
    assert both_splits(corpus) == both_splits(text_files(str(path)))


def test_hub_dataset_with_splits_of_its_own_and_a_limit(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"page": DOCUMENTS[:50]}), tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"page": DOCUMENTS[50:60]}), tmp_path / "v.parquet")
    corpus = hub_dataset(
        path="parquet",
        column="page",
        val_split="held_out",
        max_documents=20,
        data_files={
            "train": str(tmp_path / "t.parquet"),
            "held_out": [str(tmp_path / "v.parquet")],
        },
    )
    assert both_splits(corpus) == (DOCUMENTS[:20], DOCUMENTS[50:60])


def test_hub_dataset_fingerprint_is_of_the_content(tmp_path):
    first = write_json_lines(tmp_path / "a.jsonl", DOCUMENTS)
    copy = write_json_lines(tmp_path / "copy.jsonl", DOCUMENTS)
    other = write_json_lines(tmp_path / "b.jsonl", DOCUMENTS[1:])
    base = hub_dataset(data_files=str(first)).fingerprint
    assert base == hub_dataset(data_files=str(copy)).fingerprint
    assert base != hub_dataset(data_files=str(other)).fingerprint
    assert base != hub_dataset(data_files=str(first), max_documents=5).fingerprint


def test_hub_dataset_mistakes_get_one_line(tmp_path):
    path = str(write_json_lines(tmp_path / "a.jsonl", DOCUMENTS))
    for settings, kind, words in [
        ({"column": "body"}, ValueError, "no column 'body'; it has ['n', 'text']"),
        ({"column": "n"}, ValueError, "int, not text"),
        ({"train_split": "nope"}, ValueError, "nope"),
    ]:
        with pytest.raises(kind) as caught:
            next(hub_dataset(data_files=path, **settings).documents("train"))
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_split_is_not_trained_on_and_validated_on():
    with pytest.raises(
        ValueError, match="val_split=train is the split trained on: null holds documents of it out"
    ):
        hub_dataset(val_split="train")


def test_a_hub_that_does_not_answer_fails_in_one_line_at_once(monkeypatch):
    with socket.socket() as listener:  # a port nobody listens on, once closed
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    corpus = hub_dataset(path="nobody/nothing")
    with pytest.raises(FileNotFoundError, match="the Hub cannot be reached") as caught:
        next(corpus.documents("train"))
    assert "\n" not in str(caught.value)
    assert not slept
