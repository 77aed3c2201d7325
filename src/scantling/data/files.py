"""Documents out of files: plain text, JSON lines and Parquet, plain or compressed."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

if TYPE_CHECKING:
    from typing_extensions import Buffer

PARQUET_ROWS = 256  # rows decoded at once: a row may be a whole book


def find_files(patterns: Iterable[str]) -> list[Path]:
    """The files that the paths, directories and globs name, each pattern's in sorted order.

    A directory stands for every file below it, hidden ones left out. A file named twice counts
    once. Empty files that a directory or a glob brings in are left out. Raises FileNotFoundError
    for a pattern that matches nothing, and ValueError where all that it matches is empty.
    """
    found: dict[Path, None] = {}  # a dict keeps the order
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            below = (p for p in path.rglob("*") if p.is_file())
            matches = [p for p in below if not is_hidden(p.relative_to(path))]
        elif path.is_file():
            matches = [path]
        else:
            names = glob.glob(str(path), recursive=True)
            matches = [Path(name) for name in names if Path(name).is_file()]
        if not matches:
            raise FileNotFoundError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
        matches = [p for p in matches if p.stat().st_size > 0]
        if not matches:
            raise ValueError(f"{pattern} is empty")
        found.update(dict.fromkeys(sorted(matches, key=lambda p: p.as_posix())))
    return list(found)


def is_hidden(relative: Path) -> bool:
    """Whether the name of the file, or of a directory above it, starts with a dot."""
    return any(part.startswith(".") for part in relative.parts)


def digest_file(path: Path) -> tuple[int, str]:
    """(size in bytes, sha256 in hex) of a file as it lies on disk.

    Raises PermissionError for an unreadable one.
    """
    with open_file(path) as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def read_documents(path: Path, column: str) -> Iterator[str]:
    """The documents of one file, in order; empty ones are left out.

    `.jsonl` gives one document per line and `.parquet` one per row, out of the field `column`;
    any other name is plain text and one document. `.gz` and `.zst` after the name are unpacked.
    Raises ValueError for what is not text, and for a missing column.
    """
    suffixes = [s.lower() for s in path.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in (".gz", ".zst")), "")
    if kind == ".parquet":
        documents = read_parquet(path, column)
    elif kind in (".jsonl", ".ndjson"):
        documents = read_json_lines(path, column)
    else:
        documents = read_text(path)
    return (document for document in documents if document)


def decode_utf8(data: bytes, where: str) -> str:
    """The text, or a ValueError that names `where` and the offset of the first byte not text."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{where} is binary, not text: NUL byte at byte offset {nul}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise ValueError(
            f"{where} is not UTF-8 text: byte 0x{bad:02x} at byte offset {error.start}"
        ) from None


def open_file(path: Path) -> io.BufferedReader:
    """A file opened to read its bytes. Raises PermissionError where it may not be read."""
    try:
        return path.open("rb")
    except PermissionError:
        raise PermissionError(f"no permission to read {path}") from None


def open_unpacked(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked where its name ends in `.gz` or `.zst`."""
    file = open_file(path)
    if path.suffix.lower() == ".gz":
        file.close()
        return gzip.GzipFile(path)  # closes the file it opened, which it does not do for one it is given
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(ZstdReader(file))
    return file


class ZstdReader(io.RawIOBase):
    """Unpacked bytes of one or more zstandard frames.

    The library's own stream_reader ends without a word where a file was cut short; this raises
    EOFError, as gzip does.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.file = file
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.in_frame = False
        self.packed = b""
        self.unpacked = memoryview(b"")  # a view: cutting off what was read costs nothing

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        while not self.unpacked:
            self.packed = self.packed or self.file.read(1 << 17)
            if not self.packed:
                if self.in_frame:
                    raise EOFError("the file ends inside a compressed frame")
                return 0
            self.unpacked = memoryview(self.frame.decompress(self.packed))
            self.in_frame = not self.frame.eof
            self.packed = b"" if self.in_frame else self.frame.unused_data
            if not self.in_frame:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
        view = memoryview(buffer)
        n = min(len(view), len(self.unpacked))
        view[:n] = self.unpacked[:n]
        self.unpacked = self.unpacked[n:]
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


def read_text(path: Path) -> Iterator[str]:
    """The whole file as one document. Raises ValueError for what is not text or does not unpack."""
    try:
        with open_unpacked(path) as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{path} does not unpack: {error}") from None
    yield decode_utf8(data, str(path))


def read_json_lines(path: Path, column: str) -> Iterator[str]:
    """A document from each line. Raises ValueError for what does not unpack or is not JSON."""
    try:
        with open_unpacked(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_document(line, column, f"{path} line {number}")
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{path} does not unpack: {error}") from None


def parse_document(line: bytes, column: str, where: str) -> str:
    """The text of one line of JSON, empty for null; `where` names the line in errors.

    Raises ValueError for what is not JSON, a missing column, and a column that is not text.
    """
    text = decode_utf8(line, where)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    columns = sorted(row) if isinstance(row, dict) else []
    if column not in columns:
        raise ValueError(f"{where} has no column {column!r}; it has {columns}")
    document = row[column]
    if document is None:
        return ""
    if isinstance(document, str):
        return document
    raise ValueError(f"{where}: column {column!r} is {type(document).__name__}, not text")


def read_parquet(path: Path, column: str) -> Iterator[str]:
    """A document from each row. Raises ValueError for other formats, and for a column that is not text."""
    import pyarrow  # here, because most corpora are no Parquet
    import pyarrow.parquet

    with open_file(path) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file: {error}") from None
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{path} has no column {column!r}; it has {names}")
        kind = table.schema_arrow.field(column).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise ValueError(f"{path}: column {column!r} is {kind}, not text")
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
            for value in batch.column(0):
                yield value.as_py() or ""
