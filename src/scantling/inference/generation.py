"""Tokens from a decoder, one for each text at a time: prefill, then decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from scantling.inference.cached_texts import CachedTexts, largest_context
from scantling.inference.sampling import GenerationSettings, Ids, seen_tokens
from scantling.model.decoder import Decoder


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Ids],
    *,
    settings: GenerationSettings,
    generator: torch.Generator,
    done: set[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """At each of `n_tokens` steps, (prompt, id of its next token) for all of them.

    Those put into `done` drop out.
    """
    context = largest_context(decoder, settings.context)
    texts = CachedTexts(
        decoder, prompts, context=context, room=settings.n_tokens, precision=settings.precision
    )
    logits_BV = texts.begin()[:, -1]
    rows = list(range(len(prompts)))
    seen_BV = None
    if settings.repetition_penalty != 1:
        seen_BV = seen_tokens(prompts, logits_BV.shape[-1], texts.device)
    for step in range(settings.n_tokens):
        tokens_B = settings.draw(logits_BV, seen_BV, generator)
        yield list(zip(rows, tokens_B.tolist(), strict=True))
        if seen_BV is not None:
            seen_BV.scatter_(1, tokens_B[:, None], True)
        if done and (kept := [i for i, row in enumerate(rows) if row not in done]) != list(range(len(rows))):
            if not kept:
                return
            texts.select(kept)
            rows, tokens_B = [rows[i] for i in kept], tokens_B[kept]
            seen_BV = None if seen_BV is None else seen_BV[kept]
        if step + 1 < settings.n_tokens:
            logits_BV = texts.read(tokens_B[:, None])[:, -1]
