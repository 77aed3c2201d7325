"""What report.py prints and writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from scantling.command_line import ROOT, Mistake, mistakes
from scantling.report.html import page
from scantling.report.pages import Recorded, arms_page, law_page, partial_page, run_page, runs_page
from scantling.report.spec import PAGE, Report, figures_of, write
from scantling.run_directory import RunDirectory
from scantling.study import ablation_report, law_report
from scantling.study.ablation_report import AblationReport, report_arms
from scantling.study.allocation import frontier
from scantling.study.arms import (
    StudyRuns,
    first_arm,
    joined,
    recorded_runs,
    settings_of,
    study_runs,
    varied_keys,
)
from scantling.study.law_report import LawReport, report_law
from scantling.study.observations import Observations, observe, read_table
from scantling.study.scaling import Fit, fit_hoffmann
from scantling.study.store import find, load_curves, load_runs

PRINTED_WIDTH = 160
"""Of lines that go to a file or a pipe."""

WHOLE = ("scale", "arm", "paired t", "verdict")
"""Columns whose cells stay on one line."""

WIDE = ["bootstrap", "seeds for precision"]
"""Columns that the page has and a terminal has no room for."""

SOURCES = ("fit", "study", "run", "runs")
"""Settings of which one says what the report is of; with fit, run names a column."""


def report(config: DictConfig) -> None:
    """Fit or compare, print, and write the report. Raises Mistake for what the user can put right."""
    console = terminal()
    with mistakes():
        check(config)
        task = {"fit": report_table, "study": report_study, "run": report_run, "runs": report_run}[
            source(config)
        ]
        if not config.watch:
            task(config, console)
    if config.watch:
        watch(config, lambda: task(config, terminal(quiet=True)), console)


def terminal(quiet: bool = False) -> Console:
    """What runs say is printed as it stands: brackets and colons in it are no markup."""
    width = None if sys.stdout.isatty() else PRINTED_WIDTH
    return Console(quiet=quiet, highlight=False, markup=False, emoji=False, width=width)


def watch(config: DictConfig, once: Callable[[], None], console: Console) -> None:
    """Write the page again and again. It asks for itself again too, until the last writing, after Ctrl-C."""
    try:
        while True:
            begun = time.monotonic()
            try:
                with mistakes():
                    once()
                said = "written"
            except Mistake as mistake:  # a study that has just begun gives no answer yet
                said = str(mistake)
            console.print(
                f"{time.strftime('%H:%M:%S')} {said}, {time.monotonic() - begun:.1f} s; Ctrl-C ends"
            )
            time.sleep(config.watch_seconds)
    except KeyboardInterrupt:
        config.watch = False
        with mistakes():
            once()


# --- anyone's table ---

OWN_COLUMNS = {
    "n": ["params", "params_without_embeddings"],
    "d": "tokens",
    "c": "flops",
    "loss": "loss",
    "run": None,
    "unique": "unique_tokens",
    "same": ("corpus", "tokenizer"),
}
"""Of the tables of our own runs."""


def report_table(config: DictConfig, console: Console) -> None:
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    path = Path(config.fit).expanduser()
    table = read_table(path)
    _ = config.n, config.loss  # raises where they are not given
    columns = {key: settings[key] for key in ("n", "d", "c", "loss", "run", "unique", "same")}
    laws = law_of_runs(config, observed(config, table, columns), path.name)
    found = law_page(laws, name=path.stem, study=None, recorded=None)
    show_law(console, laws, written(config, found, directory_of(config, path.name)))


def observed(config: DictConfig, table: pd.DataFrame, columns: dict[str, Any]) -> Observations:
    return observe(table, **columns, drop_highest=config.drop_highest, irreducible=config.irreducible)


def law_of_runs(config: DictConfig, observations: Observations, named: str) -> LawReport:
    return report_law(
        observations,
        source=named,
        resamples=config.resamples,
        level=config.level,
        seed=config.seed,
        held_out=config.gate.held_out,
        tolerance=config.gate.tolerance,
        budgets=None if config.budgets is None else list(config.budgets),
    )


# --- a study of ours ---


def report_study(config: DictConfig, console: Console) -> None:
    """Its law or its arms compared. Where its runs give neither, raises ValueError after a page of what there is."""
    directory = Path(config.paths.runs) / config.study
    runs, cautions = recorded_runs(directory)
    recorded = recorded_study(config, directory, runs)
    try:
        study = study_runs(directory)
        if study.is_law:
            found = law_of_runs(config, of_study(config, study), study.name)
            made = law_page(found, name=study.name, study=study, recorded=recorded)
        else:
            found = arms_of(config, study, recorded.sweep)
            made = arms_page(found, study, recorded)
    except ValueError as error:
        if isinstance(error, WrongSetting):
            raise
        file = written(config, partial_page(recorded, cautions, str(error)), recorded.directory)[0]
        raise ValueError(f"{error}; what there is: {file}") from error
    files = written(config, made, recorded.directory)
    published(config, console, made, study)
    if isinstance(found, LawReport):
        show_law(console, found, files)
    else:
        console.print(ablation_report.headline(found), style="bold")
        for note in ablation_report.notes(found):
            console.print(note, style="yellow" if note.startswith("warning") else "")
        show(console, ablation_report.tables(found), files)


def published(config: DictConfig, console: Console, made: Report, study: StudyRuns) -> None:
    """With publish=wandb. Raises ValueError naming the page where W&B does not take it."""
    if config.publish is None:
        return
    from scantling.report.published import grouping, publish, sync  # here, as wandb takes a second

    page_file = directory_of(config, study.name) / PAGE
    try:
        project = config.wandb.project or project_of(RunDirectory(study.runs["path"].iloc[0]))
        sent, waiting = sync(Path(config.paths.runs) / config.study)
        url = publish(
            made,
            entity=config.wandb.entity,
            project=project,
            group=study.name,
            by=grouping(study),
            draft=config.wandb.draft,
        )
    except ValueError as error:
        raise ValueError(f"{error}; the page is {page_file}") from error
    if waiting:
        console.print(f"not sent, as they are not finished: {', '.join(waiting)}")
    console.print(
        f"{sent} runs sent, report {'saved as a draft' if config.wandb.draft else 'published'}: {url}"
    )


def project_of(run: RunDirectory) -> str:
    """The project that a run was logged to. Raises ValueError where it was logged elsewhere."""
    logger = yaml.safe_load(run.config.read_text()).get("logger") or {}
    if "project" not in logger:
        raise ValueError(
            "these runs were not logged to W&B (logger=wandb): name a project with wandb.project=…"
        )
    return logger["project"]


class WrongSetting(ValueError):
    """Of the command, not of the runs: no page is written for it."""


def arms_of(config: DictConfig, study: StudyRuns, sweep: dict[str, Any] | None) -> AblationReport:
    arms = sorted(study.runs["arm"].unique())
    if config.baseline is not None and config.baseline not in set(study.recorded["arm"]):
        raise WrongSetting(f"no runs of the baseline {config.baseline}: arms are {', '.join(arms)}")
    return report_arms(
        study,
        baseline=config.baseline or first_arm(sweep, arms),
        metric=config.metric,
        precision=config.precision,
        law=None if config.law is None else law_of(config, study),
        level=config.level,
        resamples=config.resamples,
        seed=config.seed,
    )


def of_study(config: DictConfig, study: StudyRuns) -> Observations:
    """A study of sizes as a table of runs."""
    said = not any(pd.isna(count) for count in study.runs["unique_tokens"])  # records of old do not say
    found = observed(config, study.runs, OWN_COLUMNS if said else OWN_COLUMNS | {"unique": None})
    return found.with_warnings(*study.cautions)


def law_of(config: DictConfig, study: StudyRuns) -> Fit:
    """Loss against compute by the runs of another study. Raises WrongSetting where these are no sizes of one model, or
    are of other text."""
    sizes = study_runs(Path(config.paths.runs) / config.law)
    if not sizes.is_law:
        raise WrongSetting(f"law={config.law}: its runs differ in more than size, length and learning rate")
    for name in ("corpus", "tokenizer"):
        if sizes.runs[name].iloc[0] != study.runs[name].iloc[0]:
            raise WrongSetting(
                f"law={config.law} is of another {name} than study={config.study}: losses do not compare"
            )
    runs = of_study(config, sizes).runs
    settings = {"resamples": config.resamples, "level": config.level, "seed": config.seed}
    law = fit_hoffmann(runs["N"], runs["D"], runs["loss"], **settings)
    return frontier(
        law, k=float(np.median(runs["C"].to_numpy() / runs["N"].to_numpy() / runs["D"].to_numpy()))
    )


def recorded_study(config: DictConfig, directory: Path, runs: pd.DataFrame) -> Recorded:
    path = sweep_of(directory)
    return Recorded(
        name=directory.name,
        runs=runs.assign(scale=scales(runs)),
        curves=load_curves(directory),
        directory=directory_of(config, directory.name),
        study=directory,
        sweep=None if path is None else yaml.safe_load(path.read_text()),
        question="" if path is None else question_of(path),
        command=command(),
    )


def sweep_of(directory: Path) -> Path | None:
    """The yaml of `sweeps/` that a study's launcher noted."""
    note = directory / "study.json"
    if not note.exists():
        return None
    path = ROOT / "sweeps" / f"{json.loads(note.read_text())['sweeps']}.yaml"
    return path if path.exists() else None


def question_of(sweep: Path) -> str:
    """The first comment of a sweep's yaml, up to its commands."""
    lines = []
    for line in sweep.read_text().splitlines()[1:]:
        if not re.match(r"# \S", line):
            break
        lines.append(line.removeprefix("# "))
    return " ".join(lines).removesuffix(" Written by")


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
        runs=runs.assign(scale=scales(runs)).set_index("run", drop=False),
        curves=rows_of(found, labels, load_curves),
        directory=directory_of(config, place_of(found)),
        study=None,
        sweep=None,
        question="",
        command=command(),
    )
    made = run_page(recorded) if config.runs is None else runs_page(recorded)
    files = written(config, made, recorded.directory)
    console.print(made.answer)
    for caution in made.cautions:
        console.print(f"warning: {caution}", style="yellow")
    console.print(", ".join(map(str, files)))


def labels_of_studies(studies: list[Path]) -> dict[Path, str]:
    """What stands before the names of their runs and arms, so that no two are alike: nothing where there is one study."""
    different = set(studies)
    if len(different) == 1:
        return dict.fromkeys(different, "")
    names = {study.name for study in different}
    return {study: f"{study.name if len(names) == len(different) else study}/" for study in different}


def place_of(found: list[RunDirectory]) -> str:
    """Of a page, below the directory of all pages: no study's, and of no other choice of runs."""
    first = found[0].path
    if len(found) == 1:
        return f"{first.parent.name}/{first.name}"
    digest = hashlib.sha256("\n".join(str(run.path) for run in found).encode()).hexdigest()[:6]
    return f"{first.name}-and-{len(found) - 1}-more-{digest}"


def scales(runs: pd.DataFrame) -> pd.Series:
    """What runs of one arm differ in beside their seeds, so that no curve is the mean of different models."""
    found = pd.Series("", index=runs.index)
    for _, of_arm in runs.groupby("arm", sort=False):
        settings = [settings_of(text) for text in of_arm["overrides"]]
        keys = varied_keys(settings)
        found.loc[of_arm.index] = [joined(setting, keys) for setting in settings]
    return found


def rows_of(
    found: list[RunDirectory], labels: dict[Path, str], load: Callable[[Path], pd.DataFrame]
) -> pd.DataFrame:
    """Of these runs, in their order and with their study's label, from the tables of their studies. Raises ValueError
    naming one that cannot be read."""
    tables = {study: load(study) for study in labels}
    chosen = []
    for run in found:
        table = tables[run.path.parent]
        if run.name in table.attrs["left_out"]:
            raise ValueError(f"{run.path} cannot be read: {table.attrs['left_out'][run.name]}")
        rows = table.iloc[np.flatnonzero(table["run"] == run.name)] if len(table) else table
        chosen.append(rows.assign(run=labels[run.path.parent] + run.name))
    return pd.concat(chosen, ignore_index=True)


# --- pages, terminal ---


def command() -> str:
    """What was typed."""
    return " ".join(["python src/report.py", *HydraConfig.get().overrides.task])


def directory_of(config: DictConfig, name: str) -> Path:
    return Path(config.to or Path(config.paths.runs) / "reports" / name)


def written(config: DictConfig, made: Report, directory: Path) -> list[Path]:
    reload_seconds = config.watch_seconds if config.watch else None
    return write(made, directory, page=page(made, command=command(), reload_seconds=reload_seconds))


def show_law(console: Console, laws: LawReport, files: list[Path]) -> None:
    console.print(law_report.headline(laws))
    for caution in law_report.cautions(laws):
        console.print(caution, style="" if "gate passed" in caution else "yellow")
    show(console, law_report.tables(laws), files)


def show(console: Console, tables: dict[str, pd.DataFrame], files: list[Path]) -> None:
    for title, table in tables.items():
        console.print(printed(table.drop(columns=WIDE, errors="ignore"), title))
    console.print(f"\n{', '.join(str(path) for path in files)}")


def printed(table: pd.DataFrame, title: str) -> Table:
    shown = Table(title=f"\n{title}", box=None, title_justify="left")
    for name in table:
        heading = str(name).replace("tokens_per_parameter", "D/N")
        shown.add_column(
            heading, justify="left" if name in ("arm", "scale") else "right", no_wrap=name in WHOLE
        )
    for row in table.itertuples(index=False):
        shown.add_row(*map(figures_of, row))
    return shown


# --- settings ---


def source(config: DictConfig) -> str:
    """Which of `SOURCES` is given."""
    given = [name for name in SOURCES if config[name] is not None and (name != "run" or config.fit is None)]
    if len(given) != 1:
        raise ValueError(
            "give one of fit=FILE, anyone's table of runs, study=NAME, run=DIR, and runs=[NAME,NAME], of ours"
        )
    return given[0]


def check(config: DictConfig) -> None:
    source(config)
    if config.runs is not None and not (isinstance(config.runs, ListConfig) and len(config.runs)):
        raise ValueError(
            f"runs={config.runs} must be a list, as runs=[NAME,NAME]; one run is run={config.runs}"
        )
    if config.fit is None and isinstance(config.run, ListConfig):
        raise ValueError(
            f"run=[{','.join(map(str, config.run))}] is one run's: several side by side are runs=[NAME,NAME]"
        )
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
