"""Text from a decoder: prefill, decode, sampling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scantling.model.decoder import Decoder


class Codec(Protocol):
    """What generation needs of a tokenizer."""

    end_of_text: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def filtered(
    logits_BV: Float[Tensor, "B V"], *, temperature: float, top_k: int | None, top_p: float | None
) -> Float[Tensor, "B V"]:
    """Probabilities to draw the next token from.

    Temperature divides the logits; `top_k` keeps the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833);
    `top_p` the fewest likeliest tokens that hold at least p together (Holtzman et al. 2020, arXiv:1904.09751).
    Temperature 0 puts all probability on the likeliest token.
    """
    logits_BV = logits_BV.float()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).float()
    logits_BV = logits_BV / temperature
    if top_k is not None:
        least = logits_BV.topk(min(top_k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
    p_BV = logits_BV.softmax(-1)
    if top_p is not None:
        ordered, order = p_BV.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        p_BV = p_BV.scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return p_BV / p_BV.sum(-1, keepdim=True)


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompt_T: Int[Tensor, " T"],
    *,
    n_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> Iterator[int]:
    """`n_tokens` ids that follow the prompt, one by one.

    The model sees at most `decoder.seq_len` tokens: a longer prompt keeps its end, and a full context goes on
    from its last half.
    """
    device = prompt_T.device
    seen = prompt_T[-decoder.seq_len :].tolist()
    cache, new = decoder.new_cache(decoder.seq_len), seen
    for _ in range(n_tokens):
        if cache.length + len(new) > decoder.seq_len:
            seen = new = seen[-max(1, decoder.seq_len // 2) :]
            cache = decoder.new_cache(decoder.seq_len)
        # `forward` and not the call: a compiled call would be compiled anew for every length.
        logits_BTV = decoder.forward(torch.tensor([new], device=device), cache)
        p_BV = filtered(logits_BTV[:, -1], temperature=temperature, top_k=top_k, top_p=top_p)
        token = int(torch.multinomial(p_BV.cpu(), 1, generator=generator))
        seen.append(token)
        new = [token]
        yield token


def continuation(
    decoder: Decoder,
    codec: Codec,
    prompt: str,
    *,
    n_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece, until end-of-text or `n_tokens`.

    An empty prompt starts a new document. A piece is held back while it ends inside a UTF-8 character.
    """
    was_training = decoder.training
    decoder.eval()
    device = decoder.embed.tokens.weight.device
    prompt_T = torch.tensor([codec.end_of_text, *codec.encode(prompt)], device=device)
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    shown = ""
    try:
        for token in generate(
            decoder,
            prompt_T,
            n_tokens=n_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        ):
            if token == codec.end_of_text:
                break
            ids.append(token)
            text = codec.decode(ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
    finally:
        decoder.train(was_training)
    if rest := codec.decode(ids)[len(shown) :]:
        yield rest
