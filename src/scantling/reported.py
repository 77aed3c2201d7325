"""What report.py prints and writes."""

from __future__ import annotations

import json
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
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from scantling.command_line import ROOT, Mistake, mistakes
from scantling.report.html import page
from scantling.report.pages import Recorded, arms_page, law_page, partial_page, run_page, runs_page
from scantling.report.spec import PAGE, Report, figures_of, write
from scantling.report.view_charts import Views
from scantling.run_directory import RunDirectory
from scantling.study import ablation_report, law_report
from scantling.study.ablation_report import AblationReport, report_arms
from scantling.study.allocation import frontier
from scantling.study.arms import StudyRuns, first_arm, recorded_runs, study_runs
from scantling.study.law_report import LawReport, fit_law, report_law
from scantling.study.observations import Observations, observe, read_table
from scantling.study.scaling import Fit
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
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    with mistakes():
        check(config)
        task = {"fit": report_table, "study": report_study, "run": report_run, "runs": report_run}[
            source(config)
        ]
        if not config.watch:
            task(config, console)
    if config.watch:
        watch(config, lambda: task(config, Console(quiet=True)), console)


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
    show_law(console, laws, written(config, found, directory_of(config, path.stem)))


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
        console.print(f"[bold]{ablation_report.headline(found)}[/bold]")
        for note in ablation_report.notes(found):
            console.print(note, style="yellow" if note.startswith("warning") else "")
        show(console, ablation_report.tables(found), files)


def published(config: DictConfig, console: Console, made: Report, study: StudyRuns) -> None:
    """With publish=wandb. Raises ValueError naming the page where W&B does not take it."""
    if config.publish is None:
        return
    from scantling.report.published import publish, sync  # here, as wandb takes a second

    directory = Path(config.paths.runs) / config.study
    page_file = directory_of(config, study.name) / PAGE
    try:
        project = config.wandb.project or project_of(RunDirectory(study.runs["path"].iloc[0]))
        sent = sync(directory / "wandb")
        url = publish(
            made, entity=config.wandb.entity, project=project, group=study.name, draft=config.wandb.draft
        )
    except ValueError as error:
        raise ValueError(f"{error}; the page is {page_file}") from error
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
    observations = of_study(config, sizes)
    law = fit_law(observations, resamples=config.resamples, level=config.level, seed=config.seed)
    return frontier(law, k=observations.k)


def recorded_study(config: DictConfig, directory: Path, runs: pd.DataFrame) -> Recorded:
    path = sweep_of(directory)
    return Recorded(
        name=directory.name,
        runs=runs,
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
    found = find(Path(config.paths.runs), names)
    name = found[0].name if len(found) == 1 else f"{found[0].name}-and-{len(found) - 1}-more"
    recorded = Recorded(
        name=name if len(found) == 1 else f"{len(found)} runs",
        runs=rows_of(found, load_runs).assign(scale="").set_index("run", drop=False),
        curves=rows_of(found, load_curves),
        directory=directory_of(config, name),
        study=None,
        sweep=None,
        question="",
        command=command(),
    )
    made = runs_page(recorded) if config.runs is not None else run_page(recorded, views(config, found[0]))
    files = written(config, made, recorded.directory)
    console.print(made.answer)
    for caution in made.cautions:
        console.print(f"warning: {caution}", style="yellow")
    console.print(", ".join(map(str, files)))


def views(config: DictConfig, run: RunDirectory) -> Views:
    """Of its checkpoints. Raises ValueError for what was asked for and cannot be shown; else the page says why."""
    try:
        if not any(run.checkpoints.glob("*.ckpt")):
            raise ValueError(f"{run.checkpoints} holds no checkpoint")
        from scantling.views import views_of  # here, as PyTorch takes a second

        return views_of(
            run, tokens=None if config.tokens is None else list(config.tokens), prompt=config.prompt
        )
    except (ValueError, OSError, RuntimeError, HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())  # of other versions' runs too
        if config.tokens is not None or config.prompt is not None:
            raise ValueError(reason) from error
        return Views((f"No embeddings and no attention: {reason}.",))


def rows_of(found: list[RunDirectory], load: Callable[[Path], pd.DataFrame]) -> pd.DataFrame:
    """Of these runs, in their order, from the tables of their studies. Raises ValueError naming one that cannot be read."""
    tables = {study: load(study) for study in dict.fromkeys(run.path.parent for run in found)}
    chosen = []
    for run in found:
        table = tables[run.path.parent]
        if run.name in table.attrs["left_out"]:
            raise ValueError(f"{run.path} cannot be read: {table.attrs['left_out'][run.name]}")
        chosen.append(table.iloc[np.flatnonzero(table["run"] == run.name)] if len(table) else table)
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
        shown.add_column(
            str(name), justify="left" if name in ("arm", "scale") else "right", no_wrap=name in WHOLE
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
