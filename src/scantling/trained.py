"""A finished or interrupted run, opened again to write text or to be measured."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from scantling.command_line import mistakes
from scantling.continuation import continuations
from scantling.data.context_windows import ContextWindows
from scantling.data.corpora import Corpus
from scantling.data.loading import validation_batches
from scantling.data.tokenizers import Pretrained, Tokenizer
from scantling.data.tokens import TokenizedCorpus, prepare
from scantling.generation import laid_out_for_decoding
from scantling.model.cross_entropy import IGNORED
from scantling.model.decoder import Decoder
from scantling.run_directory import RunDirectory
from scantling.sampling import Settings
from scantling.stored import check_targets, opened, stored_weights
from scantling.study.lengths import FILES, write_lengths
from scantling.study.store import find
from scantling.training.hardware import keep_freed_memory
from scantling.training.task import TextLoss


@dataclass
class TrainedRun:
    directory: RunDirectory
    config: DictConfig
    decoder: Decoder
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str, checkpoint: str) -> TrainedRun:
        """Raises ValueError where there is no run or no checkpoint, or where its configuration asks for foreign code."""
        directory = RunDirectory(path)
        if not directory.config.exists():
            raise ValueError(
                f"run={path} holds no run: give a directory that holds a config.yaml, as below runs/"
            )
        config, decoder, tokenizer = opened(directory, stored_weights(directory, checkpoint))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(directory, config, decoder.to(device), tokenizer)

    def corpus(self, chosen: DictConfig | None, cache: Path) -> TokenizedCorpus:
        """The run's own text, or another, in the run's tokens."""
        if chosen is None:
            chosen = self.config.data
            check_targets(chosen, self.directory.config)
        corpus: Corpus = instantiate(chosen)
        return prepare(corpus, Pretrained(source=str(self.directory.tokenizer)), cache)

    @torch.no_grad()
    def loss(
        self, corpus: TokenizedCorpus, *, split: str, n_windows: int | None, batch_size: int
    ) -> TextLoss:
        """Over windows of the model's context length, side by side or evenly apart, in float32."""
        result = TextLoss(corpus.token_bytes)
        tokens = getattr(corpus, split).tokens
        device = self.decoder.embed.tokens.weight.device
        batches = validation_batches(tokens, self.decoder.seq_len, n_windows, batch_size, split=split)
        quiet = not sys.stderr.isatty()
        for batch in track(
            batches, "evaluating", console=Console(stderr=True), transient=True, disable=quiet
        ):
            targets_BT = batch["targets"].to(device)
            result.add(self.decoder(batch["inputs"].to(device), targets_BT=targets_BT), targets_BT)
        return result

    @torch.no_grad()
    def loss_by_length(
        self, corpus: TokenizedCorpus, windows: ContextWindows, *, batch_size: int
    ) -> Iterator[tuple[int, int, TextLoss]]:
        """(length, stride, loss) for each cut of the windows, in float32.

        `batch_size` counts windows of the model's context length: longer ones come in smaller batches.
        """
        device = self.decoder.embed.tokens.weight.device
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task(f"evaluating {self.directory.name}", total=windows.n_inputs)
            for length, stride in windows.cuts:
                result = TextLoss(corpus.token_bytes)
                rows = max(1, batch_size * self.decoder.seq_len // length)
                for inputs_BT, targets_BT in windows.batches(length, stride, rows):
                    inputs_BT, targets_BT = inputs_BT.to(device), targets_BT.to(device)
                    targets_BT[:, : length - stride] = IGNORED
                    result.add(self.decoder(inputs_BT, targets_BT=targets_BT), targets_BT)
                    progress.advance(bar, inputs_BT.numel())
                yield length, stride, result


def place_of(name: str, config: DictConfig) -> str:
    """The directory of a run that is given by it, or by its name in any study. Raises ValueError for what is none."""
    return str(find(Path(config.paths.runs), [name])[0].path)


def sample(config: DictConfig) -> None:
    """Print each prompt and its continuation: of the first that is not done as it comes, of others when it is done."""
    with mistakes():
        settings = Settings(
            **{name: config[name] for name in SAMPLING},
            stop=tuple(unescaped(stop) for stop in one_or_more(config.stop, config.stops, "stop")),
            precision=config.cache,
        )
        prompts = one_or_more(config.prompt, lines_or_list(config.prompts), "prompt") or [""]
        run = TrainedRun.load(place_of(config.run, config), config.checkpoint)
        draft = None
        if config.draft is not None:
            draft = TrainedRun.load(place_of(config.draft, config), config.draft_checkpoint)
        if draft is not None and draft.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise ValueError(
                f"draft={config.draft} has another tokenizer than {config.run}: use a run that shares it"
            )
        for each in (run, draft):
            if each is not None:
                laid_out_for_decoding(each.decoder, rows=len(prompts) * settings.beams)
        pieces = continuations(
            run.decoder,
            run.tokenizer,
            prompts,
            settings=settings,
            seed=config.seed,
            draft=None if draft is None else draft.decoder,
        )
    show(prompts, pieces)


SAMPLING = (
    *("n_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "context"),
    *("beams", "length_penalty", "draft_tokens"),
)
"""Settings of conf/sample.yaml that go to generation as they are."""


def one_or_more(one: str | None, several: list[str] | None, name: str) -> list[str]:
    if one and several is not None:
        raise ValueError(f"{name} and {name}s are both set: put all into {name}s")
    return several if several is not None else [one] if one else []


def lines_or_list(prompts: ListConfig | str | None) -> list[str] | None:
    """A list as it is, of a file its lines."""
    if prompts is None:
        return None
    found = list(prompts) if isinstance(prompts, ListConfig) else Path(prompts).read_text().splitlines()
    if not found:
        raise ValueError(f"prompts={prompts} holds none: give a list, or a file with a prompt on each line")
    return [str(prompt) for prompt in found]


def unescaped(text: str) -> str:
    r"""Line breaks and tabs may be typed as \n and \t."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def show(prompts: list[str], pieces: Iterator[tuple[int, str | None]]) -> None:
    """Texts one below the other: what comes of a later one waits until those before it are done."""
    waiting, done, shown = list(prompts), set(), 0
    print(waiting[0], end="", flush=True)
    for row, piece in pieces:
        if piece is None:
            done.add(row)
        elif row == shown:
            print(piece, end="", flush=True)
        else:
            waiting[row] += piece
        while shown in done and shown + 1 < len(prompts):
            shown += 1
            print(f"\n\n{waiting[shown]}", end="", flush=True)
    print()


def evaluate(config: DictConfig) -> None:
    """Print a table of losses, one row a run, or with `lengths` one row for each length of context of each."""
    keep_freed_memory()
    console = Console(highlight=False)
    given = config.run if isinstance(config.run, ListConfig) else [config.run]
    with mistakes():
        if config.split not in ("train", "val"):
            raise ValueError(f"split={config.split} is unknown: use val or train")
        if config.lengths is None and (config.stride is not None or config.to is not None):
            raise ValueError("stride and to belong to a loss by length of context: add lengths=[64,128,256]")
        runs = [TrainedRun.load(place_of(name, config), config.checkpoint) for name in given]
        corpora = [run.corpus(config.data, Path(config.paths.cache)) for run in runs]
        windows = [] if config.lengths is None else context_windows(config, runs, corpora)
    console.print(f"{corpora[0].description}, {config.split} split")
    if config.lengths is None:
        console.print(losses(config, runs, corpora))
    else:
        rows = []
        for name, run, corpus, of_run in zip(names(runs), runs, corpora, windows, strict=True):
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


def losses(config: DictConfig, runs: list[TrainedRun], corpora: list[TokenizedCorpus]) -> Table:
    table = Table("run", "bits/byte", "nats/token", "perplexity", "tokens", box=None)
    for name, run, corpus in zip(names(runs), runs, corpora, strict=True):
        loss = run.loss(corpus, split=config.split, n_windows=config.n_windows, batch_size=config.batch_size)
        result = loss.results()
        numbers = (f"{result[key]:.4f}" for key in ("bpb", "loss", "perplexity"))
        table.add_row(name, *numbers, f"{int(loss.n_tokens):,}")
    return table


def names(runs: list[TrainedRun]) -> list[str]:
    """The choices by which runs differ, as `pos=rope`; the directories' names where they do not differ by choices."""
    chosen = [{**run.config.choices, "seed": run.config.seed} for run in runs]
    groups = {group: None for choices in chosen for group in choices}
    differing = [g for g in groups if len({choices[g] for choices in chosen if g in choices}) > 1]
    labels = [" ".join(f"{g}={choices[g]}" for g in differing if g in choices) for choices in chosen]
    return labels if len(set(labels)) == len(runs) > 1 else [run.directory.name for run in runs]


def context_windows(
    config: DictConfig, runs: list[TrainedRun], corpora: list[TokenizedCorpus]
) -> list[ContextWindows]:
    """Those of each run's text. Raises ValueError for lengths that a model cannot take, and files that are there."""
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
    config: DictConfig, name: str, run: TrainedRun, corpus: TokenizedCorpus, windows: ContextWindows
) -> list[dict[str, Any]]:
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
    table = Table(box=None, caption="* length of training; no stride: side by side", caption_justify="left")
    for heading in ("run", "context", "stride", "bits/byte", "nats/token", "perplexity"):
        table.add_column(heading, no_wrap=heading != "run", overflow="fold")
    for row in rows:
        context = f"{row['length']}{' *' if row['length'] == row['trained_at'] else ''}"
        numbers = (f"{row[key]:.4f}" for key in ("bpb", "loss", "perplexity"))
        stride = str(row["stride"]) if row["sliding"] else ""
        table.add_row(row["run"], context, stride, *numbers)
    return table
