"""Tokens from a decoder: prefill, decode, beams, drafts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.inference.sampling import Ids, Settings, one_of, seen_tokens
from scantling.model.attn import PatternedAttention
from scantling.model.cache import KVCache
from scantling.model.decoder import Decoder
from scantling.model.embed import Embedding
from scantling.model.ffn import GatedFeedForward
from scantling.model.head import Full
from scantling.model.linear import FEW, Linear, goes_to_onednn, linear, packed

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


class PackedHead(Full):
    """A full head that multiplies by a copy of the output matrix, where that is the embedding's table and stays one."""

    def __init__(self, head: Full, packed_output: Tensor):
        nn.Module.__init__(self)
        self.scale, self.softcap, self.packed_output = head.scale, head.softcap, packed_output

    def logits(self, x_BTD: Float[Tensor, "B T D"], embed: Embedding) -> Float[Tensor, "B T V"]:
        return self.shaped(linear(embed.narrowed(x_BTD), self.packed_output, embed.output_bias))


class JoinedGates(nn.Module):
    """A gated feed-forward that multiplies by both of its first matrices at once."""

    def __init__(self, ffn: GatedFeedForward):
        super().__init__()
        self.activation, self.out = ffn.activation, ffn.out
        self.gate_up = joined(ffn.gate, ffn.up)

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        gate, up = self.gate_up(x_BTD).chunk(2, -1)
        return self.out(self.activation(gate) * up)


def joined(first: Linear, second: Linear) -> Linear:
    """Both layers' outputs side by side."""
    with torch.device("meta"):
        both = Linear(first.in_features, 2 * first.out_features, bias=first.bias is not None)
    for name, _ in list(both.named_parameters()):
        values = torch.cat((getattr(first, name), getattr(second, name)))
        setattr(both, name, nn.Parameter(values, requires_grad=False))
    return both


@torch.no_grad()
def laid_out_for_decoding(decoder: Decoder, rows: int) -> Decoder:
    """The same model for decoding so many texts at once, and for that alone: it is neither trained nor saved.

    Gates are joined. On a CPU matrices stand in memory as they are read fastest: MKL's product with one vector, or a
    few, is fastest along the longer side of the matrix, so that one of more rows than columns is stored column by column,
    its values and shape as before. Where oneDNN multiplies, more than a few texts take its own layout of linear layers.
    """
    for module in list(decoder.modules()):
        for name, part in module.named_children():
            if type(part) is GatedFeedForward:
                setattr(module, name, JoinedGates(part))
    if goes_to_onednn():
        if rows > FEW // 2:
            pack(decoder)
        return decoder
    for parameter in decoder.parameters():
        if parameter.is_cpu and parameter.ndim == 2 and parameter.shape[0] >= parameter.shape[1]:
            parameter.data = parameter.data.T.contiguous().T
    return decoder


def pack(decoder: Decoder) -> None:
    for module in decoder.modules():
        if type(module) is Linear and module.weight.is_cpu and module.weight.dtype == torch.float32:
            module.weight = nn.Parameter(packed(module.weight), requires_grad=False)
    output = decoder.embed.output
    if (
        type(decoder.head) is Full
        and output.is_cpu
        and output.dtype == torch.float32
        and not output.is_mkldnn
    ):
        decoder.head = PackedHead(decoder.head, packed(output))


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
