"""Charts of a page about a law: valleys of equal FLOPs, frontier, residuals, held-out runs, exponents."""

from __future__ import annotations

import numpy as np

from scantling.analysis.allocation import (
    allocation_exponent,
    floor_is_near,
    optimal_parameters,
    optimum_table,
)
from scantling.analysis.budgets import drawn_budgets, repeated
from scantling.analysis.huber import Array
from scantling.analysis.isoflop import valleys
from scantling.analysis.law import ScalingLaw
from scantling.analysis.scaling import estimate
from scantling.report.curve_charts import thinned
from scantling.report.law_words import exponents_table, gate_verdict, without_table
from scantling.report.numbers import counted, some
from scantling.report.spec import Axis, Chart, Series

MOST_RUNS = 2000
"""Points of a chart; of more runs this many are drawn, evenly spaced."""

SIZES = (
    Axis("C", "training FLOPs", log=True),
    Axis("N", "parameters", log=True, si=True),
    Axis("D", "tokens", log=True, si=True),
)

LOSS = Axis("loss", "nats per token", log=True)


def law_charts(law: ScalingLaw) -> list[Chart]:
    """The charts that the runs allow."""
    return [
        chart
        for chart in (
            valleys_chart(law),
            sizes_chart(law),
            frontier_chart(law),
            optimum_chart(law),
            residuals_chart(law),
            held_out_chart(law),
            exponents_chart(law),
        )
        if chart is not None
    ]


def by_logarithm(values: Array) -> Array:
    """Positive values scaled by their logarithms from 0, the smallest, to 1."""
    logs = np.log(values)
    return (logs - logs.min()) / max(float(np.ptp(logs)), 1e-12)


def scale_of(n: Array) -> tuple[str, str, str]:
    """The scale of colours `by_logarithm` of parameters: what it shows, and its two ends."""
    return "parameters", counted(float(n.min())), counted(float(n.max()))


def valleys_chart(law: ScalingLaw) -> Chart | None:
    """Loss against size in each budget, with its parabola in log N; rings: where it is lowest."""
    if law.isoflop is None:
        return None
    runs = law.observations.runs
    n, c, loss = (runs[name].to_numpy() for name in ("N", "C", "loss"))
    found = []
    of_budgets = valleys(n, c, loss)
    for i, valley in enumerate(of_budgets):
        group, colour = f"{valley.compute:.3g} FLOPs", i / (len(of_budgets) - 1)
        names = [f"{group}, run {run}" for run in runs["run"].iloc[valley.rows]]
        size, least = valley.lowest
        found += [
            Series(
                group,
                {"N": n[valley.rows].tolist(), "loss": loss[valley.rows].tolist()},
                style="points",
                colour=colour,
                hover=names,
            ),
            Series(group, {"N": valley.sizes.tolist(), "loss": valley.losses.tolist()}, colour=colour),
            Series(
                group,
                {"N": [size], "loss": [least]},
                style="rings",
                colour=colour,
                hover=f"{group}: lowest",
            ),
        ]
    return Chart(
        "IsoFLOP valleys",
        tuple(found),
        (Axis("N", "parameters", log=True, si=True),),
        (LOSS,),
        note="Each budget's runs, a parabola in log N through them, and a ring where it is lowest.",
    )


def sizes_chart(law: ScalingLaw) -> Chart | None:
    """Loss against tokens at each size: its runs, and the law. Where sizes have runs of several lengths."""
    runs, fit = law.observations.runs, law.fit
    n, d, loss = (runs[name].to_numpy() for name in ("N", "D", "loss"))
    of_sizes = repeated(n)
    if not of_sizes:
        return None
    found = []
    tokens = np.geomspace(d.min(), d.max(), 40)
    for rows in of_sizes:
        size = float(n[rows].mean())
        group, colour = f"{counted(size)} parameters", float(by_logarithm(n)[rows].mean())
        found += [
            Series(
                group,
                {"D": d[rows].tolist(), "loss": loss[rows].tolist()},
                style="points",
                colour=colour,
                hover=[f"{group}, run {run}" for run in runs["run"].iloc[rows]],
            ),
            Series(
                group,
                {"D": tokens.tolist(), "loss": fit.predict(N=np.full(len(tokens), size), D=tokens).tolist()},
                colour=colour,
            ),
        ]
    return Chart(
        "Loss by size and tokens",
        tuple(found),
        (Axis("D", "tokens", log=True, si=True),),
        (LOSS,),
        note=f"Lines: {fit.form.formula}, at the size of each colour.",
    )


def frontier_chart(law: ScalingLaw) -> Chart:
    """Loss against compute: the runs, and compute-optimal training with its band, beyond the largest run."""
    runs, fit = law.observations.runs, law.fit
    kept = thinned(np.arange(len(runs)), MOST_RUNS)
    c, n, d, loss = (runs[name].to_numpy()[kept] for name in ("C", "N", "D", "loss"))
    found = [
        Series(
            "runs",
            {"C": c.tolist(), "N": n.tolist(), "D": d.tolist(), "loss": loss.tolist()},
            style="points",
            colour=by_logarithm(n).tolist(),
            hover=[
                f"run {run}: {size:.3g} parameters, {tokens:.3g} tokens"
                for run, size, tokens in zip(runs["run"].iloc[kept], n, d, strict=True)
            ],
        )
    ]
    if fit.alpha > 0 and fit.beta > 0:
        budgets = drawn_budgets(runs["C"].to_numpy(), 60)
        optimum = optimum_table(fit, budgets.tolist(), k=law.observations.k)
        name = f"compute-optimal, with {fit.level:.0%} of its bootstrap"
        found.append(
            Series(
                name,
                {key: optimum[key].tolist() for key in ("C", "N", "D", "loss")},
                {"loss": optimum["loss_low"].tolist()},
                {"loss": optimum["loss_high"].tolist()},
                colour=0,
            )
        )
        if floor_is_near(fit, optimum):
            ends = [float(budgets[0]), float(budgets[-1])]
            found.append(Series(f"E = {fit.E:.4g}", {"C": ends, "loss": [fit.E] * 2}, style="dashed"))
    return Chart(
        "Frontier",
        tuple(found),
        SIZES,
        (LOSS,),
        note=f"{fit.form.formula}. Points: runs.",
        scale=scale_of(n),
    )


def optimum_chart(law: ScalingLaw) -> Chart | None:
    """The best size against compute, by the law and by each budget's parabola, beside all sizes run."""
    runs, fit = law.observations.runs, law.fit
    if fit.alpha <= 0 or fit.beta <= 0:
        return None
    kept = thinned(np.arange(len(runs)), MOST_RUNS)
    budgets, k = drawn_budgets(runs["C"].to_numpy(), 40), law.observations.k
    sizes, low, high = [], [], []
    for budget in budgets:
        with np.errstate(invalid="ignore"):
            value, interval = estimate(fit, lambda of, c=budget: optimal_parameters(of, c, k))
        sizes.append(value)
        low.append(interval[0] if interval else value)
        high.append(interval[1] if interval else value)
    name = f"approach 3, with its {fit.level:.0%} band"
    c, n = (runs[key].to_numpy()[kept] for key in ("C", "N"))
    found = [
        Series("runs", {"C": c.tolist(), "N": n.tolist()}, style="points", hover="run"),
        Series(name, {"C": budgets.tolist(), "N": sizes}, {"N": low}, {"N": high}, colour=0),
    ]
    if law.isoflop is not None:
        parabolas = law.isoflop
        line = parabolas.coefficient * budgets**parabolas.exponent
        name = f"approach 2, parabolas, a = {parabolas.exponent:.3f}"
        found += [
            Series(
                name,
                {"C": parabolas.budgets.tolist(), "N": parabolas.optima.tolist()},
                style="rings",
                colour=1,
                hover="lowest of a parabola",
            ),
            Series(name, {"C": budgets.tolist(), "N": line.tolist()}, style="dashed", colour=1),
        ]
    return Chart(
        "Compute-optimal size",
        tuple(found),
        (Axis("C", "training FLOPs", log=True),),
        (Axis("N", "parameters", log=True, si=True),),
    )


def residuals_chart(law: ScalingLaw) -> Chart:
    """What the fit leaves, against compute, parameters and tokens."""
    runs, fit = law.observations.runs, law.fit
    kept = thinned(np.arange(len(runs)), MOST_RUNS)
    n = runs["N"].to_numpy()[kept]
    residual = 100 * (np.exp(fit.residuals[kept]) - 1)
    values = {key: runs[key].iloc[kept].tolist() for key in ("C", "N", "D")} | {"residual": residual.tolist()}
    hover = [f"run {run}" for run in runs["run"].iloc[kept]]
    return Chart(
        "Residuals",
        (Series("runs", values, style="points", colour=by_logarithm(n).tolist(), hover=hover),),
        SIZES,
        (Axis("residual", "observed over predicted, %", log=None),),
        note="A trend along an axis is what the form does not describe.",
        legend=False,
        scale=scale_of(n),
        height=340,
    )


def held_out_chart(law: ScalingLaw) -> Chart | None:
    """What the gate predicted of the largest budgets against what they came to."""
    if law.gate is None:
        return None
    gate, held_out, verdict = law.gate, law.gate.held_out, gate_verdict(law.gate)
    bars = ({}, {})
    if "low" in held_out:
        bars = {"predicted": held_out["low"].tolist()}, {"predicted": held_out["high"].tolist()}
    observed = held_out["loss"].tolist()
    ends = [min(observed), max(observed)]
    return Chart(
        f"Held out: {some(gate.n_held_out, 'run')} above {gate.cutoff:.3g} FLOPs, predicted from "
        f"{gate.n_fitted}",
        (
            Series("as observed", {"loss": ends, "predicted": ends}, style="dashed"),
            Series(
                "runs held out",
                {
                    "C": held_out["C"].tolist(),
                    "loss": held_out["loss"].tolist(),
                    "predicted": held_out["predicted"].tolist(),
                },
                *bars,
                style="points",
                colour=0,
                hover=[
                    f"{row['N']:.3g} parameters, {row['D']:.3g} tokens: observed {row['loss']:.4f}"
                    for row in held_out.to_dict("records")
                ],
            ),
        ),
        (Axis("loss", "observed, nats per token"),),
        (Axis("predicted", "predicted, nats per token"),),
        note=verdict[0].upper() + verdict[1:] + ". Bars: prediction intervals.",
    )


def exponents_chart(law: ScalingLaw) -> Chart | None:
    """The exponent a of N_opt ∝ C^a: by approach, by what counts as a parameter, without each budget."""
    tables = {
        "by approach": (exponents_table(law), "approach", "low", "high", "approach "),
        "by count of parameters": (law.conventions, "convention", "a_low", "a_high", "N = "),
        "without a budget": (without_table(law), "without the runs of", "", "", "without "),
    }
    found = []
    for i, (group, (table, name, low, high, prefix)) in enumerate(tables.items()):
        if table is None or not len(table):
            continue
        bars = ({}, {})
        if low in table:
            bars = {"a": table[low].tolist()}, {"a": table[high].tolist()}
        names = [f"{prefix}{text}" for text in table[name]]
        values = {"name": names, "a": table["a"].tolist()}
        found.append(Series(group, values, *bars, style="points", colour=i, hover=names))
    if not found:
        return None
    points = sum(len(series.values["a"]) for series in found)
    a, _ = allocation_exponent(law.fit)
    return Chart(
        "How the exponent depends on the way of finding it",
        tuple(found),
        (Axis("a", "a of N_opt ∝ C^a", log=None),),
        (Axis("name", "", words=True),),
        note=f"Approach 3 says {a:.3f}. Hoffmann et al. 2022: 0.46 to 0.50 by approach; Kaplan et al. "
        "2020: 0.73.",
        height=120 + 32 * points,
    )
