"""Which token follows: filters of the next token's distribution, and drawing from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from scantling.model.cache import BUFFERS
from scantling.model.checks import check_whole

Ids = list[int]


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is continued. Raises ValueError for what cannot be.

    Filters apply in this order, as in `transformers`, each to what the one before it left.
    """

    n_tokens: int
    temperature: float
    """Divides the logits; at 0 the likeliest token is always taken."""
    top_k: int | None
    """Keep the k likeliest tokens. Fan et al. 2018, arXiv:1805.04833."""
    top_p: float | None
    """Keep the fewest likeliest tokens that together hold at least p.

    Holtzman et al. 2020, arXiv:1904.09751.
    """
    min_p: float | None = None
    """Keep tokens at least p times as likely as the likeliest. Nguyen et al. 2024, arXiv:2407.01082."""
    typical_p: float | None = None
    """Keep the tokens whose -log p is nearest to the entropy, until they hold p.

    Meister et al. 2022, arXiv:2202.00666.
    """
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens seen before, and multiplies negative ones.

    Keskar et al. 2019, arXiv:1909.05858, §4.1.
    """
    beams: int = 1
    """More than one: the likeliest text that a beam search finds; nothing is drawn and no filter applies."""
    length_penalty: float = 1.0
    """A finished beam's score is log p / tokens^length_penalty: above 0 favours long texts.

    Wu et al. 2016, arXiv:1609.08144.
    """
    draft_tokens: int = 4
    """How many tokens a draft model proposes at once."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these."""
    precision: str = "full"
    """Precision of cached keys and values."""
    context: int | None = None
    """Tokens that the model sees at most.

    None: its `seq_len`, or no limit where every layer sees a window.
    """

    def __post_init__(self) -> None:
        whole = {"n_tokens": self.n_tokens, "beams": self.beams, "draft_tokens": self.draft_tokens}
        if self.top_k is not None:
            whole["top_k"] = self.top_k
        if self.context is not None:
            whole["context"] = self.context
        for name, value in whole.items():
            check_whole(name, value)
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

    def penalise(self, logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"] | None) -> Tensor:
        """Logits with `repetition_penalty` on the tokens in `seen_BV`; None: as they are."""
        if seen_BV is None:
            return logits_BV
        penalty = self.repetition_penalty
        punished = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        return torch.where(seen_BV, punished, logits_BV)

    def probabilities(
        self, logits_BV: Float[Tensor, "B V"], seen_BV: Bool[Tensor, "B V"] | None = None
    ) -> Float[Tensor, "B V"]:
        """The distribution of the next token, penalty, temperature and filters applied."""
        logits_BV = self.penalise(logits_BV.float(), seen_BV)
        if self.temperature == 0:
            return torch.nn.functional.one_hot(logits_BV.argmax(-1), logits_BV.shape[-1]).float()
        # Relative to the largest logit, at a temperature above 0 in float32: so one logit stays finite.
        above_zero = max(self.temperature, torch.finfo(logits_BV.dtype).tiny)
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / above_zero
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
            p_BV = keep_typical(p_BV, self.typical_p)
        return p_BV

    def draw(
        self, logits_BV: Tensor, seen_BV: Tensor | None, generator: torch.Generator
    ) -> Int[Tensor, " B"]:
        """Ids of the next tokens, at temperature 0 the likeliest."""
        if self.temperature == 0:
            return self.penalise(logits_BV, seen_BV).argmax(-1)
        return draw_tokens(self.probabilities(logits_BV, seen_BV), generator)


def keep_typical(p_BV: Float[Tensor, "B V"], mass: float) -> Float[Tensor, "B V"]:
    """Keep the tokens whose -log p is nearest to the entropy until they hold `mass`; the rest becomes 0.

    Meister et al. 2022, arXiv:2202.00666.
    """
    surprise_BV = -p_BV.log()
    entropy_B1 = torch.special.entr(p_BV).sum(-1, keepdim=True)
    distance_BV = (surprise_BV - entropy_B1).abs()
    ordered, order = distance_BV.sort(dim=-1)
    last_B1 = (p_BV.gather(-1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    farthest = ordered.gather(-1, last_B1.clamp(max=p_BV.shape[-1] - 1))
    p_BV = p_BV.masked_fill(distance_BV > farthest, 0.0)
    return p_BV / p_BV.sum(-1, keepdim=True)


def draw_tokens(p_BV: Float[Tensor, "B V"], generator: torch.Generator) -> Int[Tensor, " B"]:
    """An id from each row; on the CPU, so that a seed means the same on every device."""
    return torch.multinomial(p_BV.cpu(), 1, generator=generator)[:, 0].to(p_BV.device)


def draw_one(p_V: Float[Tensor, " V"], generator: torch.Generator) -> int:
    """An index drawn with these probabilities, which need not sum to 1."""
    return int(torch.multinomial(p_V, 1, generator=generator))


def seen_tokens(texts: Sequence[Ids], vocab_size: int, device: torch.device) -> Bool[Tensor, "B V"]:
    """Which tokens occur in each text."""
    seen_BV = torch.zeros(len(texts), vocab_size, dtype=torch.bool, device=device)
    for row, ids in zip(seen_BV, texts, strict=True):
        row[ids] = True
    return seen_BV
