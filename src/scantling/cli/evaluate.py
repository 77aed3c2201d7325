"""What evaluate.py does: the loss of runs on text, and by length of context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from rich.table import Table

from scantling.config.mistakes import mistakes
from scantling.data.context_windows import ContextWindows
from scantling.data.tokens import TokenizedCorpus
from scantling.inference.stored_run import StoredRun, find_run
from scantling.model.hardware import keep_freed_memory
from scantling.report.lengths import FILES, write_lengths
from scantling.report.terminal import open_console


def evaluate(config: DictConfig) -> None:
    """Print a table of losses: a row for each run, or with `lengths` for each run and length of context."""
    keep_freed_memory()
    console = open_console()
    given = config.run if isinstance(config.run, ListConfig) else [config.run]
    with mistakes():
        if config.split not in ("train", "val"):
            raise ValueError(f"split={config.split} is unknown: use val or train")
        if config.lengths is None and (config.stride is not None or config.to is not None):
            raise ValueError("stride and to belong to a loss by length of context: add lengths=[64,128,256]")
        runs = [StoredRun.load(find_run(name, config), config.checkpoint) for name in given]
        corpora = [run.corpus(config.data, Path(config.paths.cache)) for run in runs]
        windows = [] if config.lengths is None else context_windows(config, runs, corpora)
    console.print(f"{corpora[0].description}, {config.split} split")
    if config.lengths is None:
        console.print(loss_table(config, runs, corpora))
    else:
        rows = []
        for name, run, corpus, of_run in zip(label_runs(runs), runs, corpora, windows, strict=True):
            rows += rows_by_length(config, name, run, corpus, of_run)
        counts = " and ".join(f"{n:,}" for n in sorted({row["tokens"] for row in rows}))
        console.print(f"the same {counts} tokens at every length")
        console.print(table_by_length(rows))
        if config.to is not None:
            one_tokenizer = len({run.tokenizer.fingerprint for run in runs}) == 1
            title = f"loss by length of context, {windows[0].n_targets:,} tokens"
            write_lengths(rows, Path(config.to), measure="loss" if one_tokenizer else "bpb", title=title)
            console.print(f"written to {Path(config.to)}: {', '.join(FILES)}")
    if len({corpus.fingerprint for corpus in corpora}) > 1:
        console.print(
            "[yellow]warning: these runs were measured on different texts; do not compare them[/yellow]"
        )
    trained_on = {run.directory.environment["corpus"]["fingerprint"] for run in runs}
    if len(trained_on) > 1:
        console.print("[yellow]warning: these runs were trained on different texts[/yellow]")


def loss_table(config: DictConfig, runs: list[StoredRun], corpora: list[TokenizedCorpus]) -> Table:
    """A row for each run: its loss over windows of its own context length."""
    table = Table("run", "bits/byte", "nats/token", "perplexity", "tokens", box=None)
    for name, run, corpus in zip(label_runs(runs), runs, corpora, strict=True):
        loss = run.loss(corpus, split=config.split, n_windows=config.n_windows, batch_size=config.batch_size)
        result = loss.results()
        numbers = (f"{result[key]:.4f}" for key in ("bpb", "loss", "perplexity"))
        table.add_row(name, *numbers, f"{int(loss.n_tokens):,}")
    return table


def label_runs(runs: list[StoredRun]) -> list[str]:
    """The choices by which runs differ, as `pos=rope`; where they do not, the directories' names."""
    chosen = [{**run.config.choices, "seed": run.config.seed} for run in runs]
    groups = {group: None for choices in chosen for group in choices}
    differing = [g for g in groups if len({choices[g] for choices in chosen if g in choices}) > 1]
    labels = [" ".join(f"{g}={choices[g]}" for g in differing if g in choices) for choices in chosen]
    return labels if len(set(labels)) == len(runs) > 1 else [run.directory.name for run in runs]


def context_windows(
    config: DictConfig, runs: list[StoredRun], corpora: list[TokenizedCorpus]
) -> list[ContextWindows]:
    """The windows of each run's text.

    Raises ValueError for lengths that a model cannot take, and for files that are there already.
    """
    if not isinstance(config.lengths, ListConfig):
        raise ValueError(f"lengths={config.lengths} must be a list of tokens, as [64,128,256]")
    if config.batch_size < 1:
        raise ValueError(f"batch_size={config.batch_size} must be at least 1")
    if config.to is not None and (there := [name for name in FILES if (Path(config.to) / name).exists()]):
        raise ValueError(f"to={config.to} holds a {there[0]} already: give another directory")
    windows = [
        ContextWindows(
            getattr(corpus, config.split).tokens,
            list(config.lengths),
            stride=config.stride,
            n_windows=config.n_windows,
        )
        for corpus in corpora
    ]
    for run in runs:
        limit, longest = run.decoder.pos.max_len, windows[0].lengths[-1]
        if limit is not None and longest > limit:
            raise ValueError(
                f"{run.directory.name} has a table of {limit} positions and cannot read lengths={longest}: "
                f"take lengths up to {limit}"
            )
    return windows


def rows_by_length(
    config: DictConfig, name: str, run: StoredRun, corpus: TokenizedCorpus, windows: ContextWindows
) -> list[dict[str, Any]]:
    """A row for each length and stride of one run: bits per byte, nats per token and perplexity."""
    found = {
        (length, stride): loss
        for length, stride, loss in run.loss_by_length(corpus, windows, batch_size=config.batch_size)
    }
    strides = [(length, length, False) for length in windows.lengths]
    if windows.stride is not None:
        strides += [(length, windows.stride, True) for length in windows.lengths]
    return [
        {
            "run": name,
            "directory": run.directory.name,
            "trained_at": run.decoder.seq_len,
            "length": length,
            "sliding": sliding,
            "stride": stride,
            **found[length, stride].results(),
            "tokens": int(found[length, stride].n_tokens),
        }
        for length, stride, sliding in strides
    ]


def table_by_length(rows: list[dict[str, Any]]) -> Table:
    """The rows of `rows_by_length` as a table, the length of training marked."""
    table = Table(box=None, caption="* length of training; no stride: side by side", caption_justify="left")
    for heading in ("run", "context", "stride", "bits/byte", "nats/token", "perplexity"):
        table.add_column(heading, no_wrap=heading != "run", overflow="fold")
    for row in rows:
        context = f"{row['length']}{' *' if row['length'] == row['trained_at'] else ''}"
        numbers = (f"{row[key]:.4f}" for key in ("bpb", "loss", "perplexity"))
        stride = str(row["stride"]) if row["sliding"] else ""
        table.add_row(row["run"], context, stride, *numbers)
    return table
