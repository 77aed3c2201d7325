"""The page of a report, written where the command line says, and its cautions on the terminal."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from scantling.report.html import page
from scantling.report.spec import Report, write


def command(config: DictConfig) -> str:
    """The command line that was typed."""
    return " ".join(["python src/report.py", *config.overrides])


def directory_of(config: DictConfig, name: str) -> Path:
    """The directory of a report of this name."""
    return Path(config.to or Path(config.paths.runs) / "reports" / name)


def write_page(config: DictConfig, made: Report, directory: Path) -> list[Path]:
    """Write the page and the files beside it; returns their paths."""
    reload_seconds = config.watch_seconds if config.watch else None
    return write(made, directory, page=page(made, command=command(config), reload_seconds=reload_seconds))


def warn(console: Console, caution: str) -> None:
    """Print a caution in yellow."""
    console.print(f"warning: {caution}", style="yellow")
