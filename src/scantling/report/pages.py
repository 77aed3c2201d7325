"""Reports that need only runs: one run, several side by side, a study without an answer yet.

Their sections serve other pages too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scantling.analysis.arms import rows_where
from scantling.report.curve_charts import curves_chart, others_chart, with_others
from scantling.report.numbers import some
from scantling.report.records import (
    COMPARED,
    SAMPLES,
    differing_settings,
    failures,
    last_samples,
    mixed,
    of_each_arm,
    provenance,
    runs_table,
    samples_over_training,
    settings_of_run,
    train_command,
)
from scantling.report.spec import Axis, Chart, Code, Report, Section, Series, Table
from scantling.report.view_charts import Views, view_section
from scantling.runs.table import rates_tried

FOLDED = 20
"""Rows above which a table of runs is folded."""

LISTED = 1500
"""Rows of the table of runs at most, so that a page stays below 6 MB."""


@dataclass(frozen=True)
class Recorded:
    """Runs and what was recorded beside them.

    `directory`: where the page will stand; `sweep`, `question`: their yaml of `sweeps/` and its first
    comment; `command`: what writes the page.
    """

    name: str
    runs: pd.DataFrame
    curves: pd.DataFrame
    directory: Path
    study: Path | None
    sweep: dict[str, Any] | None
    question: str
    command: str


def partial_page(recorded: Recorded, cautions: list[str], why: str) -> Report:
    """What a study without an answer has to show; `why`: it gives none."""
    counts = recorded.runs["status"].value_counts()
    sections = [
        *training(recorded.runs, recorded.curves, "loss"),
        *records(of_each_arm(recorded.runs), recorded),
    ]
    return Report(
        title=recorded.name,
        kind=" · ".join(f"{count} {status}" for status, count in counts.items()),
        question=recorded.question,
        answer=f"No answer yet: {why}",
        cautions=(*cautions, *failures(recorded.runs), *mixed(recorded.runs)),
        sections=tuple(sections),
    )


def run_page(recorded: Recorded, views: Views) -> Report:
    """One run, and what its checkpoints show."""
    run = recorded.runs.to_dict("records")[0]
    samples = samples_over_training(run)
    numbers = runs_table(recorded.runs, recorded.directory)
    best = (
        "" if pd.isna(run["best_bpb"]) else f"; at best {run['best_bpb']:.4f} at step {run['best_step']:,.0f}"
    )
    reached = (
        "nothing was validated yet"
        if pd.isna(run["bpb"])
        else f"{run['bpb']:.4f} bits per byte, {run['loss']:.4f} nats per token after {run['tokens']:,.0f} "
        "tokens"
    )
    others = others_chart(recorded.curves)
    sections = [
        *training(recorded.runs, recorded.curves, "bpb"),
        *([Section("Other curves", (others,))] if others else []),
        Section("Numbers", (Table("At the last step", transposed(numbers)),)),
        *([Section("Samples over training", (samples,))] if samples else []),
        view_section(views),
        Section("Settings", (Table("Every setting", settings_of_run(run), folded=True),)),
        provenance_of(recorded),
    ]
    return Report(
        title=str(run["run"]),
        kind=f"{run['status']} run · {run['arm']} · seed {run['seed']}",
        question="",
        answer=f"{reached[0].upper()}{reached[1:]}{best}.",
        cautions=tuple(failures(recorded.runs)),
        sections=tuple(sections),
    )


def runs_page(recorded: Recorded) -> Report:
    """Any runs side by side: no comparison of arms, as nothing says what pairs them."""
    runs = recorded.runs.sort_values("bpb")
    best = runs.to_dict("records")[0]
    cautions = [*failures(runs), *mixed(runs)]
    if len(set(runs["tokenizer"])) > 1:
        cautions.insert(0, "these runs have different tokenizers: compare bits per byte, not nats per token")
    if len(set(runs["corpus"])) > 1:
        cautions.insert(0, "these runs are of different texts: their losses do not compare")
    answer = (
        "None of these runs was validated yet."
        if pd.isna(best["bpb"])
        else f"The lowest of {len(runs)}: {best['bpb']:.4f} bits per byte by {best['run']} "
        f"({best['arm']}, seed {best['seed']})."
    )
    return Report(
        title=recorded.name,
        kind=some(len(runs), "run"),
        question="",
        answer=answer,
        cautions=tuple(cautions),
        sections=(*training(runs, recorded.curves, "bpb"), *records(runs, recorded)),
    )


# --- sections ---


def in_order(runs: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Runs sorted by arm, those of `arms` first and in their order."""
    place = {arm: i for i, arm in enumerate(arms)}
    return runs.assign(place=runs["arm"].map(lambda arm: place.get(arm, len(arms)))).sort_values(
        ["place", "arm", "seed"], kind="stable"
    )


def training(runs: pd.DataFrame, curves: pd.DataFrame, metric: str, **settings) -> list[Section]:
    """The section of curves; `settings`: those of `curves_chart`."""
    chart = curves_chart(curves, runs, metric=metric, **settings)
    return [] if chart is None else [Section("Loss over training", (chart,))]


def tuning(recorded: Recorded, colours: Mapping[str, int]) -> list[Section]:
    """The section of the learning rates that `tune=lr` tried."""
    if recorded.study is None or all(pd.isna(note) for note in recorded.runs["tuned"].tolist()):
        return []
    tried = rates_tried(recorded.runs)
    colours = with_others(colours, tried["arm"])
    found = []
    for arm, scale in dict.fromkeys(zip(tried["arm"], tried["scale"], strict=True)):
        here = rows_where(tried, arm=arm, scale=scale)
        name, colour = ", ".join(filter(None, (str(arm), str(scale)))), colours[arm]
        rings = rows_where(here, chosen=True)
        found.append(Series(str(arm), tried_of(here), colour=colour, hover=name))
        found.append(Series(str(arm), tried_of(rings), style="rings", colour=colour, hover=f"{name}: chosen"))
    chart = Chart(
        "Learning rates tried",
        tuple(found),
        (Axis("lr", "learning rate", log=True),),
        (Axis("bpb", "bits per byte"),),
        note="In runs of a seed of their own; rings: what the comparison uses.",
        height=320,
    )
    return [Section("Learning rates", (chart,))]


def tried_of(rates: pd.DataFrame) -> dict[str, list[float]]:
    """Learning rates, and the bits per byte of each."""
    return {key: rates[key].tolist() for key in ("lr", "bpb")}


def records(examples: pd.DataFrame, recorded: Recorded) -> list[Section]:
    """Sections of settings that differ and samples, both of `examples`; of all runs; of provenance."""
    settings = differing_settings(examples)
    samples = last_samples(examples)
    table = runs_table(recorded.runs.iloc[:LISTED], recorded.directory)
    n = len(recorded.runs)
    title = ("The run" if n == 1 else f"All {n} runs") if n <= LISTED else f"The first {LISTED} of {n} runs"
    shown = Table(title, table, folded=n > FOLDED)
    m = len(examples)
    between = "Between arms" if m <= COMPARED else f"Between the first {COMPARED} of {m} arms"
    side_by_side = "Samples side by side" + ("" if m <= SAMPLES else f", of the first {SAMPLES} of {m} arms")
    return [
        *([Section("Settings that differ", (Table(between, settings),))] if len(settings) else []),
        *([Section(side_by_side, (samples,))] if samples else []),
        Section("Runs", (shown,)),
        provenance_of(recorded),
    ]


def provenance_of(recorded: Recorded) -> Section:
    """The section on how and by which commands the runs and the page were made."""
    commands = [recorded.command]
    if recorded.study is not None or len(recorded.runs) == 1:
        commands.insert(0, train_command(recorded.runs, recorded.sweep))
    return Section("Provenance", (Table("Made with", provenance(recorded.runs)), Code("\n".join(commands))))


def transposed(table: pd.DataFrame) -> pd.DataFrame:
    """The one row of a table as two columns."""
    return pd.DataFrame({"": table.columns, "value": table.iloc[0].tolist()})
