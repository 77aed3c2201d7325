"""What a fitted law says, in words: its answer, what to distrust, the tables that people read."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from scantling.analysis.allocation import Gate, allocation_exponent
from scantling.analysis.arms import rows_where
from scantling.analysis.law import ScalingLaw
from scantling.report.numbers import counted, digits, interval, some
from scantling.report.sentences import sentence

APPROACHES = {
    "parametric": "3, parametric",
    "parabola": "2, parabola of each budget",
    "akima": "2, akima of each budget",
    "envelope": "1, envelope of training curves",
}
"""The approaches of Hoffmann et al. 2022, by number and name."""


def headline(law: ScalingLaw) -> str:
    """What was fitted, to what, and how well it was found."""
    fit = law.fit
    return (
        f"{fit.form.formula}, {len(fit.loss)} rows of {law.source}: Huber of log loss at {fit.delta:g}, "
        f"objective {fit.objective:.6g}, found from {fit.found:.0%} of the starts"
    )


def answer(law: ScalingLaw) -> str:
    """How to divide the largest budget asked for, or else the runs' largest; or why that cannot be said.

    It is one sentence.
    """
    fit = law.fit
    if law.optimum is None:
        return (
            f"These runs determine no optimum: alpha = {fit.alpha:.3g} and beta = {fit.beta:.3g} must both "
            "be positive."
        )
    a, ends = allocation_exponent(fit)
    at = optimum_as_read(rows_where(law.optimum, C=law.target)).iloc[0]
    return (
        f"At {at['FLOPs']} FLOPs the least loss, {at['nats per token']} nats per token, takes "
        f"{at['parameters']} parameters and {at['tokens']} tokens; the best size grows as C^{a:.3g}"
        + (f" ({interval(*ends, '.3g')}); {fit.level:.0%} intervals." if ends else ".")
    )


def gate_verdict(gate: Gate) -> str:
    """Whether the held-out gate let the law pass, and by how much."""
    word = "passed" if gate.passed else "FAILED"
    inside = "" if gate.inside is None else f", {gate.inside:.0%} inside the prediction interval"
    return (
        f"held-out gate {word}: fitted to {gate.n_fitted} runs up to {gate.cutoff:.3g} FLOPs, with "
        f"{some(gate.n_held_out, 'larger run')} predicted within {gate.error:.2%} on average (bias "
        f"{gate.bias:+z.2%}{inside}); {gate.tolerance:.2%} is allowed"
    )


def cautions(law: ScalingLaw) -> list[str]:
    """What stands on every page beside the numbers: a failed gate, warnings, rows left out."""
    failed = [gate_verdict(law.gate)] if law.gate is not None and not law.gate.passed else []
    left_out = [] if law.observations.left_out is None else [law.observations.left_out]
    return [*failed, *map(sentence, (*law.fit.warnings, *left_out))]


def tables(law: ScalingLaw) -> dict[str, pd.DataFrame]:
    """The tables that there are, by title."""
    level = f"{law.fit.level:.0%}"
    optimum = f"Compute-optimal training, C = {law.observations.k:.3g}ND, {level} intervals"
    found = {
        f"Parameters, {level} intervals": law.parameters,
        optimum: None if law.optimum is None else optimum_as_read(law.optimum),
        "Exponent a of N_opt ∝ C^a by approach": exponents_table(law),
        "The same by counting convention": law.conventions,
        "The same without each budget, approach 3": without_table(law),
    }
    return {title: table for title, table in found.items() if table is not None and len(table)}


def optimum_as_read(optimum: pd.DataFrame) -> pd.DataFrame:
    """The table of `optimum_table` with each interval beside its number."""
    columns = {
        "parameters": ("N", counted),
        "tokens": ("D", counted),
        "tokens per parameter": ("tokens_per_parameter", partial(digits, n=3)),
        "nats per token": ("loss", partial(digits, n=4)),
    }
    table = []
    for row in optimum.to_dict("records"):
        line = {"FLOPs": f"{row['C']:.3g}"}
        for title, (name, form) in columns.items():
            line[title] = form(row[name])
            if f"{name}_low" in row:
                line[title] += f" ({form(row[f'{name}_low'])} to {form(row[f'{name}_high'])})"
        table.append(line)
    return pd.DataFrame(table)


def exponents_table(law: ScalingLaw) -> pd.DataFrame:
    """A row an approach, with its interval and what makes it doubtful."""
    table = []
    for exponent in law.exponents:
        low, high = exponent.interval or (np.nan, np.nan)
        row = {"approach": APPROACHES[exponent.approach], "a": exponent.a, "low": low, "high": high}
        table.append(row | {"warning": "; ".join(map(sentence, exponent.warnings))})
    return pd.DataFrame(table)


def without_table(law: ScalingLaw) -> pd.DataFrame | None:
    """The exponent without the runs of each budget, which is named by its FLOPs."""
    if law.without is None or not len(law.without):
        return None
    budgets = [f"{flops:.3g} FLOPs" for flops in law.without["C"]]
    return pd.DataFrame({"without the runs of": budgets, "a": law.without["a"]})
