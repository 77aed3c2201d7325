"""Figures, by matplotlib, ready for print."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from scantling.analysis.allocation import floor_is_near, hoffmann_loss, optimum_table
from scantling.analysis.arms import MOST_ARMS, rows_where
from scantling.analysis.budgets import drawn_budgets, repeated
from scantling.analysis.huber import Array
from scantling.analysis.isoflop import valleys
from scantling.analysis.scaling import Fit
from scantling.runs.table import UNITS

TRAIN, VALIDATION = "#9aa5b1", "#c2410c"

LEGEND = 20
"""Arms up to which a legend names each."""


def draw_curves(metrics: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss and validation bits per byte against tokens; `metrics`: the rows of a `metrics.jsonl`."""
    validated = [row for row in metrics if "val/bpb" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    per_byte = validated[-1]["val/bpb"] / validated[-1]["val/loss"]
    millions = [row["tokens"] / 1e6 for row in metrics]
    axes.plot(
        millions,
        [row["train/loss"] * per_byte for row in metrics],
        color=TRAIN,
        lw=1,
        label="train, each logged step",
    )
    axes.plot(
        [row["tokens"] / 1e6 for row in validated],
        [row["val/bpb"] for row in validated],
        color=VALIDATION,
        marker="o",
        ms=4,
        label="validation",
    )
    last = validated[-1]
    axes.annotate(
        f"{last['val/bpb']:.3f}",
        (last["tokens"] / 1e6, last["val/bpb"]),
        textcoords="offset points",
        xytext=(4, 8),
        ha="right",
        color=VALIDATION,
        weight="bold",
    )
    axes.set(xlabel="training tokens, millions", ylabel="bits per byte", title=title)
    axes.set_ylim(top=min(max(row["val/bpb"] for row in validated) * 1.25, axes.get_ylim()[1]))
    open_frame(axes)
    axes.legend(loc="upper right", frameon=False)  # where curves that fall leave room
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_law(
    fit: Fit,
    compute: Array,
    path: Path,
    *,
    k: float,
    title: str,
    cutoff: float | None,
    caution: str | None,
) -> None:
    """A fitted law in two panels.

    Left: loss against compute, the runs and the law of compute-optimal training under C = kND with its
    band, far beyond the largest. Right: observed over predicted loss. Runs above `cutoff`, which the
    held-out gate predicted, are ringed.
    """
    figure, (law, left) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    if fit.alpha > 0 and fit.beta > 0:
        draw_frontier(law, fit, drawn_budgets(compute, 60), k)
    norm = LogNorm(fit.sizes["N"].min(), fit.sizes["N"].max())
    points = law.scatter(compute, fit.loss, c=fit.sizes["N"], norm=norm, s=14, cmap="viridis", zorder=3)
    figure.colorbar(points, ax=law, label="parameters", pad=0.01)
    residual = 100 * (np.exp(fit.residuals) - 1)
    left.axhline(0, color="0.6", lw=1)
    left.scatter(compute, residual, c=fit.sizes["N"], norm=norm, s=14, cmap="viridis", zorder=3)
    if cutoff is not None:
        beyond = compute > cutoff
        for axes, y in ((law, fit.loss), (left, residual)):
            axes.scatter(
                compute[beyond],
                y[beyond],
                s=44,
                facecolors="none",
                edgecolors="0.3",
                lw=0.8,
                label="held out by the gate",
            )
    law.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="loss, nats per token")
    law.set_title(title, fontsize=9)
    left.set(xscale="log", xlabel="training FLOPs", ylabel="observed over predicted loss, %")
    left.set_title(f"residuals of the fit to all {len(fit.loss)} rows", fontsize=9)
    law.yaxis.set_major_formatter(ScalarFormatter())
    law.yaxis.set_minor_formatter(ScalarFormatter())
    for axes in (law, left):
        label_apart(axes, flops)
        open_frame(axes)
    law.legend(frameon=False, fontsize=8)
    if caution is not None:
        figure.suptitle(caution, color="#b91c1c", fontsize=8)
    save(figure, path)


def draw_frontier(axes: Axes, fit: Fit, budgets: Array, k: float) -> None:
    """The loss of compute-optimal training with its band, and E where that is near."""
    optimum = optimum_table(fit, budgets.tolist(), k=k)
    axes.plot(budgets, optimum["loss"], color=VALIDATION, lw=1.5, label="compute-optimal by the fit")
    axes.fill_between(
        budgets,
        optimum["loss_low"],
        optimum["loss_high"],
        color=VALIDATION,
        alpha=0.2,
        lw=0,
        label=f"{fit.level:.0%} of its bootstrap",
    )
    if floor_is_near(fit, optimum):
        axes.axhline(fit.E, color=TRAIN, ls=":", lw=1)
        # At the end where no band is near.
        axes.annotate(f"E = {fit.E:.4g}", (budgets[0], fit.E), va="bottom", color="0.4")


def draw_grid(fit: Fit, compute: Array, path: Path, *, title: str) -> None:
    """The runs of a grid of budgets in two panels.

    Left: loss against size, a colour a budget, with the parabola of approach 2 and a ring where it is lowest.
    Right, where sizes repeat: loss against tokens, a colour a size, with the fitted law.
    """
    n, d = fit.sizes["N"], fit.sizes["D"]
    of_sizes = repeated(n)
    panels = 2 if of_sizes else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.5 * panels, 4.5), layout="constrained", sharey=True, squeeze=False
    )
    left, right = axes[0, 0], axes[0, -1]
    found = valleys(n, compute, fit.loss)
    for valley, shade in zip(found, shades(len(found)), strict=True):
        left.plot(valley.sizes, valley.losses, color=shade, lw=1, alpha=0.6)
        label = f"{valley.compute:.2g} FLOPs"
        left.plot(n[valley.rows], fit.loss[valley.rows], "o", ms=4, color=shade, label=label)
        left.plot(*valley.lowest, "o", ms=9, mfc="none", color=VALIDATION)
    for runs, shade in zip(of_sizes, shades(len(of_sizes)), strict=True):
        tokens = np.geomspace(d[runs].min() / 1.5, d[runs].max() * 1.5, 40)
        law = fit.predict(N=np.full(len(tokens), n[runs].mean()), D=tokens)
        right.plot(tokens, law, color=shade, lw=1, alpha=0.6)
        label = f"{EngFormatter(places=1)(n[runs].mean())} parameters"
        right.plot(d[runs], fit.loss[runs], "o", ms=4, color=shade, label=label)
    right.set(xlabel="tokens")
    right.set_title(f"lines: {fit.form.formula}", fontsize=9)
    left.set(xlabel="parameters", ylabel="loss, nats per token")
    left.set_title(title, fontsize=9)
    for panel in axes.flat:
        panel.set_xscale("log")
        label_apart(panel, EngFormatter())
        open_frame(panel)
        panel.legend(frameon=False, fontsize=8)
    save(figure, path)


def shades(n: int) -> Array:
    """Colours from dark to light."""
    return plt.get_cmap("viridis")(np.linspace(0, 0.85, n))


def label_apart(axes: Axes, written: Callable[[float, float], str] | EngFormatter) -> None:
    """Label a logarithmic x axis so sparsely that no two labels overlap.

    These are 1, 2 and 5 of each decade; powers of ten for many decades; round numbers within one decade.
    """
    low, high = axes.get_xlim()
    decades = np.log10(high / low)
    few = MaxNLocator(4) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
    axes.xaxis.set_major_locator(few)
    axes.xaxis.set_major_formatter(written)
    axes.xaxis.set_minor_formatter(NullFormatter())


def flops(number: float, _: float) -> str:
    """FLOPs as a label of an axis: 2e18."""
    return f"{number:.3g}".replace("e+", "e")


def open_frame(axes: Axes) -> None:
    """Leave two sides of the frame, and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG, and as SVG beside it."""
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)


def draw_design(cells: list[dict[str, Any]], law: dict[str, float], path: Path, *, title: str) -> None:
    """A planned IsoFLOP study in two panels.

    Left: the loss that `law` forecasts for each run against its size, a curve a budget, its optimum ringed.
    Right: parameters against compute, and the optima. `cells`: the runs, with parameters, budget and tokens.
    """
    figure, (curves, plane) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    budgets = sorted({cell["budget"] for cell in cells})
    optima = []
    for budget, shade in zip(budgets, shades(len(budgets)), strict=True):
        here = [cell for cell in cells if cell["budget"] == budget]
        n, d = (np.array([cell[name] for cell in here], dtype=float) for name in ("parameters", "tokens"))
        fine = np.geomspace(n.min(), n.max(), 200)
        loss = hoffmann_loss(law, fine, np.exp(np.interp(np.log(fine), np.log(n), np.log(d))))
        best = loss.argmin()
        optima.append(fine[best])
        curves.plot(fine, loss, color=shade, lw=1, alpha=0.6)
        curves.plot(n, hoffmann_loss(law, n, d), "o", ms=4, color=shade, label=f"{budget:.2g} FLOPs")
        curves.plot(fine[best], loss[best], "o", ms=9, mfc="none", color=VALIDATION)
        plane.plot(np.full(len(n), budget), n, "o", ms=4, color=shade)
    plane.plot(
        budgets, optima, "o-", ms=9, mfc="none", color=VALIDATION, lw=1.5, label="optimum by the forecast"
    )
    curves.set(xscale="log", xlabel="parameters", ylabel="forecast loss, nats per token", title=title)
    plane.set(xscale="log", yscale="log", xlabel="training FLOPs of a run", ylabel="parameters")
    label_apart(curves, EngFormatter())
    label_apart(plane, flops)
    for axes in (curves, plane):
        open_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_arms(
    curves: pd.DataFrame,
    runs: pd.DataFrame,
    arms: pd.DataFrame,
    path: Path,
    *,
    metric: str,
    baseline: str,
    colours: Mapping[str, str],
) -> None:
    """Arms compared, in two panels.

    Left: validation of each arm at the largest scale, its mean over seeds with a band of ± two standard
    errors. Right: every arm's difference from the baseline with its paired t interval. `arms`: sorted by
    difference, the baseline first.
    """
    table = arms.to_dict("records")
    largest = table[-1]["scale"]
    here = [row for row in table if row["scale"] == largest][: MOST_ARMS + 1]
    shown = [row["arm"] for row in here]
    table = [row for row in table if row["arm"] in shown]
    compared = [row for row in table if row["arm"] != baseline][::-1]
    height = max(4.0, 0.3 * len(compared) + 1.5)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, height), layout="constrained", width_ratios=(3, 2)
    )
    validated = curves.dropna(subset=[f"val/{metric}"])
    bottom, top = [], []
    for arm in shown:
        colour = colours[arm]
        names = rows_where(runs, arm=arm, scale=largest)["run"]
        by_step = validated.iloc[np.flatnonzero(validated["run"].isin(names))].groupby("step")
        mean, tokens = by_step[f"val/{metric}"].mean(), by_step["tokens"].mean() / 1e6
        error = by_step[f"val/{metric}"].sem().fillna(0)
        low, high = mean - 2 * error, mean + 2 * error
        left.plot(tokens, mean, color=colour, lw=1.5, label=arm)
        left.fill_between(tokens, low, high, color=colour, alpha=0.2, lw=0)
        bottom.append(low.min())
        top.append(high.iloc[-1])
    unit = UNITS[metric]
    left.set(xlabel="training tokens, millions", ylabel=f"validation, {unit}", title=largest)
    ends = [row["loss"] for row in here]
    # Not up to where training began.
    left.set_ylim(0.98 * min(bottom), max(1.15 * max(ends), 1.02 * max(top)))
    several = len({row["scale"] for row in table}) > 1
    for i, row in enumerate(compared):
        colour = colours[row["arm"]]
        right.plot([row["low"], row["high"]], [i, i], color=colour, lw=2)
        right.plot(row["difference"], i, "o", color=colour, ms=5)
    right.axvline(0, color="0.6", lw=1)
    labels = [f"{row['arm']} {row['scale']}" if several else row["arm"] for row in compared]
    right.set_yticks(range(len(compared)), labels, fontsize=8)
    right.set_ylim(-0.6, len(compared) - 0.4)
    right.set(xlabel=f"difference from {baseline},\n{unit}; left is better")
    for axes in (left, right):
        open_frame(axes)
    if len(shown) <= LEGEND:
        left.legend(frameon=False, fontsize=8)
    save(figure, path)


def draw_gains(gains: pd.DataFrame, path: Path, *, baseline: str, colours: Mapping[str, str]) -> None:
    """Compute-equivalent gain of every arm against compute, with its interval, which may end beyond the axis.

    `gains`: a row for each arm and scale with FLOPs, gain, low, high and beyond, compute over that of the
    baseline's largest run; rows whose gain is not known are left out.
    """
    known = gains.iloc[np.flatnonzero(np.isfinite(gains["gain"]))]
    arms = list(dict.fromkeys(known["arm"]))[:MOST_ARMS]
    known = known.iloc[np.flatnonzero(known["arm"].isin(arms))]
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    inside = known[["gain", "low", "high"]].to_numpy(dtype=float)
    inside = inside[np.isfinite(inside) & (inside > 0)]
    for i, arm in enumerate(arms):
        here = rows_where(known, arm=arm).sort_values("FLOPs")
        beside = 1.06 ** (i - (len(arms) - 1) / 2)  # so that intervals do not hide each other
        at, gain = here["FLOPs"] * beside, here["gain"]
        axes.plot(at, gain, "o-", color=colours[arm], ms=5, lw=1.2, label=arm)
        hollow = here["beyond"] > 1
        axes.plot(at[hollow], gain[hollow], "o", color=colours[arm], mfc="white", ms=5, zorder=3)
        axes.vlines(at, here["low"], here["high"].clip(upper=10 * inside.max()), color=colours[arm], lw=2)
    axes.axhline(1, color="0.6", lw=1)
    legend = (
        f"; hollow: needs more than {baseline}'s largest run, by its law"
        if (known["beyond"] > 1).any()
        else ""
    )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(0.9 * inside.min(), 1.1 * inside.max()),
        xlabel=f"training FLOPs{legend}",
        ylabel=f"compute that {baseline} would need, ×",
        title="compute-equivalent gain; above 1 is better",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    label_apart(axes, flops)
    open_frame(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    save(figure, path)
