"""Tokens from a decoder in fewer passes: a small model proposes several, the large one reads them at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from scantling.inference.cached_texts import CachedTexts, largest_context
from scantling.inference.sampling import GenerationSettings, Ids, draw_one, seen_tokens
from scantling.model.decoder import Decoder


@torch.inference_mode()
def speculate(
    decoder: Decoder, draft: Decoder, prompt: Ids, *, settings: GenerationSettings, generator: torch.Generator
) -> Iterator[int]:
    """As `generate` for one prompt, in distribution and, at temperature 0, token for token, in fewer passes.

    The draft draws some tokens x ~ q, the model reads them all at once and keeps each with probability
    min(1, p/q); in place of the first that it does not keep it draws from max(0, p - q), normalised.
    Leviathan et al. 2022, arXiv:2211.17192, algorithm 1.
    """
    check_draft(decoder, draft)
    context, small = largest_context(decoder, settings.context), largest_context(draft, None)
    n_tokens, precision = settings.n_tokens, settings.precision
    texts = CachedTexts(decoder, [prompt], context=context, room=n_tokens, precision=precision, rewinds=True)
    drafts = CachedTexts(draft, [prompt], context=small, room=n_tokens + 1, precision=precision, rewinds=True)
    written, unread = list(prompt), []
    token = draw_one(next_probabilities(texts.begin()[0, -1], written, settings), generator)
    drafts.begin()
    yielded = 1
    yield token
    while yielded < n_tokens:
        written.append(token)
        unread.append(token)
        # No proposal may cross a full context, which makes a new start after each token as without a draft.
        n = min(settings.draft_tokens, n_tokens - yielded - 1, context - texts.longest - 1, small // 2)
        proposed, q = propose(
            drafts, n, unread=unread, written=written, settings=settings, generator=generator
        )
        logits_TV = texts.read(torch.tensor([[token, *proposed]], device=texts.device))[0]
        kept, token = accept(logits_TV, q, proposed, written=written, settings=settings, generator=generator)
        texts.forget(len(proposed) - kept)
        if proposed:
            unread = proposed[-1:]  # the draft has not read its last proposal
        if kept < len(proposed):
            drafts.forget(len(proposed) - 1 - kept)
            unread = []
        written += proposed[:kept]
        yield from (*proposed[:kept], token)
        yielded += kept + 1


def next_probabilities(logits_V: Tensor, text: Ids, settings: GenerationSettings) -> Tensor:
    """The distribution [V] of the token after `text`, on the CPU, where it is drawn from."""
    seen = None
    if settings.repetition_penalty != 1:
        seen = seen_tokens([text], len(logits_V), logits_V.device)
    return settings.probabilities(logits_V[None], seen)[0].cpu()


def propose(
    drafts: CachedTexts,
    n: int,
    *,
    unread: Ids,
    written: Ids,
    settings: GenerationSettings,
    generator: torch.Generator,
) -> tuple[Ids, list[Tensor]]:
    """`n` tokens that the draft draws after `written`, and the distributions q [V] that they come from.

    `unread`: the tokens at the end of `written` that the draft has not read.
    """
    proposed: Ids = []
    q: list[Tensor] = []
    for _ in range(n):
        logits_V = drafts.read(torch.tensor([unread], device=drafts.device))[0, -1]
        q.append(next_probabilities(logits_V, written + proposed, settings))
        proposed.append(draw_one(q[-1], generator))
        unread = proposed[-1:]
    return proposed, q


def accept(
    logits_TV: Tensor,
    q: Sequence[Tensor],
    proposed: Ids,
    *,
    written: Ids,
    settings: GenerationSettings,
    generator: torch.Generator,
) -> tuple[int, int]:
    """How many of the proposed tokens are kept, and the token after them.

    `logits_TV`: the model's after `written` and after each proposed token.
    """
    for i, x in enumerate(proposed):
        p_V = next_probabilities(logits_TV[i], written + proposed[:i], settings)
        keeping = (p_V[x] / q[i][x]).clamp(max=1)
        if not draw_one(torch.stack((1 - keeping, keeping)), generator):
            left = (p_V - q[i]).clamp(min=0)
            return i, draw_one(left if left.any() else p_V, generator)  # they may differ by rounding alone
    return len(proposed), draw_one(next_probabilities(logits_TV[-1], written + proposed, settings), generator)


def check_draft(decoder: Decoder, draft: Decoder) -> None:
    """Raise ValueError unless both have as many tokens, and caches that can take tokens back."""
    sizes = [len(model.embed.tokens.weight) for model in (decoder, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft has {sizes[1]} tokens and the model {sizes[0]}: use a draft of the same tokenizer"
        )
    for model in (decoder, draft):
        model.new_cache(1).keep_all()
