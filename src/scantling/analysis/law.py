"""A fitted law of a table of runs: parameters, optimum, exponents by every approach, reasons for doubt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from scantling.analysis.allocation import (
    Gate,
    allocation_exponent,
    convention_table,
    held_out_gate,
    optimum_table,
)
from scantling.analysis.budgets import BEYOND, grouped
from scantling.analysis.findings import Finding
from scantling.analysis.forms import HOFFMANN
from scantling.analysis.huber import Array
from scantling.analysis.isoflop import PowerLaw, fit_envelope, fit_isoflop
from scantling.analysis.observations import Observations
from scantling.analysis.scaling import Fit, Interval, fit_hoffmann, profile_interval, refit_hoffmann

PLANNED_BUDGETS = range(4, 13)
"""Groups of equal FLOPs of which one may be left out; runs with more were not planned in budgets."""

ENVELOPE_RESAMPLES = 1000
"""Resamples of approach 1, at most."""


@dataclass(frozen=True)
class Exponent:
    """a of N_opt ∝ C^a by one of the approaches of Hoffmann et al. 2022, with what makes it doubtful."""

    approach: Literal["parametric", "parabola", "akima", "envelope"]
    a: float
    interval: Interval | None
    warnings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class ScalingLaw:
    """A fit of Hoffmann's form to `observations`, named `source`, and what follows from it.

    `exponents`: by each approach that the runs allow; `conventions`: the exponent under each count of
    N; `without`: by approach 3 without the runs of each budget. `isoflop`: approach 2 with parabolas,
    where budgets are planned. `target`: the FLOPs that the answer is of. Optima are under C = kND, with
    the k of the observations.
    """

    source: str
    observations: Observations
    fit: Fit
    target: float
    gate: Gate | None
    parameters: pd.DataFrame
    optimum: pd.DataFrame | None
    exponents: tuple[Exponent, ...]
    conventions: pd.DataFrame | None
    without: pd.DataFrame | None
    isoflop: PowerLaw | None

    @property
    def passed(self) -> bool:
        """Whether there was a gate and it let the law pass."""
        return self.gate is not None and self.gate.passed


def find_law(
    observations: Observations,
    *,
    source: str,
    resamples: int,
    level: float,
    seed: int,
    held_out: float,
    tolerance: float,
    budgets: Sequence[float] | None,
) -> ScalingLaw:
    """The law and its tables; every refit has the bootstrap of `observations`, and its level.

    `held_out`: the share of runs, of the largest budgets, that the gate predicts; 0: no gate. `budgets`:
    FLOPs to give the optimum of; None: the largest of the runs, 10 and 100 times as much. Raises ValueError
    for what cannot be fitted.
    """
    runs = observations.runs
    n, d, c, loss = (runs[name].to_numpy() for name in ("N", "D", "C", "loss"))
    bootstrap = {"resamples": resamples, "level": level, "seed": seed}
    settings = bootstrap | observations.bootstrap
    fit = fit_law(observations, **bootstrap)
    gate = None
    if held_out:
        try:
            gate = held_out_gate(n, d, loss, compute=c, share=held_out, tolerance=tolerance, **settings)
        except ValueError as error:
            raise ValueError(f"held-out gate: {error}; gate.held_out=0 does without the gate") from error
    largest = float(c.max())
    has_optimum = fit.alpha > 0 and fit.beta > 0
    asked = budgets or [largest, 10 * largest, BEYOND * largest]
    parabolas = isoflop_laws(observations, bootstrap)
    exponents = [Exponent("parametric", *allocation_exponent(fit))] if has_optimum else []
    exponents += [exponent_of(minimum, law) for minimum, law in parabolas.items()]
    if len(np.unique(runs["run"])) < len(runs):
        capped = bootstrap | {"resamples": min(resamples, ENVELOPE_RESAMPLES)}
        envelope = fit_envelope(runs["run"].to_numpy(), n, d, loss, k=observations.k, **capped)
        exponents.append(exponent_of("envelope", envelope))
    several = len(observations.counts) > 1
    return ScalingLaw(
        source=source,
        observations=observations,
        fit=fit,
        target=max(budgets or [largest]),
        gate=gate,
        parameters=parameter_table(fit),
        optimum=optimum_table(fit, asked, k=observations.k) if has_optimum else None,
        exponents=tuple(exponents),
        conventions=convention_table(observations.counts, d, loss, **settings) if several else None,
        without=without_each_budget(n, d, c, loss) if has_optimum else None,
        isoflop=parabolas.get("parabola"),
    )


def fit_law(observations: Observations, *, resamples: int, level: float, seed: int) -> Fit:
    """Approach 3, with what makes the table doubtful."""
    n, d, loss = (observations.runs[name].to_numpy() for name in ("N", "D", "loss"))
    settings = {"resamples": resamples, "level": level, "seed": seed, **observations.bootstrap}
    return fit_hoffmann(n, d, loss, **settings).with_warnings(*observations.warnings)


def isoflop_laws(
    observations: Observations, bootstrap: dict[str, Any]
) -> dict[Literal["parabola", "akima"], PowerLaw]:
    """Approach 2 by each kind of minimum, where the runs are a planned grid of budgets."""
    if observations.bootstrap["resampling"] != "noise":
        return {}
    n, c, loss = (observations.runs[name].to_numpy() for name in ("N", "C", "loss"))
    minima: tuple[Literal["parabola", "akima"], ...] = ("parabola", "akima")
    return {minimum: fit_isoflop(n, c, loss, minimum=minimum, **bootstrap) for minimum in minima}


def exponent_of(approach: Literal["parabola", "akima", "envelope"], law: PowerLaw) -> Exponent:
    """The exponent by approach 1 or 2."""
    return Exponent(approach, law.exponent, law.exponent_interval, law.warnings)


def without_each_budget(n: Array, d: Array, c: Array, loss: Array) -> pd.DataFrame | None:
    """The exponent without the runs of one budget, whose mean FLOPs stand in column C.

    A row for each budget without which the others can be fitted; None where there are few
    budgets, or more than are planned.
    """
    budgets = grouped(np.log(c))
    if len(budgets) not in PLANNED_BUDGETS:
        return None
    table = []
    for budget in budgets:
        kept = np.setdiff1d(np.arange(len(n)), budget)
        if len(kept) <= len(HOFFMANN.parameters):
            continue
        a, _ = allocation_exponent(refit_hoffmann(n[kept], d[kept], loss[kept]))
        table.append({"C": float(c[budget].mean()), "a": a})
    return pd.DataFrame(table)


def parameter_table(fit: Fit) -> pd.DataFrame:
    """Each parameter with its bootstrap interval and standard error.

    A and B also have the interval of the profile likelihood.
    """
    table = []
    for name, (low, high) in fit.intervals.items():
        row = {"parameter": name, "value": fit.parameters[name], "low": low, "high": high}
        row["standard_error"] = fit.standard_errors[name]
        row["profile_low"], row["profile_high"] = (
            profile_interval(fit, name) if name in "AB" else (np.nan, np.nan)
        )
        table.append(row)
    return pd.DataFrame(table)
