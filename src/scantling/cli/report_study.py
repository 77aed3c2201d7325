"""What report.py prints and writes of a study, and of any table of runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from scantling.analysis.allocation import frontier
from scantling.analysis.arms import (
    StudyRuns,
    finished_runs,
    first_arm,
    recorded_runs,
    study_runs,
    tell_models_apart,
)
from scantling.analysis.comparison import Ablation, NothingToCompare, compare_arms
from scantling.analysis.law import ScalingLaw, find_law, fit_law
from scantling.analysis.observations import Observations, observe, read_table
from scantling.analysis.scaling import Fit
from scantling.cli.report_page import command, directory_of, warn, write_page
from scantling.config.options import ROOT
from scantling.report import arm_words, law_words
from scantling.report.numbers import cell_text, some
from scantling.report.pages import Recorded, partial_page
from scantling.report.sentences import sentence
from scantling.report.spec import PAGE, Report, holds_answer
from scantling.report.study_pages import arms_page, law_page
from scantling.report.terminal import fitted_table
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

# --- any table of runs ---

OWN_COLUMNS = {
    "n": ["params", "params_without_embeddings"],
    "d": "tokens",
    "c": "flops",
    "loss": "loss",
    "run": None,
    "unique": "unique_tokens",
    "same": ("corpus", "tokenizer"),
}
"""Columns of the tables of this project's own runs."""


def report_table(config: DictConfig, console: Console) -> None:
    """Print the law of any table of runs, and write its report."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    path = Path(config.fit).expanduser()
    table = read_table(path)
    _ = config.n, config.loss  # raises where they are not given
    columns = {key: settings[key] for key in ("n", "d", "c", "loss", "run", "unique", "same")}
    law = law_of_runs(config, observe_table(config, table, columns), path.name)
    page = law_page(law, name=path.stem, study=None, recorded=None)
    print_law(console, law, write_page(config, page, directory_of(config, path.name)))


def observe_table(config: DictConfig, table: pd.DataFrame, columns: dict[str, Any]) -> Observations:
    """The table's columns, checked, with what the command line says of them."""
    return observe(table, **columns, drop_highest=config.drop_highest, irreducible=config.irreducible)


def law_of_runs(config: DictConfig, observations: Observations, named: str) -> ScalingLaw:
    """The law by the settings of the command line."""
    return find_law(
        observations,
        source=named,
        resamples=config.resamples,
        level=config.level,
        seed=config.seed,
        held_out=config.gate.held_out,
        tolerance=config.gate.tolerance,
        budgets=None if config.budgets is None else list(config.budgets),
    )


# --- a study of this project ---


def report_study(config: DictConfig, console: Console) -> None:
    """Print a study's law, or its arms compared, and write the report.

    Where its runs give neither, it raises ValueError after writing a page of what there is; that page
    replaces none with an answer.
    """
    directory = Path(config.paths.runs) / config.study
    runs, cautions = recorded_runs(directory)
    recorded = recorded_study(config, directory, runs)
    try:
        study = finished_runs(directory, runs, cautions)
        if study.is_law:
            found = law_of_runs(config, observations_of(config, study), study.name)
            page = law_page(found, name=study.name, study=study, recorded=recorded)
        else:
            found = compare_study(config, study, recorded.sweep)
            page = arms_page(found, study, recorded)
    except ValueError as error:
        if isinstance(error, WrongSetting):
            raise
        if holds_answer(recorded.directory):
            raise ValueError(f"{error}; {recorded.directory / PAGE} stays as it was") from error
        partial = partial_page(recorded, list(map(sentence, cautions)), str(error))
        file = write_page(config, partial, recorded.directory)[0]
        raise ValueError(f"{error}; what there is: {file}") from error
    files = write_page(config, page, recorded.directory)
    publish_page(config, console, page, study)
    if isinstance(found, ScalingLaw):
        print_law(console, found, files)
    else:
        print_arms(console, found, files)


def publish_page(config: DictConfig, console: Console, page: Report, study: StudyRuns) -> None:
    """With publish=wandb, send the page to W&B. Raises ValueError naming the page where it is refused."""
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
            page,
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
    """A mistake in the command, not in the runs: no page is written for it."""


def compare_study(config: DictConfig, study: StudyRuns, sweep: dict[str, Any] | None) -> Ablation:
    """The arms of a study compared.

    Raises ValueError for arms that cannot be compared, WrongSetting for a baseline that is not in the study.
    """
    arms = sorted(study.runs["arm"].unique())
    if config.baseline is not None and config.baseline not in set(study.recorded["arm"]):
        raise WrongSetting(f"no runs of the baseline {config.baseline}: arms are {', '.join(arms)}")
    try:
        return compare_arms(
            study,
            baseline=config.baseline or first_arm(sweep, arms),
            metric=config.metric,
            precision=config.precision,
            law=None if config.law is None else law_of(config, study),
            level=config.level,
            resamples=config.resamples,
            seed=config.seed,
        )
    except NothingToCompare as error:
        lost = "; ".join(map(sentence, error.lost))
        raise ValueError(f"nothing to compare yet: {lost}" if lost else str(error)) from error


def observations_of(config: DictConfig, study: StudyRuns) -> Observations:
    """A study of sizes as a table of runs."""
    known = not any(pd.isna(count) for count in study.runs["unique_tokens"])  # records of old do not say
    columns = OWN_COLUMNS if known else OWN_COLUMNS | {"unique": None}
    return observe_table(config, study.runs, columns).with_warnings(*study.cautions)


def law_of(config: DictConfig, study: StudyRuns) -> Fit:
    """Loss against compute by the runs of another study.

    Raises WrongSetting where these are not sizes of one model, or are on other text.
    """
    sizes = study_runs(Path(config.paths.runs) / config.law)
    if not sizes.is_law:
        raise WrongSetting(f"law={config.law}: its runs differ in more than size, length and learning rate")
    for name in ("corpus", "tokenizer"):
        if sizes.runs[name].iloc[0] != study.runs[name].iloc[0]:
            raise WrongSetting(
                f"law={config.law} is of another {name} than study={config.study}: losses do not compare"
            )
    observations = observations_of(config, sizes)
    law = fit_law(observations, resamples=config.resamples, level=config.level, seed=config.seed)
    return frontier(law, k=observations.k)


def recorded_study(config: DictConfig, directory: Path, runs: pd.DataFrame) -> Recorded:
    """A study's runs with their curves, and the yaml of `sweeps/` that made them."""
    path = sweep_of(directory)
    return Recorded(
        name=directory.name,
        runs=tell_models_apart(runs),
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


def print_law(console: Console, law: ScalingLaw, files: list[Path]) -> None:
    """Print what was fitted, what to distrust, tables, and names of files."""
    console.print(law_words.headline(law))
    if law.gate is not None and law.passed:
        console.print(law_words.gate_verdict(law.gate))
    for caution in law_words.cautions(law):
        warn(console, caution)
    print_tables(console, law_words.tables(law), files)


def print_arms(console: Console, ablation: Ablation, files: list[Path]) -> None:
    """Print what is decided, what to distrust, trends, tables, and names of files."""
    console.print(arm_words.headline(ablation), style="bold")
    for caution in ablation.cautions:
        warn(console, sentence(caution))
    for trend in ablation.trends:
        console.print(arm_words.trend_line(trend))
    print_tables(console, arm_words.tables(ablation), files)


def print_tables(console: Console, tables: dict[str, pd.DataFrame], files: list[Path]) -> None:
    """Print as much of each table as there is room for, and the files that have all of it."""
    for title, table in tables.items():
        kept = table.drop(columns=WIDE, errors="ignore")
        columns = {str(name): [cell_text(value) for value in kept[name]] for name in kept}
        fitted = fitted_table(columns, f"\n{title}", console.width, minor=MINOR, names=NAMES, whole=WHOLE)
        console.print(fitted)
    console.print(f"\n{', '.join(str(path) for path in files)}")
