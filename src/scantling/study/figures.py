"""Figures, by matplotlib, ready for print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN, VALIDATION = "#9aa5b1", "#c2410c"


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training loss and validation bits per byte against tokens, from the rows of a `metrics.jsonl`."""
    validated = [row for row in rows if "val/bpb" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    per_byte = validated[-1]["val/bpb"] / validated[-1]["val/loss"]
    millions = [row["tokens"] / 1e6 for row in rows]
    axes.plot(
        millions,
        [row["train/loss"] * per_byte for row in rows],
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
