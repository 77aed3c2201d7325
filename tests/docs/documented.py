"""What README.md and docs/ tell people to type, and to write into files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "docs/start.md"]
PAGES += sorted({path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")} - {*PAGES})

PROGRAMS = ("python", "make", "torchrun", "sbatch", "srun", "pip", "wandb", "tensorboard", "source", "ls")
"""A block without a language whose first line starts with one of these is of commands, one a line."""


@dataclass(frozen=True)
class Block:
    """Lines between two fences; `introduction` is the last line of text before them."""

    page: str
    line: int
    language: str
    introduction: str
    text: str

    @property
    def is_commands(self) -> bool:
        return not self.language and self.text.split(maxsplit=1)[0] in PROGRAMS

    @property
    def file(self) -> str | None:
        """Where the block belongs: the introduction names it last, as in "and `conf/norm/mine.yaml`:"."""
        named = re.search(r"`([\w/]+\.(?:py|yaml))`:$", self.introduction)
        return named[1] if named else None


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    introduction, begun = "", None
    lines = (ROOT / page).read_text().splitlines()
    for i, line in enumerate(lines):
        if line.startswith("```"):
            if begun is None:
                begun = i
            else:
                text = "\n".join(lines[begun + 1 : i])
                yield Block(page, begun + 2, lines[begun].removeprefix("```"), introduction, text)
                begun = None
        elif begun is None and line:
            introduction = line


def commands(block: Block) -> Iterator[Command]:
    """Without their comments."""
    for i, line in enumerate(block.text.splitlines()):
        yield Command(block.page, block.line + i, re.sub(r"\s+# .*", "", line))


def in_passing(page: str) -> Iterator[Command]:
    """Commands of `src/` within the text."""
    for i, line in enumerate((ROOT / page).read_text().splitlines()):
        for text in re.findall(r"`(python src/[^`]+)`", line):
            yield Command(page, i + 1, text)


def write_files(page: str, tree: Path) -> None:
    """Put the page's blocks that belong into files there: at the end of one that exists, or as a new one."""
    for block in blocks(page):
        if block.file:
            path = tree / block.file
            before = path.read_text() + "\n\n" if path.exists() else ""
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(before + block.text + "\n")
