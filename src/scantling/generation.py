"""Text from a decoder: prefill, decode, drawing, beams, drafts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from scantling.model.attn import PatternedAttention
from scantling.model.cache import BUFFERS, KVCache
from scantling.model.decoder import Decoder
from scantling.model.linear import ONEDNN, Linear, packed

Ids = list[int]


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    end_of_text: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Settings:
    """How a text is continued. Raises ValueError for what cannot be.

    Filters apply in this order, as in `transformers`, each to what the one before it left.
    """

    n_tokens: int
    temperature: float
    """Divides the logits; 0 takes the likeliest token always."""
    top_k: int | None
    """Keep the k likeliest tokens. Fan et al. 2018, arXiv:1805.04833."""
    top_p: float | None
    """Keep the fewest likeliest tokens that hold at least p together. Holtzman et al. 2020, arXiv:1904.09751."""
    min_p: float | None = None
    """Keep tokens at least p times as likely as the likeliest. Nguyen et al. 2024, arXiv:2407.01082."""
    typical_p: float | None = None
    """Keep the tokens whose -log p is nearest to the entropy, until they hold p. Meister et al. 2022, arXiv:2202.00666."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, multiplies negative ones. Keskar et al. 2019, arXiv:1909.05858, §4.1."""
    beams: int = 1
    """More than one: the likeliest text that a beam search finds; nothing is drawn and no filter applies."""
    length_penalty: float = 1.0
    """A finished beam's score is log p / tokens^length_penalty: above 0 favours long texts. Wu et al. 2016, arXiv:1609.08144."""
    draft_tokens: int = 4
    """How many tokens a draft model proposes at once."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    precision: str = "full"
    """Of cached keys and values."""
    context: int | None = None
    """Tokens that the model sees at most; None: its `seq_len`, or no limit where every layer sees a window."""

    def __post_init__(self):
        whole = {"n_tokens": self.n_tokens, "beams": self.beams, "draft_tokens": self.draft_tokens}
        if self.top_k is not None:
            whole["top_k"] = self.top_k
        if self.context is not None:
            whole["context"] = self.context
        for name, value in whole.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value} must be a whole number, at least 1")
        for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"):
            if not isinstance(getattr(self, name), (int, float, NoneType)):
                raise ValueError(f"{name}={getattr(self, name)} must be a number")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0; 0 takes the likeliest token"
            )
        for name in ("top_p", "min_p", "typical_p"):
            p = getattr(self, name)
            if p is not None and not 0 < p <= 1:
                raise ValueError(f"{name}={p} must be above 0 and at most 1; null keeps all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 does nothing")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty} must be a finite number")
        if "" in self.stop:
            raise ValueError("a stop string is empty: every text would end at once; null stops at none")
        if self.precision not in BUFFERS:
            raise ValueError(f"cache={self.precision} is unknown: use one of {', '.join(BUFFERS)}")

    def penalised(self, logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"] | None) -> Tensor:
        if seen_BV is None:
            return logits_BV
        penalty = self.repetition_penalty
        punished = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        return torch.where(seen_BV, punished, logits_BV)

    def probabilities(
        self, logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"] | None = None
    ) -> Float[Tensor, "B V"]:
        """Of the next token, to draw from."""
        logits_BV = self.penalised(logits_BV.float(), seen_BV)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).float()
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None:
            least = logits_BV.topk(min(self.top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
        p_BV = logits_BV.softmax(-1)
        if self.top_p is not None:
            ordered, order = p_BV.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            p_BV = p_BV.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
        if self.min_p is not None:
            p_BV = p_BV.masked_fill(p_BV < self.min_p * p_BV.amax(-1, keepdim=True), 0.0)
        p_BV = p_BV / p_BV.sum(-1, keepdim=True)
        if self.typical_p is not None:
            p_BV = typical(p_BV, self.typical_p)
        return p_BV

    def draw(
        self, logits_BV: Tensor, seen_BV: Tensor | None, generator: torch.Generator
    ) -> Int[Tensor, " B"]:
        if self.temperature == 0:
            return self.penalised(logits_BV, seen_BV).argmax(-1)
        return drawn(self.probabilities(logits_BV, seen_BV), generator)


def typical(p_BV: Float[Tensor, "B V"], mass: float) -> Float[Tensor, "B V"]:
    surprise_BV = -p_BV.log()
    entropy_B1 = torch.special.entr(p_BV).sum(-1, keepdim=True)
    distance_BV = (surprise_BV - entropy_B1).abs()
    ordered, order = distance_BV.sort(dim=-1)
    last_B1 = (p_BV.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = ordered.gather(-1, last_B1.clamp(max=p_BV.shape[-1] - 1))
    p_BV = p_BV.masked_fill(distance_BV > farthest, 0.0)
    return p_BV / p_BV.sum(-1, keepdim=True)


def drawn(p_BV: Float[Tensor, "B V"], generator: torch.Generator) -> Int[Tensor, " B"]:
    """On the CPU, so that a seed means the same on every device."""
    return torch.multinomial(p_BV.cpu(), 1, generator=generator)[:, 0].to(p_BV.device)


def one_of(p_V: Float[Tensor, " V"], generator: torch.Generator) -> int:
    return int(torch.multinomial(p_V, 1, generator=generator))


def seen_tokens(texts: Sequence[Ids], vocab_size: int, device: torch.device) -> Bool[Tensor, "B V"]:
    seen_BV = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in zip(seen_BV, texts, strict=True):
        row[ids] = True
    return seen_BV


# --- texts over one cache


def largest_context(decoder: Decoder, asked: int | None) -> int:
    """Raises ValueError where more is asked than the position embedding has."""
    limit = decoder.pos.max_len
    if asked is not None:
        if limit is not None and asked > limit:
            raise ValueError(
                f"context={asked}: this model has a table of {limit} positions, so at most {limit}"
            )
        return asked
    mixers = [block.attn for block in decoder.layers]
    rolls = all(isinstance(mixer, PatternedAttention) and mixer.pattern.reach is not None for mixer in mixers)
    return sys.maxsize if rolls and limit is None else decoder.seq_len


class Texts:
    """Texts that grow side by side over one cache.

    The model sees at most `context` tokens of each: one that gets longer goes on from its last half, as a longer
    prompt goes on from its last `context`.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Ids],
        *,
        context: int,
        room: int,
        precision: str,
        rewinds: bool = False,
    ):
        self.decoder, self.context, self.room = decoder, context, room
        self.precision, self.rewinds = precision, rewinds
        self.ids = [ids[-context:] for ids in prompts]
        self.cache: KVCache
        self.device = decoder.embed.tokens.weight.device

    def begin(self) -> Float[Tensor, "B 1 V"]:
        """Logits of what follows each text, read anew."""
        lengths = [len(ids) for ids in self.ids]
        self.longest = max(lengths)
        self.cache = self.decoder.new_cache(min(self.context, self.longest + self.room), self.precision)
        if self.rewinds:
            self.cache.keep_all()
        padded = [ids + [0] * (self.longest - len(ids)) for ids in self.ids]
        tokens_BT = torch.tensor(padded, device=self.device)
        if min(lengths) == self.longest:
            return self.decoder.forward(tokens_BT, self.cache)[:, -1:]
        lengths_B = torch.tensor(lengths, device=self.device)
        logits_BTV = self.decoder.forward(tokens_BT, self.cache, lengths_B=lengths_B)
        return logits_BTV[torch.arange(len(lengths)), lengths_B - 1][:, None]

    def read(self, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "B _ V"]:
        """Logits of what follows each of these tokens; of the last alone where a full context makes a new start."""
        for ids, new in zip(self.ids, tokens_BT.tolist(), strict=True):
            ids += new
        self.longest += tokens_BT.shape[1]
        if self.longest <= self.context:
            # `forward` and not the call: a compiled call would be compiled anew for every length.
            return self.decoder.forward(tokens_BT, self.cache)
        half = max(1, self.context // 2)
        self.ids = [ids[-half:] if len(ids) > self.context else ids for ids in self.ids]
        return self.begin()

    def forget(self, n: int) -> None:
        """Take the last `n` tokens of every text back."""
        if n:
            self.ids = [ids[:-n] for ids in self.ids]
            self.longest -= n
            self.cache.rewind(n)

    def select(self, rows: list[int]) -> None:
        """Go on with these, in this order; a text may be taken twice."""
        if rows != list(range(len(self.ids))):
            self.ids = [list(self.ids[row]) for row in rows]
            self.longest = max(len(ids) for ids in self.ids)
            self.cache.select(torch.tensor(rows, device=self.device))


@torch.no_grad()
def laid_out_for_decoding(decoder: Decoder) -> Decoder:
    """The same model; its matrices stand in memory as decoding reads them fastest on a CPU.

    There MKL's product with one vector, or a few, is fastest along the longer side of the matrix: a matrix of more rows
    than columns is stored column by column, its values, name and shape as before. Where oneDNN multiplies, linear
    layers take its own layout, which serves products alone: such a model is neither trained nor saved.
    """
    if ONEDNN:
        for module in decoder.modules():
            if type(module) is Linear and module.weight.is_cpu and module.weight.dtype == torch.float32:
                module.weight = nn.Parameter(packed(module.weight), requires_grad=False)
        return decoder
    for parameter in decoder.parameters():
        if parameter.is_cpu and parameter.ndim == 2 and parameter.shape[0] >= parameter.shape[1]:
            parameter.data = parameter.data.T.contiguous().T
    return decoder


# --- ways to go on


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Ids],
    *,
    settings: Settings,
    generator: torch.Generator,
    done: set[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """At each of `n_tokens` steps, (prompt, id of its next token) for all of them; those put into `done` drop out."""
    context = largest_context(decoder, settings.context)
    texts = Texts(decoder, prompts, context=context, room=settings.n_tokens, precision=settings.precision)
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


@torch.inference_mode()
def speculate(
    decoder: Decoder, draft: Decoder, prompt: Ids, *, settings: Settings, generator: torch.Generator
) -> Iterator[int]:
    """As `generate` for one prompt, in distribution and, at temperature 0, token for token, in fewer passes.

    The draft draws some tokens x ~ q, the model reads them all at once and keeps each with probability min(1, p/q);
    in place of the first that it does not keep it draws from max(0, p - q), normalised. Leviathan et al. 2022,
    arXiv:2211.17192, algorithm 1.
    """
    check_draft(decoder, draft)
    context, small = largest_context(decoder, settings.context), largest_context(draft, None)
    n_tokens, precision = settings.n_tokens, settings.precision
    texts = Texts(decoder, [prompt], context=context, room=n_tokens, precision=precision, rewinds=True)
    drafts = Texts(draft, [prompt], context=small, room=n_tokens + 1, precision=precision, rewinds=True)
    written = list(prompt)

    def probabilities(logits_V: Tensor, following: Ids) -> Tensor:
        """Of the token after what is written and `following`."""
        seen = None
        if settings.repetition_penalty != 1:
            seen = seen_tokens([written + following], len(logits_V), logits_V.device)
        return settings.probabilities(logits_V[None], seen)[0].cpu()

    p_V = probabilities(texts.begin()[0, -1], [])
    draft_logits_V = drafts.begin()[0, -1]
    token, unread = one_of(p_V, generator), []
    yielded = 1
    yield token
    while yielded < n_tokens:
        written.append(token)
        unread.append(token)
        # A full context makes a new start after each token as without a draft, so that no proposal may cross it.
        n = min(settings.draft_tokens, n_tokens - yielded - 1, context - texts.longest - 1, small // 2)
        proposed, q = [], []
        for _ in range(n):
            draft_logits_V = drafts.read(torch.tensor([unread], device=drafts.device))[0, -1]
            q.append(probabilities(draft_logits_V, proposed))
            proposed.append(one_of(q[-1], generator))
            unread = proposed[-1:]
        logits_TV = texts.read(torch.tensor([[token, *proposed]], device=texts.device))[0]
        kept = 0
        for i, x in enumerate(proposed):
            p_V = probabilities(logits_TV[i], proposed[:i])
            keeping = (p_V[x] / q[i][x]).clamp(max=1)
            if not one_of(torch.stack((1 - keeping, keeping)), generator):
                left = (p_V - q[i]).clamp(min=0)
                token = one_of(left if left.any() else p_V, generator)  # p and q may differ by rounding alone
                break
            kept += 1
        else:
            token = one_of(probabilities(logits_TV[-1], proposed), generator)
        texts.forget(len(proposed) - kept)
        if kept < len(proposed):  # the draft has not read its last proposal
            drafts.forget(len(proposed) - 1 - kept)
            unread = []
        written += proposed[:kept]
        yield from (*proposed[:kept], token)
        yielded += kept + 1


def check_draft(decoder: Decoder, draft: Decoder) -> None:
    sizes = [len(model.embed.tokens.weight) for model in (decoder, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft has {sizes[1]} tokens and the model {sizes[0]}: use a draft of the same tokenizer"
        )
    for model in (decoder, draft):
        model.new_cache(1).keep_all()


@dataclass
class Beam:
    """A text that ended, and its score."""

    score: float
    ids: Ids


@torch.inference_mode()
def beam_search(
    decoder: Decoder, prompts: Sequence[Ids], *, settings: Settings, end_of_text: int | None
) -> list[Ids]:
    """The best of the texts that end within `n_tokens`, for each prompt.

    Each step keeps the K = `beams` likeliest unfinished texts. Of the 2·K likeliest continuations those among the
    first K that end in `end_of_text`, or at the last step, are finished; the search ends when the likeliest text
    under way scores below the worst of K finished ones, as in `transformers` with early_stopping=False.
    """
    K, P = settings.beams, len(prompts)
    context = largest_context(decoder, settings.context)
    check_room(prompts, settings.n_tokens, context)
    texts = Texts(decoder, prompts, context=context, room=settings.n_tokens, precision=settings.precision)
    logits_BV = texts.begin()[:, -1].repeat_interleave(K, 0)
    texts.select([row for row in range(P) for _ in range(K)])
    V = logits_BV.shape[-1]
    running_PK = torch.full((P, K), -1e9)
    running_PK[:, 0] = 0  # the first tokens are all of one text
    written: list[list[Ids]] = [[[] for _ in range(K)] for _ in prompts]
    finished: list[list[Beam]] = [[] for _ in prompts]
    is_open = [True] * P
    for step in range(1, settings.n_tokens + 1):
        log_p_BV = logits_BV.float().log_softmax(-1)
        if settings.repetition_penalty != 1:
            log_p_BV = settings.penalised(log_p_BV, seen_tokens(texts.ids, V, texts.device))
        total = running_PK.to(texts.device)[:, :, None] + log_p_BV.view(P, K, V)
        scores, indices = (x.tolist() for x in total.flatten(1).topk(min(2 * K, K * V)))
        rows, tokens = [], []
        for p in range(P):
            going_on = []
            for rank, (score, index) in enumerate(zip(scores[p], indices[p], strict=True)):
                beam, token = divmod(index, V)
                if token == end_of_text or step == settings.n_tokens:
                    if rank < K and is_open[p]:
                        ids = written[p][beam] + ([] if token == end_of_text else [token])
                        finished[p].append(Beam(score / step**settings.length_penalty, ids))
                elif len(going_on) < K:
                    going_on.append((score, beam, token))
            finished[p] = sorted(finished[p], key=lambda beam: -beam.score)[:K]
            if not going_on:
                continue
            running_PK[p] = torch.tensor([score for score, _, _ in going_on])
            written[p] = [[*written[p][beam], token] for _, beam, token in going_on]
            rows += [p * K + beam for _, beam, _ in going_on]
            tokens += [token for _, _, token in going_on]
            best = going_on[0][0] / step**settings.length_penalty
            is_open[p] = is_open[p] and (len(finished[p]) < K or best > finished[p][-1].score)
        if step == settings.n_tokens or not any(is_open):
            break
        texts.select(rows)
        logits_BV = texts.read(torch.tensor(tokens, device=texts.device)[:, None])[:, -1]
    return [beams[0].ids for beams in finished]


def check_room(prompts: Sequence[Ids], n_tokens: int, context: int) -> None:
    longest = max(len(ids) for ids in prompts)
    if longest + n_tokens > context:
        raise ValueError(
            f"beams keep their whole text in the context of {context} tokens: after a prompt of {longest} there is "
            f"room for n_tokens={max(0, context - longest)}"
        )


# --- text


class Text:
    """A continuation as it grows: a piece is held back while it may be part of a character or of a stop string."""

    def __init__(self, codec: Codec, stop: Sequence[str]):
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
            return self.upto(text, min(ends))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        held = max((overlap(text[self.shown :], stop) for stop in self.stop), default=0)
        return self.upto(text, len(text) - held)

    def finish(self) -> str:
        """What was still held back."""
        if self.is_done:
            return ""
        self.is_done = True
        text = self.codec.decode(self.ids)
        return self.upto(text, len(text))

    def upto(self, text: str, end: int) -> str:
        piece = text[self.shown : end]
        self.shown = max(self.shown, end)
        return piece


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def continuations(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[str],
    *,
    settings: Settings,
    seed: int,
    draft: Decoder | None = None,
) -> Iterator[tuple[int, str | None]]:
    """(prompt, piece of the text that follows it), until end-of-text, a stop string or `n_tokens`; None when done.

    An empty prompt starts a new document. Raises ValueError, at once, for prompts that the model cannot take.
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
    return pieces(decoder, codec, ids, settings=settings, seed=seed, draft=draft)


def pieces(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[Ids],
    *,
    settings: Settings,
    seed: int,
    draft: Decoder | None,
) -> Iterator[tuple[int, str | None]]:
    models = [model for model in (decoder, draft) if model is not None]
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    texts = [Text(codec, settings.stop) for _ in prompts]
    try:
        for row, token in stream(decoder, codec, prompts, texts, settings=settings, seed=seed, draft=draft):
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


def stream(
    decoder: Decoder,
    codec: Codec,
    prompts: Sequence[Ids],
    texts: Sequence[Text],
    *,
    settings: Settings,
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


def continuation(decoder: Decoder, codec: Codec, prompt: str, *, seed: int, **settings) -> Iterator[str]:
    """The text that follows one prompt, piece by piece; of a prompt too long the end counts."""
    plain = Settings(**settings)
    ids = [codec.end_of_text, *codec.encode(prompt)][-largest_context(decoder, plain.context) :]
    for _, piece in pieces(decoder, codec, [ids], settings=plain, seed=seed, draft=None):
        if piece is not None:
            yield piece
