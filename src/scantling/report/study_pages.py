"""The reports of a study that has an answer, arms or a law, and of anyone's table of runs. What they need takes seconds to
import, and pages of runs alone do without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from scantling.analysis import ablation_report, law_report
from scantling.analysis.ablation_report import AblationReport
from scantling.analysis.arms import StudyRuns, mean_of, rows
from scantling.analysis.law_report import LawReport
from scantling.report.arm_charts import forest_chart, gain_chart, lengths_chart, scale_chart
from scantling.report.curve_charts import with_others
from scantling.report.figures import draw_arms, draw_gains, draw_grid, draw_law
from scantling.report.law_charts import law_charts
from scantling.report.lengths import FILES as LENGTHS
from scantling.report.pages import Recorded, in_order, records, training, tuning
from scantling.report.records import failures, mixed, of_each_arm
from scantling.report.spec import PALETTE, Block, Figure, Report, Section, Table, Text


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
    printed = {arm: PALETTE[i % len(PALETTE)][0] for arm, i in colours.items()}
    of_arms = {"baseline": found.baseline, "colours": printed}
    draw = partial(draw_arms, recorded.curves, study.runs, found.arms, metric=found.metric, **of_arms)
    compared.append(Figure("Curves of the arms, and their differences", "arms.png", draw))
    gains = found.gains
    if gains is not None and np.isfinite(gains["gain"]).any():
        draw = partial(draw_gains, gains, **of_arms)
        compared.append(Figure("What each arm is worth in compute", "gains.png", draw))
    largest = runs.iloc[np.flatnonzero(runs["scale"] == found.largest)]
    sections = [
        *training(recorded.runs, recorded.curves, found.metric, colours=colours, baseline=found.baseline),
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
        data={"arms.csv": found.arms} | ({} if gains is None else {"gains.csv": gains.drop(columns=[""])}),
    )


def law_page(laws: LawReport, *, name: str, study: StudyRuns | None, recorded: Recorded | None) -> Report:
    """The law of a table of runs; `study`, `recorded`: where they are a study of ours."""
    blocks: list[Block] = [*law_charts(laws)]
    blocks += [Table(title, table) for title, table in law_report.tables(laws).items()]
    runs = laws.observations.runs
    draw = partial(
        draw_law,
        laws.fit,
        runs["C"].to_numpy(),
        k=laws.observations.k,
        title=law_report.headline(laws).partition(":")[0],
        cutoff=None if laws.gate is None else laws.gate.cutoff,
        caution=None if laws.passed else laws.fit.verdict,
    )
    blocks += [Figure("Loss against compute, and what the fit leaves", "fit.png", draw)]
    if laws.isoflop is not None:
        draw = partial(draw_grid, laws.fit, runs["C"].to_numpy(), title=f"approach 2, {len(runs)} runs")
        blocks += [Figure("Budgets, sizes and tokens", "grid.png", draw)]
    blocks += [Text(law_report.headline(laws))]
    verdict = [laws.gate.verdict] if laws.gate is not None and laws.passed else []  # no caution
    blocks += [Text(text) for text in verdict]
    sections = [Section("The law", tuple(blocks))]
    cautions = [text for text in law_report.cautions(laws) if text not in verdict]
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
        cautions=tuple(cautions),
        sections=tuple(sections),
        data=data if laws.optimum is None else data | {"optimum.csv": laws.optimum},
    )


def lengths(recorded: Recorded, colours: Mapping[str, int]) -> list[Section]:
    """Of what `evaluate.py lengths=[…] to=DIR` left beside the page or in the study."""
    for place in (recorded.directory, recorded.study):
        if place is not None and (place / LENGTHS[0]).exists():
            arms = dict(zip(recorded.runs["run"], recorded.runs["arm"], strict=True))
            chart = lengths_chart(json.loads((place / LENGTHS[0]).read_text()), arms, colours)
            return [Section("Beyond the length of training", (chart,))]
    return []
