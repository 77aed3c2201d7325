"""A report on Weights & Biases: the same blocks, with panels over the study's runs in place of the charts of curves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from scantling.report.spec import Block, Chart, Code, Report, Samples, Table, Text, in_markdown

PATIENCE = 20
"""Seconds for one answer of the server."""

SYNCED = ".synced"
"""What `wandb sync` adds to the name of a file that it has sent."""


def sync(directory: Path) -> int:
    """Send the offline runs in `directory`, W&B's folder in a study, that were not sent yet; how many there were.

    Raises ValueError where `wandb sync` fails.
    """
    waiting = [
        run
        for run in sorted(directory.glob("offline-run-*"))
        if list(run.glob("*.wandb")) and not list(run.glob(f"*.wandb{SYNCED}"))
    ]
    if waiting:
        command = [sys.executable, "-m", "wandb", "sync", *map(str, waiting)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            words = (ended.stderr or ended.stdout).strip().splitlines()
            raise ValueError(
                f"wandb sync sent not all of {len(waiting)} runs: {words[-1] if words else 'no word'}"
            )
    return len(waiting)


def publish(report: Report, *, entity: str | None, project: str, group: str, draft: bool) -> str:
    """Save the report in the project; its address. `entity`: None, the account's own. `group`: of the runs that its panels
    show, W&B's name for a study.

    Raises ValueError where the server does not take it.
    """
    import wandb

    try:
        owner = entity or wandb.Api(timeout=PATIENCE).default_entity or ""
        made = as_wandb(report, entity=owner, project=project, group=group)
        made.save(draft=draft)
    except Exception as error:  # of its service, too, whose errors are of no family
        raise ValueError(f"W&B does not take the report: {' '.join(str(error).split())}") from error
    return made.url


def as_wandb(report: Report, *, entity: str, project: str, group: str) -> Any:
    """`wandb_workspaces`' own object, not saved."""
    import wandb_workspaces.reports.v2.interface as wr

    blocks: list[Any] = [wr.P(text=report.question)] if report.question else []
    blocks.append(wr.BlockQuote(text=report.answer))
    if report.cautions:
        blocks.append(wr.UnorderedList(items=list(report.cautions)))
    for section in report.sections:
        shown = [part for block in section.blocks for part in block_of(block, entity, project, group)]
        blocks += [wr.H2(text=section.title), *shown] if shown else []
    return wr.Report(
        entity=entity,
        project=project,
        title=report.title,
        description=report.answer,
        width="fluid",
        blocks=blocks,
    )


def block_of(block: Block, entity: str, project: str, group: str) -> list[Any]:
    """Charts of numbers that W&B has not, and figures, which it takes by their address only, are left to the page; their
    tables stand."""
    import wandb_workspaces.reports.v2.interface as wr

    if isinstance(block, Text):
        return [wr.P(text=block.text)]
    if isinstance(block, Code):
        return [wr.CodeBlock(code=block.text, language="markdown")]
    if isinstance(block, Table):
        return [wr.MarkdownBlock(text="\n".join(lines))] if (lines := in_markdown(block)) else []
    if isinstance(block, Samples):
        return [
            part
            for title, text in block.texts
            for part in (wr.H3(text=title), wr.CodeBlock(code=text, language="markdown"))
        ]
    if isinstance(block, Chart) and block.recorded:
        runs = wr.Runset(
            entity=entity,
            project=project,
            name=group,
            filters=f"Metric('Group') = '{group}'",
            groupby=["Tags"],
        )
        panels: list[Any] = [
            wr.LinePlot(
                title=f"{y.title} against {x.title}",
                x=x.key,
                y=[y.key],
                log_x=bool(x.log),
                log_y=bool(y.log),
                groupby_rangefunc="stderr",
            )
            for y in block.y
            for x in block.x
        ]
        return [wr.PanelGrid(runsets=[runs], panels=panels)]
    return []
