"""From the last hidden vector to scores of the next token, and to the loss: `head=`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model import cross_entropy
from scantling.model.checks import check_positive
from scantling.model.cross_entropy import (
    IGNORED,
    chunked_negative_log_likelihood,
    negative_log_likelihood,
    z_gradient,
)
from scantling.model.embed import Embedding
from scantling.model.linear import linear


class Head(nn.Module, ABC):
    """Base of every option."""

    takes_z_loss: ClassVar[bool] = False
    """Whether the loss is of one softmax over the vocabulary, so that `z_loss` may be other than 0."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.z_loss = 0.0
        """Weight of ln²Z in the gradient (`cross_entropy.z_gradient`); no returned loss contains it."""

    @abstractmethod
    def logits(self, x_BTD: Float[Tensor, "B T D"], embed: Embedding) -> Float[Tensor, "B T V"]:
        """Scores of every vocabulary entry as the next token; their softmax is the model's distribution."""

    def nats(
        self, x_BTD: Float[Tensor, "B T D"], embed: Embedding, targets_BT: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """Sum of -log p(target) over targets that are not ignored."""
        logits_BTV = self.logits(x_BTD, embed)
        nats = negative_log_likelihood(logits_BTV, targets_BT)
        if self.z_loss and torch.is_grad_enabled():
            nats = nats + z_gradient(logits_BTV, targets_BT, self.z_loss)
        return nats

    def rescale(self, factor: float) -> None:
        """Logits times `factor`. Raises ValueError for a head that has more than one softmax."""
        raise ValueError("param=mup is not defined for this head: use head=full")

    @abstractmethod
    def flops(self, embed: Embedding) -> int:
        """Forward FLOPs per token."""


class Full(Head):
    """cap(scale · (x·Wᵀ)), a softmax over the whole vocabulary; cap(z) = c·tanh(z/c) with `softcap` c.

    `softcap`: Gemma 2, arXiv:2408.00118, §2. `scale` null is 1; Cohere's Command R and IBM's Granite
    have others. The loss of many tokens over a large vocabulary is computed in chunks, and the logits
    are never whole in memory.
    """

    takes_z_loss = True

    def __init__(self, vocab_size: int, d_model: int, *, scale: float | None, softcap: float | None):
        super().__init__(vocab_size, d_model)
        check_positive("head.softcap", softcap, or_null=True)
        self.scale, self.softcap = scale, softcap

    def logits(self, x_BTD: Float[Tensor, "B T D"], embed: Embedding) -> Float[Tensor, "B T V"]:
        return self.shaped(linear(embed.narrowed(x_BTD), embed.output, embed.output_bias))

    def nats(
        self, x_BTD: Float[Tensor, "B T D"], embed: Embedding, targets_BT: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        if targets_BT.numel() * len(embed.output) <= cross_entropy.chunk(x_BTD.is_cuda):
            return super().nats(x_BTD, embed, targets_BT)
        return chunked_negative_log_likelihood(
            embed.narrowed(x_BTD).flatten(0, 1),
            embed.output,
            embed.output_bias,
            targets_BT.flatten(),
            scale=1.0 if self.scale is None else self.scale,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )

    def rescale(self, factor: float) -> None:
        self.scale = factor * (1.0 if self.scale is None else self.scale)

    def shaped(self, logits: Tensor) -> Tensor:
        """Scaled, then capped logits."""
        if self.scale is not None:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def flops(self, embed: Embedding) -> int:
        narrowing = sum(p.numel() for name, p in embed.named_parameters() if name.startswith("narrow."))
        return 2 * (embed.output.numel() + narrowing)


class Sampled(Full):
    """In training a softmax over the batch's targets and `n_samples` entries drawn without
    regard to context; else full.

    Entry v is drawn with q(v) = log(1 + 1/(v+1)) / log(V+1), which suits vocabularies ordered by frequency,
    as trained ones are. The target stands with its own logit; ln(n·q) is taken off those of drawn entries,
    so that the sum of exponentials is right on average, and a drawn entry that is the target itself is
    hidden. Loss and gradient are those of the full softmax as n grows. Bengio & Senécal 2003, §3; Jean et
    al. 2015, arXiv:1412.2007, §3.
    """

    takes_z_loss = False

    def __init__(
        self, vocab_size: int, d_model: int, *, scale: float | None, softcap: float | None, n_samples: int
    ):
        super().__init__(vocab_size, d_model, scale=scale, softcap=softcap)
        if not 0 < n_samples < vocab_size:
            raise ValueError(
                f"head.n_samples={n_samples} must be at least 1, and below the vocabulary's {vocab_size}"
            )
        self.vocab_size, self.n_samples = vocab_size, n_samples

    def log_expected(self, tokens: Tensor) -> Tensor:
        """ln(n·q) of each token."""
        q = torch.log1p(1 / (tokens.float() + 1)) / torch.log(torch.tensor(self.vocab_size + 1.0))
        return torch.log(self.n_samples * q)

    def nats(
        self, x_BTD: Float[Tensor, "B T D"], embed: Embedding, targets_BT: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        if not self.training:
            return super().nats(x_BTD, embed, targets_BT)
        valid = targets_BT != IGNORED
        x_ND, targets_N = embed.narrowed(x_BTD)[valid], targets_BT[valid]
        uniform_S = torch.rand(self.n_samples, device=x_ND.device)
        drawn_S = ((self.vocab_size + 1) ** uniform_S - 1).long().clamp(max=self.vocab_size - 1)
        bias = embed.output_bias
        of_targets_N = (x_ND * embed.output[targets_N]).sum(-1)
        of_drawn_NS = linear(x_ND, embed.output[drawn_S], None if bias is None else bias[drawn_S])
        if bias is not None:
            of_targets_N = of_targets_N + bias[targets_N]
        of_targets_N = self.shaped(of_targets_N).float()
        of_drawn_NS = self.shaped(of_drawn_NS).float() - self.log_expected(drawn_S)
        of_drawn_NS = of_drawn_NS.masked_fill(drawn_S == targets_N[:, None], -torch.inf)
        logits = torch.cat((of_targets_N[:, None], of_drawn_NS), -1)
        return negative_log_likelihood(logits, torch.zeros_like(targets_N))


class Adaptive(Head):
    """Clusters of ever rarer tokens with ever narrower matrices, each entered through one entry of the first.
    Grave et al. 2017, arXiv:1609.04309, §4; torch's `AdaptiveLogSoftmaxWithLoss`.

    `cutoffs` are shares of the vocabulary, which must be ordered by frequency, as trained ones are. The
    matrices are the head's own: with embed=tied the table serves the input alone.
    """

    def __init__(self, vocab_size: int, d_model: int, *, cutoffs: Sequence[float], narrower: float):
        super().__init__(vocab_size, d_model)
        check_positive("head.narrower", narrower)
        if d_model < narrower ** len(cutoffs):
            raise ValueError(
                f"head.narrower={narrower:g} leaves the last of {len(cutoffs)} clusters "
                f"no width of d_model={d_model}"
            )
        limits = [round(share * vocab_size) for share in cutoffs]
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(d_model, vocab_size, limits, div_value=narrower)

    def logits(self, x_BTD: Float[Tensor, "B T D"], embed: Embedding) -> Float[Tensor, "B T V"]:
        return self.softmax.log_prob(x_BTD.flatten(0, 1)).view(*x_BTD.shape[:2], -1)

    def nats(
        self, x_BTD: Float[Tensor, "B T D"], embed: Embedding, targets_BT: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        valid = targets_BT != IGNORED
        with torch.autocast(x_BTD.device.type, enabled=False):  # torch's clusters want one precision
            return -self.softmax(x_BTD[valid].float(), targets_BT[valid]).output.sum()

    def flops(self, embed: Embedding) -> int:
        """As if every cluster were entered, which a rare token alone does."""
        return 2 * sum(p.numel() for p in self.parameters() if p.ndim == 2)
