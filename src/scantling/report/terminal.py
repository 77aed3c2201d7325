"""Tables of the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table


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
