"""How far a long pass over a corpus has come, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status

QUIET_SECONDS = 1.5  # what is over sooner says nothing
LINE_SECONDS = 60.0  # where stderr is a file


class Progress:
    """Megabytes and rate of the text that went through `count`.

    On a terminal a live line, gone when done; elsewhere a plain line a minute.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing
        self.status: Status | None = None
        self.started = time.monotonic()
        self.shown = self.started
        self.characters = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.status is not None:
            self.status.stop()

    def count(self, documents: Iterator[str]) -> Iterator[str]:
        """The same documents, counted as they pass."""
        for document in documents:
            yield document
            self.characters += len(document)
            self.show()
        self.show(read_all=True)

    def show(self, *, read_all: bool = False) -> None:
        """Print or redraw the line where it is due; `read_all` once the last document has come."""
        now = time.monotonic()
        elapsed = now - self.started
        on_terminal = sys.stderr.isatty()
        pause = 0.2 if on_terminal else LINE_SECONDS
        first = self.shown == self.started
        due = elapsed > QUIET_SECONDS and now - self.shown > pause
        # Training goes on after the last document: show the live line before that silence.
        if not (due or (read_all and on_terminal and first and self.characters > 4_000_000)):
            return
        self.shown = now
        megabytes = self.characters / 1e6
        line = f"{self.doing}: {megabytes:,.0f} MB read, {megabytes / elapsed:.1f} MB/s"
        if not on_terminal:
            print(line, file=sys.stderr, flush=True)
        elif self.status is None:
            self.status = Status(line, console=Console(stderr=True))
            self.status.start()
        else:
            self.status.update(line)
