"""A report on Weights & Biases: the same blocks, with panels over the study's runs for charts of curves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from scantling.analysis.arms import StudyRuns
from scantling.report.spec import Block, Chart, Code, Paragraph, Report, Samples, Table, in_markdown
from scantling.runs.directory import RunDirectory
from scantling.runs.overrides import arms_changes, settings_of, varied_keys

PATIENCE = 20
"""Seconds for one answer of the server."""

SYNCED = ".synced"
"""What `wandb sync` adds to the name of a file that it has sent."""


def sync(study: Path) -> tuple[int, list[str]]:
    """Send the offline files of a study's finished runs that were not sent yet.

    Returns how many there were, and the runs that wait: what is sent while its run goes on counts as sent for
    ever. What a rollback took back is not sent. Raises ValueError where `wandb sync` fails.
    """
    unsent: dict[str, list[Path]] = {}
    for folder in sorted((study / "wandb").glob("offline-run-*")):
        if list(folder.glob("*.wandb")) and not list(folder.glob(f"*.wandb{SYNCED}")):
            wandb_id = folder.name.split("-", 3)[3]  # offline-run-TIME-ID
            name = wandb_id.rpartition("-")[0]
            if wandb_id == RunDirectory(study / name).wandb_id:
                unsent.setdefault(name, []).append(folder)
    waiting = [name for name in unsent if not RunDirectory(study / name).is_finished]
    ready = [str(folder) for name, folders in unsent.items() if name not in waiting for folder in folders]
    if ready:
        command = [sys.executable, "-m", "wandb", "sync", *ready]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            words = (ended.stderr or ended.stdout).strip().splitlines()
            raise ValueError(
                f"wandb sync sent not all of {len(ready)} runs: {words[-1] if words else 'no word'}"
            )
    return len(ready), waiting


def grouping(study: StudyRuns) -> list[str]:
    """What the panels group by, as paths in the configuration that W&B has of each run.

    These are the settings in which arms and scales differ, or the arms' name in place of what they change.
    """
    settings = [settings_of(text) for text in study.runs["overrides"]]
    varied = varied_keys(settings)
    if all("arm" in setting for setting in settings):
        changes = arms_changes(settings)
        varied = ["arm", *(key for key in varied if key not in changes)]
    return [f"config.choices.{key}" if f"choice.{key}" in study.runs else f"config.{key}" for key in varied]


def own_entity() -> str:
    """The account's entity, as the server has it.

    It is asked for before anything is sent, as `wandb sync` and W&B's own service may wait for ever for a
    silent server. Raises ValueError where the server does not answer.
    """
    import wandb

    settings = wandb.Settings()
    settings.settings_system = str(Path("~/.config/wandb/settings").expanduser())
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    try:
        with contextlib.suppress(HTTPError):  # an answer
            urlopen(settings.base_url, timeout=PATIENCE).close()
        return wandb.Api(timeout=PATIENCE).default_entity or ""
    except URLError as error:
        raise ValueError(refusal(f"no answer from {settings.base_url}: {error.reason}")) from error
    except Exception as error:  # of its service, too, whose errors are of no family
        raise ValueError(refusal(error)) from error


def refusal(error: Exception | str) -> str:
    """One line for whatever W&B's service raises."""
    return f"W&B does not take the report: {' '.join(str(error).split())}"


def publish(report: Report, *, entity: str, project: str, group: str, by: Sequence[str], draft: bool) -> str:
    """Save the report in the project; returns its address.

    `group`: W&B's name for the study whose runs its panels show; `by`: their `grouping`. Raises ValueError
    where the server does not take it.
    """
    try:
        made = as_wandb(report, entity=entity, project=project, group=group, by=by)
        made.save(draft=draft)
    except Exception as error:  # of its service, too, whose errors are of no family
        raise ValueError(refusal(error)) from error
    return made.url


def as_wandb(report: Report, *, entity: str, project: str, group: str, by: Sequence[str]) -> Any:
    """The report as an object of `wandb_workspaces`, not saved."""
    import wandb_workspaces.reports.v2.interface as wr

    blocks: list[Any] = [wr.P(text=report.question)] if report.question else []
    blocks.append(wr.BlockQuote(text=report.answer))
    if report.cautions:
        blocks.append(wr.UnorderedList(items=list(report.cautions)))
    for section in report.sections:
        shown = [part for block in section.blocks for part in block_of(block, entity, project, group, by)]
        blocks += [wr.H2(text=section.title), *shown] if shown else []
    return wr.Report(
        entity=entity,
        project=project,
        title=report.title,
        description=report.answer,
        width="fluid",
        blocks=blocks,
    )


def block_of(block: Block, entity: str, project: str, group: str, by: Sequence[str]) -> list[Any]:
    """W&B's blocks for one of the report's.

    Charts of numbers that W&B has not, and figures, which it takes only by their address, are left to
    the page; their tables stand.
    """
    import wandb_workspaces.reports.v2.interface as wr

    if isinstance(block, Paragraph):
        return [wr.P(text=block.text)]
    if isinstance(block, Code):
        return [wr.CodeBlock(code=block.text, language="markdown")]
    if isinstance(block, Table):
        return [wr.MarkdownBlock(text="\n".join(lines))] if (lines := in_markdown(block, links=False)) else []
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
            groupby=list(by),
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
