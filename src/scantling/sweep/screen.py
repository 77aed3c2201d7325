"""What a sweep shows: a live table on a terminal, elsewhere a line for each thing that happens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from scantling.report.numbers import clock
from scantling.sweep.jobs import ENDED, FAILED, Job
from scantling.sweep.tuning import Search

COLOURS = {
    "running": "cyan",
    "done": "green",
    "finished before": "green",
    "done elsewhere": "green",
    "failed": "red",
    "failed elsewhere": "red",
}
SECONDS_BETWEEN = 0.5


class Screen:
    """`tell` on every change of a job's state, `draw` as often as you like."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self.jobs, self.console = jobs, console
        # Without a thread that draws: jobs are forked from this process.
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.drawn = 0.0
        self.began = time.monotonic()

    def __enter__(self) -> Screen:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.update(self.table(), refresh=True)
            self.live.stop()

    def tell(self, job: Job) -> None:
        """Say that a job's state changed: a line, or on a terminal the table at its next drawing."""
        if self.live is not None:
            self.drawn = 0.0
            if rows := job.directory.metrics():  # also those since the last look
                job.seen = rows[-1]
            return
        ended = sum(job.state in ENDED for job in self.jobs)
        about = f": {job.reason}" if job.reason else ""
        self.console.print(
            f"{ended}/{len(self.jobs)}  {job.label}  {job.state}{about}", markup=False, soft_wrap=True
        )

    def draw(self) -> None:
        """Redraw the table where there is one, at most once in `SECONDS_BETWEEN`."""
        now = time.monotonic()
        if self.live is not None and now - self.drawn >= SECONDS_BETWEEN:
            self.drawn = now
            self.live.update(self.table(), refresh=True)

    def table(self) -> RenderableType:
        """Failed and running jobs, then as many of the others as there is room for."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("job", "state", "step", "loss", "left"):
            table.add_column(
                column, justify="left" if column in ("job", "state") else "right", overflow="fold"
            )
        room = max(5, self.console.height - 4)
        order = {"failed": 0, "failed elsewhere": 0, "running": 1, "elsewhere": 2, "queued": 3}
        shown = sorted(self.jobs, key=lambda job: order.get(job.state, 4))[:room]
        for job in sorted(shown, key=lambda job: job.number):
            table.add_row(*self.row(job))
        return Group(table, f"[dim]{self.counts()}[/dim]")

    def row(self, job: Job) -> tuple[str, str, str, str, str]:
        """Label, state, step, loss, and the time left at the pace so far."""
        colour = COLOURS.get(job.state, "dim")
        state = f"[{colour}]{job.state}[/{colour}]" + (f" {escape(job.reason)}" if job.reason else "")
        seen = job.seen
        if not seen:
            return escape(job.label), state, "", "", ""
        steps = job.steps_of_run
        left = (steps - seen["step"]) * seen["seconds"] / seen["step"] if job.state == "running" else None
        return (
            escape(job.label),
            state,
            f"{seen['step']:,}/{steps:,}",
            f"{seen['train/loss']:.3f}",
            "" if left is None else clock(left),
        )

    def counts(self) -> str:
        """How many jobs are in each state, and the time since the start."""
        states = [job.state for job in self.jobs]
        counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"{len(self.jobs)} jobs: {counted}; {clock(time.monotonic() - self.began)}"


def outcome_table(jobs: Sequence[Job]) -> RenderableType:
    """The last table: what every run reached, and which failed and why."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("job", overflow="fold")
    table.add_column("state")
    table.add_column("bits/byte", justify="right")
    table.add_column("", overflow="fold")
    for job in jobs:
        colour = COLOURS.get(job.state, "dim")
        score = f"{job.directory.summary['val/bpb']:.4f}" if job.directory.is_finished else ""
        about = f"{job.reason}; log: {job.log}" if job.state in FAILED else str(job.directory.path)
        table.add_row(escape(job.label), f"[{colour}]{job.state}[/{colour}]", score, escape(about))
    return table


def rates_table(searches: Sequence[Search]) -> RenderableType:
    """What `tune=lr` found: each arm's learning rate, and the bits per byte of every one tried."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("arm", overflow="fold")
    table.add_column("lr", justify="right")
    table.add_column("tried: bits/byte", overflow="fold")
    for search in searches:
        tried = (f"{rate:g}: {score_word(search.tried[rate])}" for rate in sorted(search.tried))
        table.add_row(escape(search.label), "" if search.failed else f"{search.best:g}", ", ".join(tried))
    warnings = [
        f"[yellow]warning: {escape(search.label)}: the best rate tried, {search.best:g}, is the outermost: "
        "a better one may lie beyond (tune.factors, tune.extend)[/yellow]"
        for search in searches
        if not search.failed and search.edge
    ]
    return Group(table, *warnings)


def score_word(score: float | None) -> str:
    """Bits per byte, or what became of a run without them."""
    return "failed" if score is None else "diverged" if score == math.inf else f"{score:.4f}"
