"""The likeliest text that follows a text, looked for among several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from scantling.inference.cached_texts import CachedTexts, largest_context
from scantling.inference.sampling import GenerationSettings, Ids, seen_tokens
from scantling.model.decoder import Decoder


@dataclass
class Beam:
    """A text that ended, and its score."""

    score: float
    ids: Ids


class Beams:
    """The texts of one prompt: K unfinished ones, and at most K finished ones, the best first."""

    def __init__(self, settings: GenerationSettings, end_of_text: int | None) -> None:
        self.settings, self.end_of_text = settings, end_of_text
        self.written: list[Ids] = [[] for _ in range(settings.beams)]
        self.finished: list[Beam] = []
        self.is_open = True

    def advance(
        self, step: int, candidates: Sequence[tuple[float, int, int]]
    ) -> list[tuple[float, int, int]]:
        """The K texts that go on, as (log p, beam, its next token), from candidates of that form.

        Candidates come likeliest first. `step` is their length; at the last step none goes on, and all
        of the first K are finished.
        """
        K, last = self.settings.beams, step == self.settings.n_tokens
        length = step**self.settings.length_penalty
        going_on: list[tuple[float, int, int]] = []
        for rank, (score, beam, token) in enumerate(candidates):
            if token == self.end_of_text or last:
                if rank < K and self.is_open:
                    ids = self.written[beam] + ([] if token == self.end_of_text else [token])
                    self.finished.append(Beam(score / length, ids))
            elif len(going_on) < K:
                going_on.append((score, beam, token))
        self.finished = sorted(self.finished, key=lambda beam: -beam.score)[:K]
        if going_on:
            self.written = [[*self.written[beam], token] for _, beam, token in going_on]
            best = going_on[0][0] / length
            self.is_open = self.is_open and (len(self.finished) < K or best > self.finished[-1].score)
        return going_on


@torch.inference_mode()
def beam_search(
    decoder: Decoder, prompts: Sequence[Ids], *, settings: GenerationSettings, end_of_text: int | None
) -> list[Ids]:
    """The best of the texts that end within `n_tokens`, for each prompt.

    Each step keeps the K = `beams` likeliest unfinished texts. Of the 2·K likeliest continuations those
    among the first K that end in `end_of_text`, or at the last step, are finished; the search ends when the
    likeliest text under way scores below the worst of K finished ones, as in `transformers` with
    early_stopping=False. Raises ValueError where the context has no room for `n_tokens`.
    """
    K, P = settings.beams, len(prompts)
    context = largest_context(decoder, settings.context)
    check_room(prompts, settings.n_tokens, context)
    texts = CachedTexts(
        decoder, prompts, context=context, room=settings.n_tokens, precision=settings.precision
    )
    logits_BV = texts.begin()[:, -1].repeat_interleave(K, 0)
    texts.select([row for row in range(P) for _ in range(K)])
    V = logits_BV.shape[-1]
    running_PK = torch.full((P, K), -1e9)
    running_PK[:, 0] = 0  # the first tokens are all of one text
    beams = [Beams(settings, end_of_text) for _ in prompts]
    for step in range(1, settings.n_tokens + 1):
        log_p_BV = logits_BV.float().log_softmax(-1)
        if settings.repetition_penalty != 1:
            log_p_BV = settings.penalise(log_p_BV, seen_tokens(texts.ids, V, texts.device))
        total = running_PK.to(texts.device)[:, :, None] + log_p_BV.view(P, K, V)
        scores, indices = (x.tolist() for x in total.flatten(1).topk(min(2 * K, K * V)))
        rows, tokens = [], []
        for p in range(P):
            candidates = [(score, *divmod(i, V)) for score, i in zip(scores[p], indices[p], strict=True)]
            if going_on := beams[p].advance(step, candidates):
                running_PK[p] = torch.tensor([score for score, _, _ in going_on])
                rows += [p * K + beam for _, beam, _ in going_on]
                tokens += [token for _, _, token in going_on]
        if step == settings.n_tokens or not any(each.is_open for each in beams):
            break
        texts.select(rows)
        logits_BV = texts.read(torch.tensor(tokens, device=texts.device)[:, None])[:, -1]
    return [each.finished[0].ids for each in beams]


def check_room(prompts: Sequence[Ids], n_tokens: int, context: int) -> None:
    """Raise ValueError where `n_tokens` more do not fit into the context behind the longest prompt."""
    longest = max(len(ids) for ids in prompts)
    if longest + n_tokens > context:
        raise ValueError(
            f"beams keep their whole text in the context of {context} tokens: after a prompt of {longest} "
            f"there is room for n_tokens={max(0, context - longest)}"
        )
