"""Corpora: where the text comes from, and which of it is held out for validation."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from scantling.data import files as text_files
from scantling.data.hub_access import hub_is_reachable

Split = Literal["train", "val"]


class Corpus(ABC):
    """Text in two splits, in a fixed order.

    `documents` can be called any number of times and gives the same documents each time.
    """

    @abstractmethod
    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one split; none is empty, and at least one comes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 in hex over what decides the text, its order and its split.

        It names no place on this machine: the same text elsewhere has the same fingerprint.
        """

    @abstractmethod
    def describe(self) -> str:
        """A short line for people: what text this is and how much."""


def hash_manifest(manifest: dict[str, Any]) -> str:
    """A sha256 in hex of JSON with sorted keys."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def is_held_out(key: str, val_fraction: float) -> bool:
    """Whether a uniform number in [0, 1) made from `key` falls below `val_fraction`.

    A hash and not a random draw: adding documents never moves one from a split to the other.
    """
    uniform = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return uniform < val_fraction


def check_val_fraction(val_fraction: float) -> None:
    """Raise ValueError unless the share lies between 0 and 1."""
    if not 0 < val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction} must lie between 0 and 1")


def require_documents(documents: Iterator[str], split: Split, remedy: str) -> Iterator[str]:
    """The same documents, and a ValueError where there are none."""
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        raise ValueError(f"the {split!r} split is empty; {remedy}")


class StandardLibrary(Corpus):
    """The Python source of the running interpreter's standard library, without its tests.

    Needs no download. One file is one document, in the order of relative paths; a file is held
    out when the hash of its path says so. Left out: directories of tests and of installed
    packages, files that are not UTF-8, and `_sysconfigdata*`, which a build generates and fills
    with paths of its machine. Interpreters differ in what they ship (Debian's has less), so the
    fingerprint covers every file.

    `val_fraction`: the share of the files, between 0 and 1, held out for validation.
    """

    LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

    def __init__(self, *, val_fraction: float) -> None:
        check_val_fraction(val_fraction)
        self.val_fraction = val_fraction
        self.root = Path(sysconfig.get_path("stdlib"))

    @cached_property
    def manifest(self) -> list[tuple[str, int, str]]:
        """(relative path, size in bytes, sha256 of the content) of every file, sorted."""
        entries = []
        for directory, names, file_names in os.walk(self.root):
            names[:] = [name for name in names if name not in self.LEFT_OUT]
            for name in file_names:
                if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                    path = Path(directory, name)
                    data = path.read_bytes()
                    if data and is_utf8(data):
                        relative = path.relative_to(self.root).as_posix()
                        entries.append((relative, len(data), hashlib.sha256(data).hexdigest()))
        if not entries:
            raise FileNotFoundError(f"no Python source of the standard library in {self.root}")
        return sorted(entries)

    def documents(self, split: Split) -> Iterator[str]:
        def chosen() -> Iterator[str]:
            for relative, _, _ in self.manifest:
                if is_held_out(relative, self.val_fraction) == (split == "val"):
                    yield (self.root / relative).read_bytes().decode("utf-8")

        return require_documents(chosen(), split, "choose another val_fraction")

    @property
    def fingerprint(self) -> str:
        return hash_manifest({"corpus": "stdlib", "files": self.manifest, "val_fraction": self.val_fraction})

    def describe(self) -> str:
        megabytes = sum(size for _, size, _ in self.manifest) / 1e6
        return (
            f"Python {platform.python_version()} standard library, "
            f"{len(self.manifest):,} files, {megabytes:.1f} MB"
        )


def is_utf8(data: bytes) -> bool:
    """Whether the bytes are valid UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class TextFiles(Corpus):
    """Your own text: plain files, JSON lines or Parquet, also `.gz` and `.zst`.

    `files`: a path, a directory, a glob (`**` goes into directories), or a list of these. `column`: the
    field of JSON lines and Parquet that holds the text. `split`: "tail" holds out the last `val_fraction` of
    the characters of the whole corpus, which may cut a document in two; "documents" holds out whole
    documents, by a hash of their text.

    For n characters "tail" trains on the first floor(n * (1 - val_fraction)), the split of
    nanoGPT's data/shakespeare_char/prepare.py (`int(n * 0.9)`).

    Raises FileNotFoundError, PermissionError, or ValueError for files that are not text.
    """

    def __init__(
        self,
        *,
        files: str | Sequence[str],
        column: str,
        val_fraction: float,
        split: Literal["tail", "documents"],
    ) -> None:
        check_val_fraction(val_fraction)
        if split not in ("tail", "documents"):
            raise ValueError(f"data.split={split} is unknown: use tail or documents")
        patterns = [files] if isinstance(files, str | Path) else list(files)
        self.column = column
        self.val_fraction = val_fraction
        self.split = split
        self.patterns = [str(pattern) for pattern in patterns]
        self.paths = text_files.find_files(self.patterns)

    @cached_property
    def manifest(self) -> list[tuple[str, int, str]]:
        """(suffixes, size in bytes, sha256 of the file) of every file, in order.

        The suffixes decide how a file is read; the rest of its name does not touch the text.
        """
        return [("".join(path.suffixes), *text_files.digest_file(path)) for path in self.paths]

    def all_documents(self) -> Iterator[str]:
        """The documents of all files in order, of both splits."""
        for path in self.paths:
            yield from text_files.read_documents(path, self.column)

    @cached_property
    def n_train_characters(self) -> int:
        """floor(n * (1 - val_fraction)) of all n characters, which "tail" trains on."""
        n = sum(len(document) for document in self.all_documents())
        # An exact fraction: in floating point 1 - 0.3 is not 0.7, and the cut would move.
        return int(n * (1 - Fraction(str(self.val_fraction))))

    def documents(self, split: Split) -> Iterator[str]:
        if self.split == "tail":
            chosen = self.head() if split == "train" else self.tail()
            remedy = "the text is too short for this val_fraction"
        else:
            chosen = (
                document
                for document in self.all_documents()
                if is_held_out(document, self.val_fraction) == (split == "val")
            )
            remedy = "with few documents use split=tail"
        return require_documents(chosen, split, f"{', '.join(self.patterns)}: {remedy}")

    def head(self) -> Iterator[str]:
        """The first `n_train_characters`, the last document cut there."""
        left = self.n_train_characters
        for document in self.all_documents():
            if left <= 0:
                return
            yield document[:left]
            left -= len(document)

    def tail(self) -> Iterator[str]:
        """All but the first `n_train_characters`, the first document cut there."""
        to_skip = self.n_train_characters
        for document in self.all_documents():
            if len(document) > to_skip:
                yield document[to_skip:]
            to_skip = max(0, to_skip - len(document))

    @property
    def fingerprint(self) -> str:
        return hash_manifest(
            {
                "corpus": "text",
                "files": self.manifest,
                "column": self.column,
                "val_fraction": self.val_fraction,
                "split": self.split,
            }
        )

    def describe(self) -> str:
        megabytes = sum(size for _, size, _ in self.manifest) / 1e6
        if len(self.paths) == 1:
            return f"{self.paths[0].name}, {megabytes:.1f} MB"
        return f"{', '.join(self.patterns)}: {len(self.paths):,} files, {megabytes:.1f} MB"


class HubDataset(Corpus):
    """A dataset of the Hugging Face Hub, streamed: nothing is kept but its tokens.

    `path`, `name`, `data_files`, `revision`: as `datasets.load_dataset` takes them; `path` may be
    "json", "parquet" or "text" with local `data_files`. `column` holds the text. `val_split`
    names the split to validate on; None holds out `val_fraction` of the documents of
    `train_split`, by a hash of their text. `max_documents` cuts each split short, None takes all.
    Each split is streamed once to tokenize it, and the training split once before that, as far
    as the tokenizer's training needs.

    The fingerprint holds the commit that `revision` stands for. A Hub that does not answer is
    noticed in three seconds and the copy in its cache used, under another fingerprint where the
    commit is not known: give a full commit as `revision` to work offline.

    Raises FileNotFoundError when the dataset cannot be reached, ValueError for a missing split or column.
    """

    BUILDERS = frozenset({"arrow", "csv", "json", "parquet", "text"})  # need no Hub

    def __init__(
        self,
        *,
        path: str,
        name: str | None,
        column: str,
        train_split: str,
        val_split: str | None,
        val_fraction: float,
        max_documents: int | None,
        data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None,
        revision: str | None,
    ) -> None:
        check_val_fraction(val_fraction)
        if max_documents is not None and max_documents < 1:
            raise ValueError(f"data.max_documents={max_documents} must be at least 1; null takes all")
        if val_split == train_split:
            raise ValueError(
                f"data.val_split={val_split} is the split trained on: null holds documents of it out"
            )
        self.path = path
        self.name = name
        self.column = column
        self.train_split = train_split
        self.val_split = val_split
        self.val_fraction = val_fraction
        self.max_documents = max_documents
        self.data_files = plain_containers(data_files)
        self.revision = revision
        self.is_local = path in self.BUILDERS or Path(path).expanduser().exists()

    def documents(self, split: Split) -> Iterator[str]:
        if self.val_split is None:
            chosen = (
                document
                for document in self.stream(self.train_split)
                if is_held_out(document, self.val_fraction) == (split == "val")
            )
        else:
            chosen = self.stream(self.train_split if split == "train" else self.val_split)
        return require_documents(chosen, split, f"{self.path}: change val_fraction or max_documents")

    def stream(self, split: str) -> Iterator[str]:
        """The documents of a split of the dataset, at most `max_documents` rows of it.

        Raises FileNotFoundError when it cannot be reached, ValueError for a missing split or column.
        """
        import datasets.config  # here, because it takes two seconds

        if not self.is_local and not hub_is_reachable():
            datasets.config.HF_HUB_OFFLINE = True  # for a `datasets` imported earlier
        try:
            rows = datasets.load_dataset(
                self.path,
                self.name,
                split=split,
                data_files=self.data_files,
                revision=self.commit,
                streaming=True,
            )
        except ConnectionError:
            raise FileNotFoundError(
                f"the Hub cannot be reached and {self.path} is not in its cache; "
                "data=text reads files of your own"
            ) from None
        except Exception as error:
            kind = FileNotFoundError if isinstance(error, OSError) else ValueError
            raise kind(f"cannot load dataset {self.path}: {first_line(error)}") from None
        for row in islice(rows, self.max_documents):
            if self.column not in row:
                raise ValueError(f"{self.path} has no column {self.column!r}; it has {sorted(row)}")
            document = row[self.column]
            if isinstance(document, str) and document:
                yield document
            elif document:
                kind_name = type(document).__name__
                raise ValueError(f"{self.path}: column {self.column!r} is {kind_name}, not text")

    @cached_property
    def commit(self) -> str | None:
        """The commit that `revision` stands for now; `revision` itself where nobody can say."""
        is_commit = self.revision is not None and re.fullmatch(r"[0-9a-f]{40}", self.revision)
        if self.is_local or is_commit or not hub_is_reachable():
            return self.revision
        import huggingface_hub

        try:
            return huggingface_hub.HfApi().dataset_info(self.path, revision=self.revision).sha
        except Exception as error:
            raise FileNotFoundError(
                f"no dataset {self.path!r} on the Hub at revision {self.revision or 'main'!r}: "
                f"{first_line(error)}"
            ) from None

    @cached_property
    def local_files(self) -> list[tuple[int, str]]:
        """(size in bytes, sha256) of the files on this machine that the text comes from."""
        if not self.is_local:
            return []
        if self.data_files is None:
            patterns = [self.path]
        else:
            named = self.data_files if isinstance(self.data_files, dict) else {"": self.data_files}
            lists = ([each] if isinstance(each, str) else each for each in named.values())
            patterns = [pattern for each in lists for pattern in each]
        here = [pattern for pattern in patterns if "://" not in pattern]
        return [text_files.digest_file(path) for path in text_files.find_files(here)]

    @property
    def fingerprint(self) -> str:
        return hash_manifest(
            {
                "corpus": "hub",
                # Local files count by their content, wherever they lie.
                "path": None if self.is_local and self.data_files is None else self.path,
                "files": self.local_files,
                "data_files": None if self.is_local else self.data_files,
                "name": self.name,
                "column": self.column,
                "train_split": self.train_split,
                "val_split": self.val_split,
                "val_fraction": self.val_fraction if self.val_split is None else None,
                "max_documents": self.max_documents,
                "commit": self.commit,
            }
        )

    def describe(self) -> str:
        name = f" {self.name}" if self.name else ""
        cut = "" if self.max_documents is None else f", first {self.max_documents:,} documents"
        commit = f" at {self.commit[:12]}" if self.commit else ""
        return f"{self.path}{name}{commit}{cut}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def plain_containers(value: Any) -> Any:
    """The same strings in plain dicts and lists, whatever containers a config came in."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_containers(inner) for key, inner in value.items()}
    return [plain_containers(inner) for inner in value]
