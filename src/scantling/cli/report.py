"""What report.py prints and writes."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from scantling.analysis.arms import tell_models_apart
from scantling.cli.report_page import command, directory_of, warn, write_page
from scantling.config.mistakes import Mistake, mistakes
from scantling.report.pages import Recorded, run_page, runs_page
from scantling.report.terminal import open_console
from scantling.report.view_charts import Views
from scantling.runs.directory import RunDirectory
from scantling.runs.table import find, load_curves, load_runs

SOURCES = ("fit", "study", "run", "runs")
"""What a report can be of; one of these settings is given. With fit, run names a column."""


def report(config: DictConfig) -> None:
    """Fit or compare, print, and write the report. Raises Mistake for what the user can put right."""
    console = terminal()
    with mistakes():
        check_settings(config)
        task = task_of(source(config))
        if not config.watch:
            task(config, console)
    if config.watch:
        watch(config, lambda: task(config, terminal(quiet=True)), console)


def task_of(source: str) -> Callable[[DictConfig, Console], None]:
    """The function that makes a report of this source."""
    if source in ("run", "runs"):
        return report_run
    from scantling.cli.report_study import (  # here, as SciPy and Matplotlib take two seconds
        report_study,
        report_table,
    )

    return report_table if source == "fit" else report_study


def terminal(quiet: bool = False) -> Console:
    """A terminal that prints texts of runs as they are: brackets and colons in them are not markup."""
    return open_console(quiet=quiet, markup=False, emoji=False)


def watch(config: DictConfig, once: Callable[[], None], console: Console) -> None:
    """Write the page again and again.

    The page reloads itself too, until it is written for the last time, after Ctrl-C.
    """
    try:
        while True:
            begun = time.monotonic()
            try:
                with mistakes():
                    once()
                outcome = "written"
            except Mistake as mistake:  # a study that has just begun gives no answer yet
                outcome = str(mistake)
            console.print(
                f"{time.strftime('%H:%M:%S')} {outcome}, {time.monotonic() - begun:.1f} s; Ctrl-C ends"
            )
            time.sleep(config.watch_seconds)
    except KeyboardInterrupt:
        config.watch = False
        with mistakes():
            once()


# --- runs ---


def report_run(config: DictConfig, console: Console) -> None:
    """One run, or any runs side by side."""
    names = [config.run] if config.runs is None else list(config.runs)
    paths = dict.fromkeys(os.path.abspath(run.path) for run in find(Path(config.paths.runs), names))
    found = [RunDirectory(path) for path in paths]
    labels = labels_of_studies([run.path.parent for run in found])
    runs = rows_of(found, labels, load_runs)
    runs = runs.assign(
        path=list(paths),
        arm=[labels[run.path.parent] + str(arm) for run, arm in zip(found, runs["arm"], strict=True)],
    )
    recorded = Recorded(
        name=found[0].name if len(found) == 1 else f"{len(found)} runs",
        runs=tell_models_apart(runs.assign(scale="")).set_index("run", drop=False),
        curves=rows_of(found, labels, load_curves),
        directory=directory_of(config, place_of(found)),
        study=None,
        sweep=None,
        question="",
        command=command(config),
    )
    page = runs_page(recorded) if config.runs is not None else run_page(recorded, views(config, found[0]))
    files = write_page(config, page, recorded.directory)
    console.print(page.answer)
    for caution in page.cautions:
        warn(console, caution)
    console.print(", ".join(map(str, files)))


def views(config: DictConfig, run: RunDirectory) -> Views:
    """What the run's checkpoints show.

    Raises ValueError for what was asked for and cannot be shown; for anything else the page says why.
    """
    try:
        if not any(run.checkpoints.glob("*.ckpt")):
            raise ValueError(f"{os.path.relpath(run.checkpoints)} holds no checkpoint")
        from scantling.inference.views import views_of  # here, as PyTorch takes a second

        return views_of(
            run, tokens=None if config.tokens is None else list(config.tokens), prompt=config.prompt
        )
    except (ValueError, OSError, RuntimeError, HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())  # of other versions' runs too
        if config.tokens is not None or config.prompt is not None:
            raise ValueError(reason) from error
        return Views((f"No embeddings and no attention: {reason}.",))


def labels_of_studies(studies: list[Path]) -> dict[Path, str]:
    """What stands before the names of a study's runs and arms, so that no two are alike.

    Nothing where there is only one study.
    """
    different = set(studies)
    if len(different) == 1:
        return dict.fromkeys(different, "")
    names = {study.name for study in different}
    return {study: f"{study.name if len(names) == len(different) else study}/" for study in different}


def place_of(found: list[RunDirectory]) -> str:
    """A page's place below the directory of all pages: not one of a study's, nor of other runs'."""
    first = found[0].path
    if len(found) == 1:
        return f"{first.parent.name}/{first.name}"
    digest = hashlib.sha256("\n".join(str(run.path) for run in found).encode()).hexdigest()[:6]
    return f"{first.name}-and-{len(found) - 1}-more-{digest}"


def rows_of(
    found: list[RunDirectory], labels: dict[Path, str], load: Callable[[Path], pd.DataFrame]
) -> pd.DataFrame:
    """Rows of these runs, in their order and with their study's label, from the tables of their studies.

    Raises ValueError naming a run that cannot be read.
    """
    tables = {study: load(study) for study in labels}
    places = {study: table.groupby("run").indices if len(table) else {} for study, table in tables.items()}
    chosen = []
    for run in found:
        study, table = run.path.parent, tables[run.path.parent]
        if run.name in table.attrs["left_out"]:
            raise ValueError(f"{run.path} cannot be read: {table.attrs['left_out'][run.name]}")
        chosen.append(table.iloc[places[study].get(run.name, [])].assign(run=labels[study] + run.name))
    return pd.concat(chosen, ignore_index=True)


# --- settings ---


def source(config: DictConfig) -> str:
    """Which of `SOURCES` is given."""
    given = [name for name in SOURCES if config[name] is not None and (name != "run" or config.fit is None)]
    if len(given) != 1:
        raise ValueError("give one of fit=FILE (any table of runs), study=NAME, run=NAME, runs=[NAME,NAME]")
    return given[0]


def check_settings(config: DictConfig) -> None:
    """Raise ValueError for the first setting that is out of range."""
    source(config)
    if config.runs is not None and not (isinstance(config.runs, ListConfig) and len(config.runs)):
        raise ValueError(
            f"runs={config.runs} must be a list, as runs=[NAME,NAME]; one run is run={config.runs}"
        )
    if config.fit is None and isinstance(config.run, ListConfig):
        raise ValueError(
            f"run=[{','.join(map(str, config.run))}] is one run's: several side by side are runs=[NAME,NAME]"
        )
    for name in ("tokens", "prompt"):
        if config[name] is not None and source(config) != "run":
            raise ValueError(f"{name}= is of the page of one run: add run=NAME")
    if config.tokens is not None and not (isinstance(config.tokens, ListConfig) and len(config.tokens)):
        raise ValueError(f"tokens={config.tokens} must be a list, as tokens=[def,self]")
    if config.publish not in (None, "wandb"):
        raise ValueError(f"publish={config.publish} is unknown: use wandb")
    if config.publish and (config.study is None or config.watch):
        raise ValueError("publish=wandb is of a study=NAME, once: not of fit=, run=, runs= and watch=true")
    if config.watch and config.fit is not None:
        raise ValueError("watch=true is of study=, run= and runs=: a table of runs does not change")
    if config.watch_seconds <= 0:
        raise ValueError(f"watch_seconds={config.watch_seconds} must be positive")
    if config.metric not in ("loss", "bpb"):
        raise ValueError(f"metric={config.metric} is unknown: use loss or bpb")
    if config.law is not None and config.metric != "loss":
        raise ValueError("law= is of the loss in nats per token: use metric=loss")
    if config.precision <= 0:
        raise ValueError(f"precision={config.precision} must be positive")
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
