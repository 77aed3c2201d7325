"""The text that follows a text, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from scantling.inference.beam_search import beam_search, check_room
from scantling.inference.cached_texts import largest_context
from scantling.inference.generation import generate
from scantling.inference.sampling import GenerationSettings, Ids
from scantling.inference.speculation import check_draft, speculate
from scantling.model.decoder import Decoder


class Codec(Protocol):
    """The part of a tokenizer that generation needs."""

    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, broken characters as U+FFFD."""
        ...


class GrowingText:
    """A continuation as it grows.

    A piece is held back while it may be part of a character or of a stop string.
    """

    def __init__(self, codec: Codec, stop: Sequence[str]) -> None:
        self.codec, self.stop = codec, stop
        self.ids: Ids = []
        self.shown = 0
        self.is_done = False

    def add(self, token: int) -> str:
        """The piece of text that the token makes certain."""
        if token == self.codec.end_of_text:
            return self.finish()
        self.ids.append(token)
        text = self.codec.decode(self.ids)
        ends = [at for stop in self.stop if (at := text.find(stop, self.shown)) >= 0]
        if ends:
            self.is_done = True
            return self.show_up_to(text, min(ends))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        held = max((stop_overlap(text[self.shown :], stop) for stop in self.stop), default=0)
        return self.show_up_to(text, len(text) - held)

    def finish(self) -> str:
        """The piece that was still held back."""
        if self.is_done:
            return ""
        self.is_done = True
        text = self.codec.decode(self.ids)
        return self.show_up_to(text, len(text))

    def show_up_to(self, text: str, end: int) -> str:
        """The piece between what is already shown and `end`, which is shown from now on."""
        piece = text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece


def stop_overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def continue_prompts(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[str],
    *,
    settings: GenerationSettings,
    seed: int,
    draft: Decoder | None = None,
) -> Iterator[tuple[int, str | None]]:
    """Pairs (prompt, piece of the text that follows it), until end-of-text, a stop string or `n_tokens`.

    The piece is None when the text is done. An empty prompt starts a new document. Raises ValueError, at
    once, for prompts that the model cannot take.
    """
    ids = [[codec.end_of_text, *codec.encode(prompt)] for prompt in prompts]
    context = largest_context(decoder, settings.context)
    longest = max(len(prompt) for prompt in ids)
    if longest > context:
        more = "" if decoder.pos.max_len is not None else f", or let it read on with context={longest}"
        raise ValueError(f"the prompt has {longest} tokens and the model reads {context}: shorten it{more}")
    if settings.beams > 1:
        check_room(ids, settings.n_tokens, context)
    if draft is not None:
        if settings.beams > 1:
            raise ValueError(f"beams={settings.beams} and a draft exclude each other: choose one")
        check_draft(decoder, draft)
    return continue_ids(decoder, codec, ids, settings=settings, seed=seed, draft=draft)


def continue_ids(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[Ids],
    *,
    settings: GenerationSettings,
    seed: int,
    draft: Decoder | None,
) -> Iterator[tuple[int, str | None]]:
    """As `continue_prompts`, for prompts that are ids already and known to fit."""
    models = [model for model in (decoder, draft) if model is not None]
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    texts = [GrowingText(codec, settings.stop) for _ in prompts]
    try:
        for row, token in next_tokens(
            decoder, codec, prompts, texts, settings=settings, seed=seed, draft=draft
        ):
            if texts[row].is_done:
                continue
            if piece := texts[row].add(token):
                yield row, piece
            if texts[row].is_done:
                yield row, None
    finally:
        for model, training in zip(models, was_training, strict=True):
            model.train(training)
    for row, text in enumerate(texts):
        if not text.is_done:
            if rest := text.finish():
                yield row, rest
            yield row, None


def next_tokens(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[Ids],
    texts: Sequence[GrowingText],
    *,
    settings: GenerationSettings,
    seed: int,
    draft: Decoder | None,
) -> Iterator[tuple[int, int]]:
    """(prompt, next token), for texts that are not done."""
    generator = torch.Generator().manual_seed(seed)
    if settings.beams > 1:
        for row, ids in enumerate(
            beam_search(decoder, prompts, settings=settings, end_of_text=codec.end_of_text)
        ):
            yield from ((row, token) for token in ids)
    elif draft is not None:
        for row, prompt in enumerate(prompts):
            for token in speculate(decoder, draft, prompt, settings=settings, generator=generator):
                yield row, token
                if texts[row].is_done:
                    break
    else:
        done: set[int] = set()
        for step in generate(decoder, prompts, settings=settings, generator=generator, done=done):
            yield from step
            done |= {row for row, text in enumerate(texts) if text.is_done}


def continue_text(
    decoder: Decoder, codec: Codec, prompt: str, *, seed: int, **settings: Any
) -> Iterator[str]:
    """The text that follows one prompt, piece by piece; only the end of a prompt that is too long counts."""
    plain = GenerationSettings(**settings)
    ids = [codec.end_of_text, *codec.encode(prompt)][-largest_context(decoder, plain.context) :]
    for _, piece in continue_ids(decoder, codec, [ids], settings=plain, seed=seed, draft=None):
        if piece is not None:
            yield piece
