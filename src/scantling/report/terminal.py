"""The terminal: its width, and tables that fit into it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

PRINTED_WIDTH = 160
"""Width of lines that go to a file or a pipe: the widest table, of arms compared, fits in it."""

GAP = 2
"""Spaces between columns."""


def open_console(**settings: Any) -> Console:
    """Standard output, numbers uncoloured; `settings`: others of rich's `Console`."""
    width = None if sys.stdout.isatty() else PRINTED_WIDTH
    return Console(highlight=False, width=width, **settings)


# --- tables ---


def titled(title: str, about: str, *columns: str) -> Table:
    """An open table: its name and subject above, numbers to the right."""
    table = Table(
        box=SIMPLE_HEAD,
        title=f"[bold]{title}[/bold]  [dim]{about}[/dim]",
        title_justify="left",
        title_style="",
        header_style="dim",
        pad_edge=False,
        show_edge=False,
    )
    table.add_column(min_width=27)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def bar(share: float, width: int = 16) -> str:
    """A horizontal bar in eighths of a character."""
    eighths = round(share * width * 8)
    return f"[cyan]{'█' * (eighths // 8)}{'▏▎▍▌▋▊▉'[eighths % 8 - 1] if eighths % 8 else ''}[/cyan]"


# --- as many columns as there is room for ---


def longest(texts: Sequence[str]) -> int:
    """Width of the longest text, in characters of a terminal."""
    return max(map(cell_len, texts), default=0)


def line_width(widths: Mapping[str, int]) -> int:
    """Width of all columns together."""
    return sum(width + GAP for width in widths.values()) - GAP


def fitting_columns(widths: Mapping[str, int], minor: Sequence[str], room: int) -> dict[str, int]:
    """The columns that there is room for: `minor` ones go, in this order, until the others fit."""
    kept = dict(widths)
    for name in minor:
        if line_width(kept) <= room:
            break
        kept.pop(name, None)
    return kept


def fitted_table(
    columns: Mapping[str, Sequence[str]],
    title: str,
    width: int,
    *,
    minor: Sequence[str],
    names: Collection[str],
    whole: Collection[str],
) -> Table:
    """A table of at most `width` characters.

    Titles of columns are stacked, then columns of `minor` left out, before a number is cut. `names`:
    columns that are broken where nothing else makes room; `whole`: columns of words whose cells stay
    on one line, as numbers do.
    """

    def is_whole(name: str) -> bool:
        return name in whole or (name not in names and not any(" " in cell for cell in columns[name]))

    def least(name: str) -> int:
        """Characters that a column takes, so that no word of it is broken."""
        cells = columns[name] if is_whole(name) else " ".join(columns[name]).split()
        return longest([*name.split(), *cells])

    stacked = line_width({name: longest([name, *cells]) for name, cells in columns.items()}) > width
    kept = fitting_columns({name: least(name) for name in columns}, minor, width)
    table = Table(title=title, box=None, title_justify="left", pad_edge=False, padding=(0, GAP, 0, 0))
    for name in kept:
        table.add_column(
            name.replace(" ", "\n") if stacked and len(name) > longest(columns[name]) else name,
            justify="left" if name in names else "right",
            no_wrap=is_whole(name),
            overflow="fold",
        )
    for row in zip(*(columns[name] for name in kept), strict=True):
        table.add_row(*row)
    return table
