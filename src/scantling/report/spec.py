"""The content of a report, whatever shows it: an answer, reasons for doubt, sections.

It is written as one HTML page, as Markdown with its figures, and as CSV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from scantling.report.numbers import cell_text
from scantling.runs.directory import replace_text

MARKDOWN_ROWS = 60
"""Rows of the longest table in Markdown; longer ones stand only in the page and in CSV."""

TABLES = "tables"
"""The folder of the CSV files, one for each table of the page."""

Values = Sequence[float] | Sequence[str]
Style = Literal["line", "dashed", "thin", "points", "rings", "words"]
"""`words` are points that bear their `hover`."""


PALETTE = (
    ("#c2410c", "#fb923c"),
    ("#1d5fa8", "#6cb0f5"),
    ("#15803d", "#5fd08a"),
    ("#9333a8", "#d791ec"),
    ("#a16207", "#e5c04b"),
    ("#0e7c86", "#4cc9d3"),
    ("#be185d", "#f57fb0"),
    ("#4b5563", "#b6bec8"),
    ("#4d5bce", "#a1aaff"),
    ("#6b7a1a", "#b9cb5a"),
    ("#111827", "#f3f4f6"),
    ("#8a5a44", "#d3a88f"),
)
"""Colours of arms on a light page and in print, and on a dark one; more arms begin again with the first."""


@dataclass(frozen=True)
class Paragraph:
    """Words."""

    text: str


@dataclass(frozen=True)
class Code:
    """Commands, as they are typed."""

    text: str


@dataclass(frozen=True)
class Link:
    """A cell that leads to a file; `target` as seen from the report's directory."""

    text: str
    target: str


@dataclass(frozen=True)
class Table:
    """A table as people read it: strings, numbers, links. `folded`: the page shows it when asked to."""

    title: str
    frame: pd.DataFrame
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure for print: `draw(path)` writes a PNG to `path`, and an SVG beside it."""

    title: str
    name: str
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Samples:
    """Texts side by side: (title, text)."""

    texts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    `key`: of the values of a series that it shows. `words`: it has names instead of numbers, the first at the
    top. `log`: whether its scale is at first, None: it cannot be. `si`: ticks as 10k, 2M. `range`: what it
    shows at first, None: all. `order`: of words, from the top, where series do not give it.
    """

    key: str
    title: str
    log: bool | None = False
    words: bool = False
    si: bool = False
    range: tuple[float, float] | None = None
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points or a line, by axis. `low` and `high` are a band around a line, bars at points.

    `colour`: an integer of the palette, a number from 0 to 1 of a scale from small to large, or
    None or NaN for grey; points may have one each. `group`: what is shown and hidden together, and
    has one entry in the legend.
    """

    group: str
    values: Mapping[str, Values]
    low: Mapping[str, Sequence[float]] = field(default_factory=dict)
    high: Mapping[str, Sequence[float]] = field(default_factory=dict)
    style: Style = "line"
    colour: int | float | Sequence[float] | None = None
    hover: str | Sequence[str] = ""
    frame: int | None = None


@dataclass(frozen=True)
class Chart:
    """A chart of several series.

    `x` and `y`: axes to choose from, the first is shown first. `legend`: of groups. `frames`: what a
    slider goes through, the last is shown first. `recorded`: the keys of its axes are columns of
    `metrics.jsonl`, which loggers have too. `scale`: what the colours of points are by, and what stands
    for the smallest and the largest.
    """

    title: str
    series: tuple[Series, ...]
    x: tuple[Axis, ...]
    y: tuple[Axis, ...]
    note: str = ""
    legend: bool = True
    recorded: bool = False
    height: int = 420
    frames: tuple[str, ...] = ()
    scale: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Maps:
    """Attention maps in a grid, a row a layer, a column a head; one at a time is shown large.

    `weights` [layer, head, query, key] between the tokens `words`; nothing above the diagonal.
    """

    title: str
    words: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    weights: np.ndarray
    note: str = ""


Block = Paragraph | Code | Table | Figure | Samples | Chart | Maps


@dataclass(frozen=True)
class Section:
    """Blocks under a title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A report, whatever shows it.

    `question`: what was asked, `answer`: what is known now, with its interval. `cautions`: what to distrust.
    `data`: tables for other programs, by the name of their CSV file.
    """

    title: str
    kind: str
    question: str
    answer: str
    cautions: tuple[str, ...]
    sections: tuple[Section, ...]
    data: Mapping[str, pd.DataFrame] = field(default_factory=dict)


PAGE = "report.html"

BESIDE = (
    *("arms.csv", "arms.png", "arms.svg", "gains.csv", "gains.png", "gains.svg"),
    *("parameters.csv", "optimum.csv", "fit.png", "fit.svg", "grid.png", "grid.svg"),
)
"""Files that some reports have beside the page and others have not."""


def holds_answer(directory: Path) -> bool:
    """Whether the page in `directory` has an answer: its numbers then stand beside it."""
    return (directory / PAGE).exists() and any((directory / name).exists() for name in BESIDE)


def write(report: Report, directory: Path, *, page: str) -> list[Path]:
    """Write `page`, the report as HTML, and the files beside it.

    They replace those of an earlier report, all of `BESIDE`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / PAGE, directory / "report.md"]
    if written[0].exists():
        for name in BESIDE:
            (directory / name).unlink(missing_ok=True)
        for path in (directory / TABLES).glob("*.csv"):
            path.unlink()
    replace_text(written[0], page)
    written[1].write_text(markdown(report))
    for name, frame in report.data.items():
        frame.to_csv(directory / name, index=False)
        written.append(directory / name)
    for block in blocks(report):
        if isinstance(block, Figure):
            block.draw(directory / block.name)
            written += [directory / block.name, (directory / block.name).with_suffix(".svg")]
    assert {path.name for path in written[2:]} <= {*BESIDE}, "a later report would leave them"
    if tables := [block for block in blocks(report) if isinstance(block, Table)]:
        (directory / TABLES).mkdir(exist_ok=True)
        for table in tables:
            cells = table.frame.map(lambda cell: cell.text if isinstance(cell, Link) else cell)
            cells.to_csv(directory / TABLES / f"{slug(table.title)}.csv", index=False)
        written.append(directory / TABLES)
    return written


def slug(title: str) -> str:
    """A title as a file's name: `Arms against gelu, 95% intervals` is `arms-against-gelu-95-intervals`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def blocks(report: Report) -> list[Block]:
    """The blocks of all sections."""
    return [block for section in report.sections for block in section.blocks]


def markdown(report: Report) -> str:
    """Paragraphs, tables and figures; charts, maps and samples are only on the page."""
    lines = [f"# {report.title}", "", *([report.question, ""] if report.question else [])]
    lines += [f"**{report.answer}**", "", *(f"- {caution}" for caution in report.cautions), ""]
    for section in report.sections:
        shown = [part for block in section.blocks for part in in_markdown(block)]
        lines += [f"## {section.title}", "", *shown] if shown else []
    return "\n".join(lines)


def in_markdown(block: Block, *, links: bool = True) -> list[str]:
    """A block's lines; without `links`, which lead to files beside the report, only their words."""
    if isinstance(block, Paragraph):
        return [block.text, ""]
    if isinstance(block, Code):
        return ["```", block.text, "```", ""]
    if isinstance(block, Figure):
        return [f"![{block.title}]({block.name})", ""]
    if isinstance(block, Table) and len(block.frame) <= MARKDOWN_ROWS:
        head = [f"### {block.title}", "", "| " + " | ".join(block.frame) + " |"]
        cell = partial(in_cell, links=links)
        rows = ["| " + " | ".join(map(cell, row)) + " |" for row in block.frame.itertuples(index=False)]
        return [*head, "|" + "---|" * len(block.frame.columns), *rows, ""]
    return []


def in_cell(value: object, *, links: bool) -> str:
    """A cell of a table in Markdown."""
    if isinstance(value, Link):
        text = f"[{value.text}]({value.target})" if links else value.text
    else:
        text = cell_text(value)
    return " ".join(text.split()).replace("|", "\\|")
