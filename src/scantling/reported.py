"""What report.py prints and writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from scantling.command_line import mistakes
from scantling.study.law_report import cautions, figures_of, headline, report_law, tables, write
from scantling.study.observations import observe, read_table

PRINTED_WIDTH = 140
"""Of lines that go to a file or a pipe."""


def report(config: DictConfig) -> None:
    """Fit, print, and write the report. Raises Mistake for what the user can put right."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    with mistakes():
        check(config)
        source = Path(config.fit).expanduser()
        settings = OmegaConf.to_container(config, resolve=True)
        assert isinstance(settings, dict)
        observations = observe(
            read_table(source),
            **{key: settings[key] for key in ("n", "d", "c", "loss", "run", "unique", "same")},
            drop_highest=config.drop_highest,
            irreducible=config.irreducible,
        )
        laws = report_law(
            observations,
            source=source.name,
            resamples=config.resamples,
            level=config.level,
            seed=config.seed,
            held_out=config.gate.held_out,
            tolerance=config.gate.tolerance,
            budgets=settings["budgets"],
        )
        files = write(laws, Path(config.to or Path(config.paths.runs) / "reports" / source.stem))
    console.print(headline(laws))
    for caution in cautions(laws):
        console.print(caution, style="" if "gate passed" in caution else "yellow")
    for title, table in tables(laws).items():
        console.print(printed(table, title))
    console.print(f"\n{', '.join(str(path) for path in files)}")


def check(config: DictConfig) -> None:
    if not 0 < config.level < 1:
        raise ValueError(f"level={config.level} must lie between 0 and 1")
    if not 0 <= config.gate.held_out < 1:
        raise ValueError(f"gate.held_out={config.gate.held_out} must be at least 0 and below 1")
    if config.resamples < 100:
        raise ValueError(f"resamples={config.resamples} gives no interval: 100 are the least, 4000 are usual")
    if config.drop_highest < 0:
        raise ValueError(f"drop_highest={config.drop_highest} must not be negative")
    for i, budget in enumerate(config.budgets or ()):
        if budget <= 0:
            raise ValueError(f"budgets[{i}]={budget} must be positive")


def printed(table: pd.DataFrame, title: str) -> Table:
    shown = Table(title=f"\n{title}", box=None, title_justify="left")
    for name in table:
        shown.add_column(str(name).replace("tokens_per_parameter", "D/N"), justify="right")
    for row in table.itertuples(index=False):
        shown.add_row(*map(figures_of, row))
    return shown
