"""A finished or interrupted run, opened again to write text or to be measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress, track

from scantling.data.context_windows import ContextWindows
from scantling.data.corpora import Corpus
from scantling.data.loading import validation_batches
from scantling.data.tokenizers import Pretrained, Tokenizer
from scantling.data.tokens import TokenizedCorpus, prepare_corpus
from scantling.inference.safe_loading import check_targets, load_decoder, read_weights
from scantling.inference.text_loss import TextLoss
from scantling.model.cross_entropy import IGNORED
from scantling.model.decoder import Decoder
from scantling.runs.directory import RunDirectory
from scantling.runs.table import find


@dataclass
class StoredRun:
    """A run opened again: directory, configuration, decoder with the weights of a checkpoint, tokenizer."""

    directory: RunDirectory
    config: DictConfig
    decoder: Decoder
    tokenizer: Tokenizer

    @classmethod
    def load(cls, path: str, checkpoint: str) -> StoredRun:
        """The run in the directory `path`, with the weights of `checkpoint`.

        Raises ValueError where there is no run or no checkpoint, or where its
        configuration asks for foreign code.
        """
        directory = RunDirectory(path)
        if not directory.config.exists():
            raise ValueError(
                f"run={path} holds no run: give a directory that holds a config.yaml, as below runs/"
            )
        config, decoder, tokenizer = load_decoder(directory, read_weights(directory, checkpoint))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(directory, config, decoder.to(device), tokenizer)

    def corpus(self, chosen: DictConfig | None, cache: Path) -> TokenizedCorpus:
        """The run's own text, or another, in the run's tokens."""
        if chosen is None:
            chosen = self.config.data
            check_targets(chosen, self.directory.config)
        corpus: Corpus = instantiate(chosen)
        return prepare_corpus(corpus, Pretrained(source=str(self.directory.tokenizer)), cache)

    @torch.no_grad()
    def loss(
        self, corpus: TokenizedCorpus, *, split: str, n_windows: int | None, batch_size: int
    ) -> TextLoss:
        """The loss over windows of the model's context length, side by side or evenly apart, in float32."""
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


def find_run(name: str, config: DictConfig) -> str:
    """The directory of a run that is given by it, or by its name in any study.

    Raises ValueError where there is none.
    """
    return str(find(Path(config.paths.runs), [name])[0].path)
