"""What report.py prints and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from scantling.command_line import ROOT, mistakes
from scantling.study import ablation_report, law_report
from scantling.study.ablation_report import report_arms
from scantling.study.allocation import frontier
from scantling.study.arms import StudyRuns, first_arm, study_runs
from scantling.study.law_report import LawReport, figures_of, report_law
from scantling.study.observations import Observations, observe, read_table
from scantling.study.scaling import Fit, fit_hoffmann
from scantling.study.store import load_curves

PRINTED_WIDTH = 160
"""Of lines that go to a file or a pipe."""


def report(config: DictConfig) -> None:
    """Fit or compare, print, and write the report. Raises Mistake for what the user can put right."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PRINTED_WIDTH)
    with mistakes():
        check(config)
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        if config.fit is not None:
            source = Path(config.fit).expanduser()
            table = read_table(source)
            _ = config.n, config.loss  # raises where they are not given
            columns = {key: settings[key] for key in ("n", "d", "c", "loss", "run", "unique", "same")}
            return report_runs(config, console, observed(config, table, columns), source.name, source.stem)
        study = study_runs(Path(config.paths.runs) / config.study)
        if study.is_law:
            return report_runs(config, console, of_study(config, study), study.name, study.name)
        report_study(config, console, study)


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


def observed(config: DictConfig, table: pd.DataFrame, columns: dict[str, Any]) -> Observations:
    return observe(table, **columns, drop_highest=config.drop_highest, irreducible=config.irreducible)


def of_study(config: DictConfig, study: StudyRuns) -> Observations:
    """A study of sizes as a table of runs."""
    said = not any(pd.isna(count) for count in study.runs["unique_tokens"])  # records of old do not say
    found = observed(config, study.runs, OWN_COLUMNS if said else OWN_COLUMNS | {"unique": None})
    return found.with_warnings(*study.cautions)


def report_runs(
    config: DictConfig, console: Console, observations: Observations, source: str, name: str
) -> None:
    """The law of a table of runs."""
    laws: LawReport = report_law(
        observations,
        source=source,
        resamples=config.resamples,
        level=config.level,
        seed=config.seed,
        held_out=config.gate.held_out,
        tolerance=config.gate.tolerance,
        budgets=None if config.budgets is None else list(config.budgets),
    )
    files = law_report.write(laws, directory_of(config, name))
    console.print(law_report.headline(laws))
    for caution in law_report.cautions(laws):
        console.print(caution, style="" if "gate passed" in caution else "yellow")
    show(console, law_report.tables(laws), files)


def report_study(config: DictConfig, console: Console, study: StudyRuns) -> None:
    """Arms against the baseline."""
    arms = sorted(study.runs["arm"].unique())
    baseline = config.baseline or first_arm(sweep_of(Path(config.paths.runs) / config.study), arms)
    found = report_arms(
        study,
        baseline=baseline,
        metric=config.metric,
        precision=config.precision,
        law=None if config.law is None else law_of(config, study),
        level=config.level,
        resamples=config.resamples,
        seed=config.seed,
    )
    curves = load_curves(Path(config.paths.runs) / config.study)
    files = ablation_report.write(found, study, curves, directory_of(config, study.name))
    console.print(f"[bold]{ablation_report.headline(found)}[/bold]")
    for note in ablation_report.notes(found):
        console.print(note, style="yellow" if note.startswith("warning") else "")
    show(console, ablation_report.tables(found), files)


def law_of(config: DictConfig, study: StudyRuns) -> Fit:
    """Loss against compute by the runs of another study. Raises ValueError where these are no sizes of one model, or are
    of other text."""
    sizes = study_runs(Path(config.paths.runs) / config.law)
    if not sizes.is_law:
        raise ValueError(f"law={config.law}: its runs differ in more than size, length and learning rate")
    for name in ("corpus", "tokenizer"):
        if sizes.runs[name].iloc[0] != study.runs[name].iloc[0]:
            raise ValueError(
                f"law={config.law} is of another {name} than study={config.study}: losses do not compare"
            )
    runs = of_study(config, sizes).runs
    settings = {"resamples": config.resamples, "level": config.level, "seed": config.seed}
    law = fit_hoffmann(runs["N"], runs["D"], runs["loss"], **settings)
    return frontier(
        law, k=float(np.median(runs["C"].to_numpy() / runs["N"].to_numpy() / runs["D"].to_numpy()))
    )


def sweep_of(directory: Path) -> dict[str, Any] | None:
    """The yaml of `sweeps/` that a study's launcher noted."""
    note = directory / "study.json"
    if not note.exists():
        return None
    path = ROOT / "sweeps" / f"{json.loads(note.read_text())['sweeps']}.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else None


def directory_of(config: DictConfig, name: str) -> Path:
    return Path(config.to or Path(config.paths.runs) / "reports" / name)


def show(console: Console, tables: dict[str, pd.DataFrame], files: list[Path]) -> None:
    for title, table in tables.items():
        console.print(printed(table, title))
    console.print(f"\n{', '.join(str(path) for path in files)}")


def check(config: DictConfig) -> None:
    if (config.fit is None) == (config.study is None):
        raise ValueError("give one of fit=FILE, anyone's table of runs, and study=NAME, one of ours")
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


def printed(table: pd.DataFrame, title: str) -> Table:
    shown = Table(title=f"\n{title}", box=None, title_justify="left")
    for name in table:
        shown.add_column(str(name).replace("tokens_per_parameter", "D/N"), justify="right")
    for row in table.itertuples(index=False):
        shown.add_row(*map(figures_of, row))
    return shown
