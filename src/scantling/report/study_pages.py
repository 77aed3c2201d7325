"""The reports of a study that has an answer, arms or a law, and of any table of runs.

What they need takes seconds to import; pages that need only runs do without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from scantling.analysis.arms import StudyRuns, mean_of, rows_where
from scantling.analysis.comparison import Ablation
from scantling.analysis.law import ScalingLaw
from scantling.report import arm_words, law_words
from scantling.report.arm_charts import forest_chart, gain_chart, lengths_chart, scale_chart
from scantling.report.curve_charts import with_others
from scantling.report.figures import draw_arms, draw_gains, draw_grid, draw_law
from scantling.report.law_charts import law_charts
from scantling.report.lengths import FILES as LENGTHS
from scantling.report.pages import Recorded, in_order, records, training, tuning
from scantling.report.records import failures, mixed, of_each_arm
from scantling.report.sentences import sentence
from scantling.report.spec import PALETTE, Block, Figure, Paragraph, Report, Section, Table


def arms_page(found: Ablation, study: StudyRuns, recorded: Recorded) -> Report:
    """Arms against the baseline."""
    order = found.order
    runs = in_order(study.runs, order)
    recorded = replace(recorded, runs=in_order(study.recorded, order))
    colours = with_others({}, recorded.runs["arm"])
    compute = {
        scale: mean_of(rows_where(study.runs, scale=scale, arm=found.baseline), "flops")
        for scale in dict.fromkeys(found.arms["scale"])
    }
    compared: list[Block] = [forest_chart(found, colours)]
    compared += [
        chart
        for chart in (scale_chart(found, compute, colours), gain_chart(found, colours))
        if chart is not None
    ]
    compared += [Table(title, table) for title, table in arm_words.tables(found).items()]
    compared += [Paragraph(arm_words.trend_line(trend)) for trend in found.trends]
    in_print = {arm: PALETTE[i % len(PALETTE)][0] for arm, i in colours.items()}
    of_arms = {"baseline": found.baseline, "colours": in_print}
    draw = partial(draw_arms, recorded.curves, study.runs, found.arms, metric=found.metric, **of_arms)
    compared.append(Figure("Curves of the arms, and their differences", "arms.png", draw))
    gains = found.gains_table
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
    cautions = [*map(sentence, found.cautions), *failures(study.recorded), *mixed(study.runs)]
    seeds = sorted(set(study.runs["seed"]))
    return Report(
        title=study.name,
        kind=f"{len(order)} arms · {len(seeds)} seeds · {len(study.runs)} finished runs",
        question=recorded.question,
        answer=arm_words.answer(found),
        cautions=tuple(cautions),
        sections=tuple(sections),
        data={"arms.csv": found.arms} | ({} if gains is None else {"gains.csv": gains}),
    )


def law_page(law: ScalingLaw, *, name: str, study: StudyRuns | None, recorded: Recorded | None) -> Report:
    """The law of a table of runs; `study`, `recorded`: where they are a study of this project."""
    headline = law_words.headline(law)
    blocks: list[Block] = [*law_charts(law)]
    blocks += [Table(title, table) for title, table in law_words.tables(law).items()]
    runs = law.observations.runs
    verdict = None if law.gate is None else law_words.gate_verdict(law.gate)
    draw = partial(
        draw_law,
        law.fit,
        runs["C"].to_numpy(),
        k=law.observations.k,
        title=headline.partition(":")[0],
        cutoff=None if law.gate is None else law.gate.cutoff,
        caution=None if verdict is None or law.passed else verdict,
    )
    blocks += [Figure("Loss against compute, and what the fit leaves", "fit.png", draw)]
    if law.isoflop is not None:
        draw = partial(draw_grid, law.fit, runs["C"].to_numpy(), title=f"approach 2, {len(runs)} runs")
        blocks += [Figure("Budgets, sizes and tokens", "grid.png", draw)]
    blocks += [Paragraph(headline)]
    blocks += [Paragraph(verdict)] if verdict is not None and law.passed else []  # else it is a caution
    sections = [Section("The law", tuple(blocks))]
    cautions = law_words.cautions(law)
    question = ""
    if study is not None and recorded is not None:
        recorded = replace(recorded, runs=study.recorded)
        sections = [*training(study.recorded, recorded.curves, "loss", by_size=True), *sections]
        sections += records(of_each_arm(study.runs), recorded)
        cautions += [*failures(study.recorded), *mixed(study.runs)]
        question = recorded.question
    else:
        sections.append(Section("Runs", (Table(f"The {len(runs)} rows of {law.source}", runs, folded=True),)))
    data = {"parameters.csv": law.parameters}
    return Report(
        title=name,
        kind=f"scaling law · {len(runs)} runs",
        question=question,
        answer=law_words.answer(law),
        cautions=tuple(cautions),
        sections=tuple(sections),
        data=data if law.optimum is None else data | {"optimum.csv": law.optimum},
    )


def lengths(recorded: Recorded, colours: Mapping[str, int]) -> list[Section]:
    """The section of what `evaluate.py lengths=[…] to=DIR` left beside the page or in the study."""
    for place in (recorded.directory, recorded.study):
        if place is not None and (place / LENGTHS[0]).exists():
            arms = dict(zip(recorded.runs["run"], recorded.runs["arm"], strict=True))
            chart = lengths_chart(json.loads((place / LENGTHS[0]).read_text()), arms, colours)
            return [Section("Beyond the length of training", (chart,))]
    return []
