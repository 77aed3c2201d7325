"""What report.py prints and writes of a study, and of anyone's table of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from scantling.analysis import ablation_report, law_report
from scantling.analysis.ablation_report import AblationReport, report_arms
from scantling.analysis.allocation import frontier
from scantling.analysis.arms import StudyRuns, first_arm, recorded_runs, study_runs, told_apart
from scantling.analysis.law_report import LawReport, fit_law, report_law
from scantling.analysis.observations import Observations, observe, read_table, some
from scantling.analysis.scaling import Fit
from scantling.cli.report_page import command, directory_of, warn, written
from scantling.config.options import ROOT
from scantling.report.pages import Recorded, partial_page
from scantling.report.spec import PAGE, Report, figures_of, holds_answer
from scantling.report.study_pages import arms_page, law_page
from scantling.runs.directory import RunDirectory
from scantling.runs.table import load_curves

WHOLE = ("paired t", "verdict")
"""Columns of words whose cells stay on one line, as numbers do."""

NAMES = ("arm", "scale")
"""Columns that are broken where nothing else makes room."""

WIDE = ["bootstrap", "seeds for precision"]
"""Columns that the page has and a terminal has no room for."""

MINOR = (
    *("lr", "off", "FLOPs off", "params", "seeds", "seeds to decide", "in noise", "standard_error"),
    *("Holm p", "loss", "bpb"),
)
"""Columns that make room in a narrow terminal, in this order."""

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
    """Its law or its arms compared. Where its runs give neither, raises ValueError after a page of what there is, which takes
    no answer's place."""
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
        if holds_answer(recorded.directory):
            raise ValueError(f"{error}; {recorded.directory / PAGE} stays as it was") from error
        file = written(config, partial_page(recorded, cautions, str(error)), recorded.directory)[0]
        raise ValueError(f"{error}; what there is: {file}") from error
    files = written(config, made, recorded.directory)
    published(config, console, made, study)
    if isinstance(found, LawReport):
        show_law(console, found, files)
    else:
        console.print(ablation_report.headline(found), style="bold")
        for caution in found.cautions:
            warn(console, caution)
        for trend in found.trends:
            console.print(trend)
        show(console, ablation_report.tables(found), files)


def published(config: DictConfig, console: Console, made: Report, study: StudyRuns) -> None:
    """With publish=wandb. Raises ValueError naming the page where W&B does not take it."""
    if config.publish is None:
        return
    # Here, as wandb takes a second.
    from scantling.report.published import grouping, own_entity, publish, sync

    page_file = directory_of(config, study.name) / PAGE
    try:
        project = config.wandb.project or project_of(RunDirectory(study.runs["path"].iloc[0]))
        own = own_entity()
        sent, waiting = sync(Path(config.paths.runs) / config.study)
        url = publish(
            made,
            entity=config.wandb.entity or own,
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
        f"{some(sent, 'run')} sent, report {'saved as a draft' if config.wandb.draft else 'published'}: {url}"
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
    observations = of_study(config, sizes)
    law = fit_law(observations, resamples=config.resamples, level=config.level, seed=config.seed)
    return frontier(law, k=observations.k)


def recorded_study(config: DictConfig, directory: Path, runs: pd.DataFrame) -> Recorded:
    path = sweep_of(directory)
    return Recorded(
        name=directory.name,
        runs=told_apart(runs),
        curves=load_curves(directory),
        directory=directory_of(config, directory.name),
        study=directory,
        sweep=None if path is None else yaml.safe_load(path.read_text()),
        question="" if path is None else question_of(path),
        command=command(config),
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


# --- terminal ---


def show_law(console: Console, laws: LawReport, files: list[Path]) -> None:
    console.print(law_report.headline(laws))
    for caution in law_report.cautions(laws):
        if laws.passed and caution == laws.fit.verdict:
            console.print(caution)
        else:
            warn(console, caution)
    show(console, law_report.tables(laws), files)


def show(console: Console, tables: dict[str, pd.DataFrame], files: list[Path]) -> None:
    for title, table in tables.items():
        console.print(printed(table.drop(columns=WIDE, errors="ignore"), title, console.width))
    console.print(f"\n{', '.join(str(path) for path in files)}")


def printed(table: pd.DataFrame, title: str, width: int) -> Table:
    """In so many characters: titles of columns are stacked, then columns of `MINOR` left out, before a number is cut."""
    columns = {str(name): [figures_of(value) for value in table[name]] for name in table}
    gap = 2
    stacked = sum(longest([name, *cells]) + gap for name, cells in columns.items()) - gap > width
    for name in MINOR:
        if sum(least(*column) + gap for column in columns.items()) - gap <= width:
            break
        columns.pop(name, None)
    shown = Table(title=f"\n{title}", box=None, title_justify="left", pad_edge=False, padding=(0, gap, 0, 0))
    for name, cells in columns.items():
        shown.add_column(
            name.replace(" ", "\n") if stacked and len(name) > longest(cells) else name,
            justify="left" if name in NAMES else "right",
            no_wrap=is_whole(name, cells),
            overflow="fold",
        )
    for row in zip(*columns.values(), strict=True):
        shown.add_row(*row)
    return shown


def longest(texts: Sequence[str]) -> int:
    """Of these, in characters of a terminal."""
    return max(map(cell_len, texts), default=0)


def is_whole(name: str, cells: Sequence[str]) -> bool:
    """Whether the cells of a column stay on one line."""
    return name in WHOLE or (name not in NAMES and not any(" " in cell for cell in cells))


def least(name: str, cells: Sequence[str]) -> int:
    """Characters that a column takes at least, so that no word of it is broken."""
    return longest([*name.split(), *(cells if is_whole(name, cells) else " ".join(cells).split())])
