"""Loss by length of context: the files that `evaluate.py lengths=[…] to=DIR` leaves."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from scantling.runs.table import UNITS

FILES = ("lengths.json", "lengths.csv", "lengths.png")


def arm_of(run: str) -> str:
    """A run's name without its seed."""
    return re.sub(r" ?seed=\d+", "", run) or run


def write_lengths(rows: list[dict[str, Any]], directory: Path, *, measure: str, title: str) -> None:
    """The rows as JSON and CSV, and the figure."""
    directory.mkdir(parents=True, exist_ok=True)
    json_file, csv_file, figure_file = (directory / name for name in FILES)
    json_file.write_text(json.dumps(rows, indent=1) + "\n")
    with csv_file.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw_lengths(rows, figure_file, measure=measure, title=title)


def draw_lengths(rows: list[dict[str, Any]], path: Path, *, measure: str, title: str) -> None:
    """`measure` against the length of context, a line a run: dashed side by side, solid where windows slide.

    Runs that differ by their seed alone share a colour. A ring marks the length that a run was trained at.
    """
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    slides = any(row["sliding"] for row in rows)
    colours: dict[str, str] = {}
    for run in dict.fromkeys(row["run"] for row in rows):
        arm = arm_of(run)
        is_first = arm not in colours
        colour = colours.setdefault(arm, f"C{len(colours)}")
        for sliding in (False, True) if slides else (False,):
            of_run = [row for row in rows if row["run"] == run and row["sliding"] == sliding]
            x, y = [row["length"] for row in of_run], [row[measure] for row in of_run]
            style = "-" if sliding or not slides else "--"
            label = arm if style == "-" and is_first else None
            axes.plot(
                x, y, color=colour, ls=style, lw=1.5 if style == "-" else 1, marker="o", ms=3, label=label
            )
            at = [(row["length"], row[measure]) for row in of_run if row["length"] == row["trained_at"]]
            axes.plot(*zip(*at, strict=True), "o", color=colour, mfc="none", ms=9) if at else None
    axes.set_xscale("log", base=2)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="context, tokens (ring: that of training)", ylabel=UNITS[measure], title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    styles = "solid: sliding,\ndashed: side by side" if slides else None
    axes.legend(frameon=False, title=styles, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
