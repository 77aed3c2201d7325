"""The reports that report.py writes: of a study's arms, of a law, of what there is of a study, of one run, of any runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scantling.report.arm_charts import forest_chart, gain_chart, lengths_chart, scale_chart
from scantling.report.curve_charts import curves_chart, others_chart, with_others
from scantling.report.law_charts import law_charts
from scantling.report.records import (
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
from scantling.report.spec import Axis, Block, Chart, Code, Figure, Report, Section, Series, Table, Text
from scantling.report.view_charts import Views, view_section
from scantling.study import ablation_report, law_report
from scantling.study.ablation_report import AblationReport
from scantling.study.arms import StudyRuns, mean_of, rows
from scantling.study.figures import draw_arms, draw_law
from scantling.study.law_report import LawReport
from scantling.study.lengths import FILES as LENGTHS
from scantling.study.store import load_tuning

FOLDED = 20
"""Rows above which a table of runs is shown when asked for."""


LISTED = 1500
"""Rows of that table: a page stays below 6 MB."""


@dataclass(frozen=True)
class Recorded:
    """Runs and what was recorded beside them. `directory`: where the page will stand; `sweep`, `question`: their yaml of
    `sweeps/` and its first comment; `command`: what writes the page."""

    name: str
    runs: pd.DataFrame
    curves: pd.DataFrame
    directory: Path
    study: Path | None
    sweep: dict[str, Any] | None
    question: str
    command: str


def arms_page(found: AblationReport, study: StudyRuns, recorded: Recorded) -> Report:
    """Arms against the baseline."""
    order = found.order
    runs = in_order(study.runs, order)
    recorded = replace(recorded, runs=in_order(study.recorded, order))
    colours = with_others({}, recorded.runs["arm"])
    compute = {
        scale: mean_of(rows(study.runs, scale=scale, arm=found.baseline), "flops")
        for scale in dict.fromkeys(found.arms["scale"])
    }
    tables = ablation_report.tables(found)
    compared: list[Block] = [forest_chart(found, colours)]
    compared += [
        chart
        for chart in (scale_chart(found, compute, colours), gain_chart(found, colours))
        if chart is not None
    ]
    compared += [Table(title, table) for title, table in tables.items()]
    compared += [Text(trend) for trend in found.trends]
    draw = lambda path: draw_arms(  # noqa: E731
        recorded.curves, study.runs, found.arms, path, metric=found.metric, baseline=found.baseline
    )
    compared.append(Figure("Curves of the arms, and their differences", "arms.png", draw))
    largest = runs.iloc[np.flatnonzero(runs["scale"] == found.largest)]
    sections = [
        *training(recorded.runs, recorded.curves, found.metric, colours=colours),
        Section("Arms compared", tuple(compared)),
        *tuning(recorded, colours),
        *lengths(recorded, colours),
        *records(of_each_arm(largest), recorded),
    ]
    cautions = [*found.cautions, *failures(study.recorded), *mixed(study.runs)]
    seeds = sorted(set(study.runs["seed"]))
    return Report(
        title=study.name,
        kind=f"{len(order)} arms · {len(seeds)} seeds · {len(study.runs)} finished runs",
        question=recorded.question,
        answer=ablation_report.answer(found),
        cautions=tuple(cautions),
        sections=tuple(sections),
        data={"arms.csv": found.arms},
    )


def law_page(laws: LawReport, *, name: str, study: StudyRuns | None, recorded: Recorded | None) -> Report:
    """The law of a table of runs; `study`, `recorded`: where they are a study of ours."""
    blocks: list[Block] = [*law_charts(laws)]
    blocks += [Table(title, table) for title, table in law_report.tables(laws).items()]
    runs = laws.observations.runs
    draw = lambda path: draw_law(  # noqa: E731
        laws.fit,
        runs["C"].to_numpy(),
        path,
        k=laws.observations.k,
        title=law_report.headline(laws).partition(":")[0],
        cutoff=None if laws.gate is None else laws.gate.cutoff,
        caution=laws.fit.verdict if laws.gate is not None and not laws.gate.passed else None,
    )
    blocks += [Figure("Loss against compute, and what the fit leaves", "fit.png", draw)]
    blocks += [Text(law_report.headline(laws))]
    blocks += [Text(laws.gate.verdict)] if laws.gate is not None and laws.gate.passed else []
    sections = [Section("The law", tuple(blocks))]
    cautions = [text for text in law_report.cautions(laws) if laws.gate is None or text != laws.gate.verdict]
    if laws.gate is not None and not laws.gate.passed:
        cautions.insert(0, laws.gate.verdict)
    question = ""
    if study is not None and recorded is not None:
        recorded = replace(recorded, runs=study.recorded)
        sections = [*training(study.recorded, recorded.curves, "loss", by_size=True), *sections]
        sections += records(of_each_arm(study.runs), recorded)
        cautions += [*failures(study.recorded), *mixed(study.runs)]
        question = recorded.question
    else:
        sections.append(
            Section("Runs", (Table(f"The {len(runs)} rows of {laws.source}", runs, folded=True),))
        )
    data = {"parameters.csv": laws.parameters}
    return Report(
        title=name,
        kind=f"scaling law · {len(runs)} runs",
        question=question,
        answer=law_report.answer(laws),
        cautions=tuple(text.removeprefix("warning: ") for text in cautions),
        sections=tuple(sections),
        data=data if laws.optimum is None else data | {"optimum.csv": laws.optimum},
    )


def partial_page(recorded: Recorded, cautions: list[str], why: str) -> Report:
    """What there is of a study that gives no answer, and `why`."""
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
        else f"{run['bpb']:.4f} bits per byte, {run['loss']:.4f} nats per token after {run['tokens']:,.0f} tokens"
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
        else f"The lowest of {len(runs)}: {best['bpb']:.4f} bits per byte by {best['run']} ({best['arm']}, seed {best['seed']})."
    )
    return Report(
        title=recorded.name,
        kind=f"{len(runs)} runs",
        question="",
        answer=answer,
        cautions=tuple(cautions),
        sections=(*training(runs, recorded.curves, "bpb"), *records(runs, recorded)),
    )


# --- sections ---


def in_order(runs: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    """Sorted by arm, those of `arms` first and in their order."""
    place = {arm: i for i, arm in enumerate(arms)}
    return runs.assign(place=runs["arm"].map(lambda arm: place.get(arm, len(arms)))).sort_values(
        ["place", "arm", "seed"], kind="stable"
    )


def training(runs: pd.DataFrame, curves: pd.DataFrame, metric: str, **settings) -> list[Section]:
    """`settings`: those of `curves_chart`."""
    chart = curves_chart(curves, runs, metric=metric, **settings)
    return [] if chart is None else [Section("Loss over training", (chart,))]


def tuning(recorded: Recorded, colours: Mapping[str, int]) -> list[Section]:
    """What `tune=lr` tried."""
    if recorded.study is None or all(pd.isna(note) for note in recorded.runs["tuned"].tolist()):
        return []
    tried = load_tuning(recorded.study)
    colours = with_others(colours, tried["arm"])
    found = []
    for arm in dict.fromkeys(tried["arm"]):
        of_arm, chosen = rows(tried, arm=arm), rows(tried, arm=arm, chosen=True)
        values = {"lr": of_arm["lr"].tolist(), "bpb": of_arm["bpb"].tolist()}
        found.append(Series(str(arm), values, colour=colours[arm]))
        ring = {"lr": chosen["lr"].tolist(), "bpb": chosen["bpb"].tolist()}
        found.append(Series(str(arm), ring, style="rings", colour=colours[arm], hover=f"{arm}: chosen"))
    chart = Chart(
        "Learning rates tried",
        tuple(found),
        (Axis("lr", "learning rate", log=True),),
        (Axis("bpb", "bits per byte"),),
        note="In shorter runs of a seed of their own; rings: what the comparison uses.",
        height=320,
    )
    return [Section("Learning rates", (chart,))]


def lengths(recorded: Recorded, colours: Mapping[str, int]) -> list[Section]:
    """Of what `evaluate.py lengths=[…] to=DIR` left beside the page or in the study."""
    for place in (recorded.directory, recorded.study):
        if place is not None and (place / LENGTHS[0]).exists():
            chart = lengths_chart(json.loads((place / LENGTHS[0]).read_text()), colours)
            return [Section("Beyond the length of training", (chart,))]
    return []


def records(examples: pd.DataFrame, recorded: Recorded) -> list[Section]:
    """Settings that differ and samples of `examples`, all runs, provenance."""
    settings = differing_settings(examples)
    samples = last_samples(examples)
    table = runs_table(recorded.runs.iloc[:LISTED], recorded.directory)
    n = len(recorded.runs)
    title = f"All {n} runs" if n <= LISTED else f"The first {LISTED} of {n} runs"
    shown = Table(title, table, folded=n > FOLDED)
    return [
        *([Section("Settings that differ", (Table("Between arms", settings),))] if len(settings) else []),
        *([Section("Samples side by side", (samples,))] if samples else []),
        Section("Runs", (shown,)),
        provenance_of(recorded),
    ]


def provenance_of(recorded: Recorded) -> Section:
    commands = [recorded.command]
    if recorded.study is not None or len(recorded.runs) == 1:
        commands.insert(0, train_command(recorded.runs, recorded.sweep))
    return Section("Provenance", (Table("Made with", provenance(recorded.runs)), Code("\n".join(commands))))


def transposed(table: pd.DataFrame) -> pd.DataFrame:
    """The one row of a table as two columns."""
    return pd.DataFrame({"": table.columns, "value": table.iloc[0].tolist()})
