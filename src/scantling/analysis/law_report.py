"""Everything that a table of runs says by a fitted law: parameters, what to distrust, the optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from scantling.analysis.allocation import (
    Gate,
    allocation_exponent,
    convention_table,
    held_out_gate,
    optimum_table,
)
from scantling.analysis.arms import rows
from scantling.analysis.budgets import BEYOND, grouped
from scantling.analysis.forms import HOFFMANN
from scantling.analysis.huber import Array
from scantling.analysis.isoflop import PowerLaw, fit_envelope, fit_isoflop
from scantling.analysis.observations import Observations, digits
from scantling.analysis.scaling import Fit, fit_hoffmann, profile_interval, refit_hoffmann

MOST_BUDGETS = 12
"""Groups of equal FLOPs; runs with more were not planned in budgets."""


@dataclass(frozen=True)
class LawReport:
    """A fit of Hoffmann's form to `observations`, and its tables, for whichever page shows them.

    `exponents`: a of N_opt ∝ C^a by each approach that the runs allow; `conventions`: the same under each count of N;
    `without`: the same by approach 3 without each budget. `isoflop`: approach 2 with parabolas, where budgets are planned.
    `target`: the FLOPs that the answer is of. Optima are under C = kND, with the k of the observations.
    """

    source: str
    observations: Observations
    fit: Fit
    target: float
    gate: Gate | None
    parameters: pd.DataFrame
    optimum: pd.DataFrame | None
    exponents: pd.DataFrame
    conventions: pd.DataFrame | None
    without: pd.DataFrame | None
    isoflop: PowerLaw | None

    @property
    def passed(self) -> bool:
        """Whether there was a gate and it let the law pass."""
        return self.gate is not None and self.gate.passed


def report_law(
    observations: Observations,
    *,
    source: str,
    resamples: int,
    level: float,
    seed: int,
    held_out: float,
    tolerance: float,
    budgets: Sequence[float] | None,
) -> LawReport:
    """The law and its tables; every refit has the bootstrap of `observations`, and its level.

    `held_out`: the share of runs, of the largest budgets, that the gate predicts; 0: no gate. `budgets`: FLOPs to give
    the optimum of; None: the largest of the runs, 10 and 100 times as much. Raises ValueError for what cannot be fitted."""
    runs = observations.runs
    n, d, c, loss = (runs[name].to_numpy() for name in ("N", "D", "C", "loss"))
    names = runs["run"].to_numpy()
    settings = {"resamples": resamples, "level": level, "seed": seed}
    fit = fit_law(observations, **settings)
    settings |= observations.bootstrap
    gate = None
    if held_out:
        try:
            gate = held_out_gate(n, d, loss, compute=c, share=held_out, tolerance=tolerance, **settings)
        except ValueError as error:
            raise ValueError(f"held-out gate: {error}; gate.held_out=0 does without the gate") from error
        fit = fit.with_verdict(gate.verdict)
    largest = float(c.max())
    target = max(budgets or [largest])
    budgets = budgets or [largest, 10 * largest, BEYOND * largest]
    has_optimum = fit.alpha > 0 and fit.beta > 0
    optimum = optimum_table(fit, budgets, k=observations.k) if has_optimum else None
    conventions = None
    if len(observations.counts) > 1:
        conventions = convention_table(observations.counts, d, loss, **settings)
    exponents = [approach_3(fit)] if has_optimum else []
    parabolas = None
    if settings["resampling"] == "noise":
        for minimum in ("parabola", "akima"):
            law = fit_isoflop(n, c, loss, minimum=minimum, resamples=resamples, level=level, seed=seed)
            exponents.append(approach(f"2, {minimum} of each budget", law))
            parabolas = parabolas or law
    if len(np.unique(names)) < len(names):
        bootstrap = {"resamples": min(resamples, 1000), "level": level, "seed": seed}
        law = fit_envelope(names, n, d, loss, k=observations.k, **bootstrap)
        exponents.append(approach("1, envelope of training curves", law))
    return LawReport(
        source=source,
        observations=observations,
        fit=fit,
        target=target,
        gate=gate,
        parameters=parameter_table(fit),
        optimum=optimum,
        exponents=pd.DataFrame(exponents),
        conventions=conventions,
        without=without_each_budget(n, d, c, loss) if has_optimum else None,
        isoflop=parabolas,
    )


def fit_law(observations: Observations, *, resamples: int, level: float, seed: int) -> Fit:
    """Approach 3, with what makes the table doubtful."""
    n, d, loss = (observations.runs[name].to_numpy() for name in ("N", "D", "loss"))
    settings = {"resamples": resamples, "level": level, "seed": seed, **observations.bootstrap}
    return fit_hoffmann(n, d, loss, **settings).with_warnings(*observations.warnings)


def without_each_budget(n: Array, d: Array, c: Array, loss: Array) -> pd.DataFrame | None:
    """The exponent without the runs of one budget, for each without which the others can be fitted; None where there are
    few budgets, or more than are planned."""
    budgets = grouped(np.log(c))
    if not 4 <= len(budgets) <= MOST_BUDGETS:
        return None
    table = []
    for budget in budgets:
        kept = np.setdiff1d(np.arange(len(n)), budget)
        if len(kept) <= len(HOFFMANN.parameters):
            continue
        a, _ = allocation_exponent(refit_hoffmann(n[kept], d[kept], loss[kept]))
        table.append({"without the runs of": f"{c[budget].mean():.3g} FLOPs", "a": a})
    return pd.DataFrame(table)


def approach_3(fit: Fit) -> dict[str, object]:
    a, interval = allocation_exponent(fit)
    low, high = interval or (np.nan, np.nan)
    return {"approach": "3, parametric", "a": a, "low": low, "high": high, "warning": ""}


def approach(name: str, law: PowerLaw) -> dict[str, object]:
    low, high = law.exponent_interval
    return {"approach": name, "a": law.exponent, "low": low, "high": high, "warning": "; ".join(law.warnings)}


def parameter_table(fit: Fit) -> pd.DataFrame:
    """Each parameter with its bootstrap interval and standard error, and for A and B the profile likelihood's interval."""
    table = []
    for name, (low, high) in fit.intervals.items():
        row = {"parameter": name, "value": fit.parameters[name], "low": low, "high": high}
        row["standard_error"] = fit.standard_errors[name]
        row["profile_low"], row["profile_high"] = (
            profile_interval(fit, name) if name in "AB" else (np.nan, np.nan)
        )
        table.append(row)
    return pd.DataFrame(table)


def cautions(report: LawReport) -> list[str]:
    """Verdict, warnings and rows left out: what stands on every page beside the numbers."""
    verdict = [] if report.fit.verdict is None else [report.fit.verdict]
    left_out = [] if report.observations.left_out is None else [report.observations.left_out]
    return [*verdict, *report.fit.warnings, *left_out]


def answer(report: LawReport) -> str:
    """In one sentence, how to divide the largest budget asked for, where none is the runs' largest, or why that cannot be
    said."""
    if report.optimum is None:
        fit = report.fit
        return f"These runs determine no optimum: alpha = {fit.alpha:.3g} and beta = {fit.beta:.3g} must both be positive."
    a, interval = allocation_exponent(report.fit)
    at = optimum_as_read(rows(report.optimum, C=report.target)).iloc[0]
    return (
        f"At {at['FLOPs']} FLOPs the least loss, {at['nats per token']} nats per token, takes {at['parameters']} parameters "
        f"and {at['tokens']} tokens; the best size grows as C^{a:.3g}"
        + (
            f" ({interval[0]:.3g} to {interval[1]:.3g}); {report.fit.level:.0%} intervals."
            if interval
            else "."
        )
    )


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


def counted(number: float) -> str:
    """80.5 k, 3.35 M."""
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{digits(number / unit, 3)}{name}" if number < 1000 * unit else f"{number:.3g}"
    return digits(number, 3)


def headline(report: LawReport) -> str:
    fit = report.fit
    return (
        f"{fit.form.formula}, {len(fit.loss)} rows of {report.source}: Huber of log loss at {fit.delta:g}, objective "
        f"{fit.objective:.6g}, found from {fit.found:.0%} of the starts"
    )


def tables(report: LawReport) -> dict[str, pd.DataFrame]:
    """By title, those that there are."""
    level = f"{report.fit.level:.0%}"
    found = {
        f"Parameters, {level} intervals": report.parameters,
        f"Compute-optimal training, C = {report.observations.k:.3g}ND, {level} intervals": None
        if report.optimum is None
        else optimum_as_read(report.optimum),
        "Exponent a of N_opt ∝ C^a by approach": report.exponents,
        "The same by counting convention": report.conventions,
        "The same without each budget, approach 3": report.without,
    }
    return {title: table for title, table in found.items() if table is not None and len(table)}
