"""What runs.py does: recorded runs listed, shown, compared, exported, imported from W&B, removed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from scantling.config.mistakes import mistakes
from scantling.config.suggestions import nearest
from scantling.report.numbers import number_or_blank
from scantling.report.terminal import fitting_columns, line_width, longest, open_console
from scantling.runs.directory import RunDirectory
from scantling.runs.table import differences, find, load_curves, load_runs
from scantling.runs.wandb_import import import_run, mirrored_runs

OF_RUNS = ("show", "diff", "rm")
"""Actions on runs that are named."""

LISTED = ("run", "status", "arm", "seed", "params", "tokens", "flops", "loss", "bpb", "seconds")

WORDS = ("run", "status", "arm")

FORMS = {
    **dict.fromkeys(("params", "tokens"), ",.0f"),
    **dict.fromkeys(("loss", "bpb"), ".4f"),
    "flops": ".3g",
    **dict.fromkeys(("seed", "seconds"), ".0f"),
}
"""Formats of columns of numbers."""

FIRST_TO_GO = ("seconds", "flops", "tokens", "params", "loss", "seed")
"""Columns that a narrow terminal has no room for."""

ARM_WIDTH = 24
"""Width to which an arm is folded before another column goes."""


def manage_runs(config: DictConfig) -> None:
    """Carry out `action=`. Raises Mistake for what the user can put right."""
    console = open_console()
    actions: dict[str, Callable[[DictConfig, Console], None]] = {
        "ls": ls,
        "show": show,
        "diff": diff,
        "export": export,
        "import": import_from_wandb,
        "rm": rm,
    }
    with mistakes():
        if config.action not in actions:
            raise ValueError(f"action={config.action} is unknown: use {', '.join(actions)}")
        if config.run and config.action not in OF_RUNS:
            raise ValueError(f"run= is of action={', '.join(OF_RUNS)}: action={config.action} takes none")
        actions[config.action](config, console)


def ls(config: DictConfig, console: Console) -> None:
    """Print a line for each run, and what was left out."""
    study = study_of(config)
    frame = load_runs(study)
    if not len(frame):
        console.print(f"no runs in {study}")
    else:
        if config.sort not in frame:
            raise ValueError(f"sort={config.sort} is not a column: use one of {', '.join(frame.columns)}")
        frame = frame.sort_values(config.sort)
        cells = {name: [cell_of(name, value) for value in frame[name]] for name in LISTED}
        widths = {name: longest([name, *column]) for name, column in cells.items()}
        shown = fitting_columns(widths | {"arm": min(widths["arm"], ARM_WIDTH)}, FIRST_TO_GO, console.width)
        console.width = max(console.width, line_width(shown))  # names of runs and their status stay whole
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in shown:
            folds = name == "arm"
            table.add_column(
                name, justify="left" if name in WORDS else "right", no_wrap=not folds, overflow="fold"
            )
        for row in zip(*(cells[name] for name in shown), strict=True):
            table.add_row(*row)
        console.print(table)
        if hidden := [name for name in LISTED if name not in shown]:
            console.print(f"[dim]no room for: {', '.join(hidden)}[/dim]")
    for name, why in frame.attrs["left_out"].items():
        console.print(f"[dim]left out: {escape(name)}, {escape(why)}[/dim]")


def study_of(config: DictConfig) -> Path:
    """The study's directory. Raises ValueError naming the studies that there are, where it is not one."""
    runs = Path(config.paths.runs)
    study = runs / config.study
    if not study.is_dir():
        studies = [path.parent.parent.name for path in runs.glob("*/*/config.yaml")]
        raise ValueError(
            f"{study} is not a directory of a study{nearest(config.study, sorted(set(studies)))}"
        )
    return study


def cell_of(name: str, value: Any) -> str:
    """The text of a value in a column of the list."""
    if name in FORMS:
        return number_or_blank(value, FORMS[name])
    return "" if pd.isna(value) else escape(str(value))


def runs_of(config: DictConfig, least: int, most: int | None) -> list[RunDirectory]:
    """The runs that `run=` names. Raises ValueError for fewer or more than the action takes."""
    names = list(config.run) if isinstance(config.run, ListConfig) else [config.run]
    if len(names) < least or (most is not None and len(names) > most):
        wanted = "run=[ONE,OTHER]" if least == 2 else "run=NAME"
        raise ValueError(f"action={config.action} wants {wanted}; {len(names)} are given")
    return find(Path(config.paths.runs), names)


def show(config: DictConfig, console: Console) -> None:
    """Print everything that is known of each run."""
    runs = runs_of(config, 1, None)
    frames = {study: load_runs(study) for study in dict.fromkeys(run.path.parent for run in runs)}
    for run in runs:
        frame = frames[run.path.parent]
        left_out = frame.attrs["left_out"]
        if run.name in left_out:
            raise ValueError(f"{run.path} cannot be read: {left_out[run.name]}")
        row = frame.iloc[list(frame["run"]).index(run.name)]
        table = Table.grid(padding=(0, 2))
        for key, value in row.items():
            if not pd.isna(value):
                table.add_row(f"[bold]{key}[/bold]", escape(" ".join(str(value).splitlines())))
        console.print(table)


def diff(config: DictConfig, console: Console) -> None:
    """Print the settings in which two runs differ."""
    one, other = runs_of(config, 2, 2)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("setting", one.name, other.name):
        table.add_column(column, overflow="fold")
    for key, here, there in differences(one, other):
        table.add_row(key, escape(str(here)), escape(str(there)))
    console.print(table)


def export(config: DictConfig, console: Console) -> None:
    """Write the table of runs, or of their curves, to a file. Raises ValueError for another kind of file."""
    writers: dict[str, Callable[[pd.DataFrame, Path], object]] = {
        ".csv": lambda frame, path: frame.to_csv(path, index=False),
        ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
    }
    path = Path(config.to or "")
    if path.suffix not in writers:
        raise ValueError(f"to={config.to}: name a file that ends in {', '.join(writers)}")
    frame = (load_curves if config.curves else load_runs)(study_of(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](frame, path)
    console.print(f"{len(frame):,} rows of {len(frame.columns)} columns: {path}")


def import_from_wandb(config: DictConfig, console: Console) -> None:
    """Import runs from W&B, a line for each. Raises ValueError where none could be imported."""
    if config.source is None:
        raise ValueError(
            "action=import wants source=FILE.wandb, a directory with such files, or ENTITY/PROJECT"
        )
    imported = 0
    readers = mirrored_runs(config.source)
    for read in track(readers, "importing", console=console, transient=True, disable=not console.is_terminal):
        try:
            console.print(escape(import_run(read(), Path(config.paths.runs))), soft_wrap=True)
            imported += 1
        except ValueError as error:
            console.print(f"[dim]left out: {escape(str(error))}[/dim]", soft_wrap=True)
    if not imported:
        raise ValueError(f"source={config.source} holds no run of this project")


def rm(config: DictConfig, console: Console) -> None:
    """Remove runs: only directories of runs below paths.runs, and only with yes=true."""
    runs = runs_of(config, 1, None)
    root = Path(config.paths.runs).resolve()
    for run in runs:
        if run.path.is_symlink() or run.path.resolve().parent.parent != root:
            raise ValueError(f"{run.path} is not a run in a study of {config.paths.runs}/, and stays")
        if list(run.path.glob("lease-*.json")):
            raise ValueError(f"{run.path} is held by a launcher (lease-*.json), and stays")
    if not config.yes:
        raise ValueError(f"yes=true removes {', '.join(str(run.path) for run in runs)} for good")
    for run in runs:
        shutil.rmtree(run.path)
        console.print(f"removed {run.path}")
