"""`dry_run=true` under `-m`: every job with what it takes, and the whole."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from scantling.report.numbers import clock
from scantling.sweep.devices import Devices


def forecast_table(jobs: Sequence[tuple[str, dict[str, Any]]], devices: Devices) -> RenderableType:
    """A row for each (label, look) of a job, and their sums.

    FLOPs are by the `exact` convention; what is finished takes no more time.
    """
    looks = [look for _, look in jobs]
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("job", overflow="fold")
    for column in ("parameters", "steps", "tokens", "FLOPs", "time"):
        table.add_column(column, justify="right")
    for label, look in jobs:
        table.add_row(
            escape(label),
            f"{look['parameters']:,}",
            f"{look['steps']:,}",
            f"{look['tokens']:,}",
            f"{look['flops']:.3g}",
            "finished" if look["finished"] else clock(look["seconds"]),
        )
    left = [look for look in looks if not look["finished"]]
    table.add_section()
    table.add_row(
        f"{len(looks)} jobs, {len(left)} to run",
        "",
        f"{sum(look['steps'] for look in looks):,}",
        f"{sum(look['tokens'] for look in looks):,}",
        f"{sum(look['flops'] for look in looks):.3g}",
        clock(total_seconds(left, devices)),
        style="bold",
    )
    return Group(
        table,
        "[dim]time: of training steps, at the share of peak that finished runs of this study reached, "
        "else a tenth; start-up, validation, checkpoints and samples come on top[/dim]",
    )


def total_seconds(looks: Sequence[dict[str, Any]], devices: Devices) -> float:
    """Seconds until the last job ends, each begun in its turn as soon as another has ended."""
    if not looks:
        return 0.0
    ends = [0.0] * min(devices.at_once(look["devices"], look["on_gpu"]) for look in looks)
    for look in looks:
        heapq.heapreplace(ends, ends[0] + look["seconds"])
    return max(ends)
