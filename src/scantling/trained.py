"""A finished or interrupted run, opened again to write text or to be measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scantling.command_line import mistakes
from scantling.data.corpora import Corpus
from scantling.data.loading import validation_batches
from scantling.data.tokenizers import Pretrained, Tokenizer
from scantling.data.tokens import TokenizedCorpus, prepare
from scantling.generation import continuation
from scantling.model.decoder import Decoder
from scantling.run_directory import RunDirectory
from scantling.training.hardware import keep_freed_memory
from scantling.training.task import TextLoss

LOADABLE = ("scantling.model.", "scantling.data.", "torch.nn.ReLU", "torch.nn.GELU", "torch.nn.SiLU", "torch.nn.Identity")
"""Where a stored configuration may take classes from: nothing else is built because a file was read."""


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
        file = {"best": directory.best, "last": directory.last}.get(checkpoint)
        if file is None:
            raise ValueError(f"checkpoint={checkpoint} is unknown: use best or last")
        if not file.exists():
            raise ValueError(f"{path} has no {checkpoint} checkpoint yet: {file} is missing")
        config: Any = OmegaConf.load(directory.config)
        check_targets(config.decoder, directory.config)
        tokenizer = Tokenizer.load(directory.tokenizer)
        decoder: Decoder = instantiate(config.decoder, vocab_size=tokenizer.vocab_size)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        decoder.load_state_dict({key.removeprefix("decoder."): value for key, value in state.items()})
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(directory, config, decoder.eval().to(device), tokenizer)

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
        batches = validation_batches(tokens, self.decoder.seq_len, n_windows, batch_size)
        quiet = not sys.stderr.isatty()
        for batch in track(
            batches, "evaluating", console=Console(stderr=True), transient=True, disable=quiet
        ):
            targets_BT = batch["targets"].to(device)
            result.add(self.decoder(batch["inputs"].to(device), targets_BT=targets_BT), targets_BT)
        return result


def check_targets(config: Any, source: Path) -> None:
    """Raise ValueError when a stored configuration names code outside of `LOADABLE`."""
    if isinstance(config, DictConfig):
        target = config.get("_target_")
        if target is not None and not target.startswith(LOADABLE):
            raise ValueError(
                f"{source} asks for {target}: only {', '.join(LOADABLE)} may be loaded from a file"
            )
        children = [config[key] for key in config]
    else:
        children = list(config) if isinstance(config, ListConfig) else []
    for child in children:
        check_targets(child, source)


def sample(config: DictConfig) -> None:
    """Print the prompt and its continuation as it comes."""
    with mistakes():
        run = TrainedRun.load(config.run, config.checkpoint)
        pieces = continuation(
            run.decoder,
            run.tokenizer,
            config.prompt,
            n_tokens=config.n_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
    print(config.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def evaluate(config: DictConfig) -> None:
    """Print a table of losses, one row a run."""
    keep_freed_memory()
    console = Console(highlight=False)
    paths = config.run if isinstance(config.run, ListConfig) else [config.run]
    with mistakes():
        if config.split not in ("train", "val"):
            raise ValueError(f"split={config.split} is unknown: use val or train")
        runs = [TrainedRun.load(path, config.checkpoint) for path in paths]
        corpora = [run.corpus(config.data, Path(config.paths.cache)) for run in runs]
    table = Table("run", "bits/byte", "nats/token", "perplexity", "tokens", box=None)
    for run, corpus in zip(runs, corpora, strict=True):
        loss = run.loss(corpus, split=config.split, n_windows=config.n_windows, batch_size=config.batch_size)
        result = loss.results()
        numbers = (f"{result[key]:.4f}" for key in ("bpb", "loss", "perplexity"))
        table.add_row(run.directory.name, *numbers, f"{loss.n_tokens:,}")
    console.print(f"{corpora[0].description}, {config.split} split")
    console.print(table)
    if len({corpus.fingerprint for corpus in corpora}) > 1:
        console.print(
            "[yellow]warning: these runs were measured on different texts; do not compare them[/yellow]"
        )
    trained_on = {run.directory.environment["corpus"]["fingerprint"] for run in runs}
    if len(trained_on) > 1:
        console.print("[yellow]warning: these runs were trained on different texts[/yellow]")
