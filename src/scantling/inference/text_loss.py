"""The loss of text: nats per token, bits per byte, perplexity."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scantling.model.cross_entropy import IGNORED


class TextLoss:
    """Loss in nats per token and bits per byte over any number of batches.

    Bits per byte = nats / ln 2 / bytes of UTF-8 text the targets stand for; end-of-text stands for none, so
    that a model pays for document boundaries too. It compares models whatever their tokenizers.
    """

    def __init__(self, token_bytes: np.ndarray) -> None:
        self.token_bytes = torch.as_tensor(token_bytes, dtype=torch.float64)
        self.nats = self.n_tokens = self.n_bytes = 0.0

    def add(self, nats: Tensor, targets_BT: Tensor) -> None:
        """Count a batch: `nats`, its summed loss, and its targets, of which `IGNORED` ones do not count."""
        valid = targets_BT[targets_BT != IGNORED].cpu()
        self.nats += nats.item()
        self.n_tokens += valid.numel()
        self.n_bytes += self.token_bytes[valid].sum().item()

    def results(self) -> dict[str, float]:
        """`loss` in nats per token, `bpb` in bits per byte, `perplexity` = exp(loss)."""
        loss = self.nats / self.n_tokens
        return {
            "loss": loss,
            "bpb": self.nats / math.log(2) / self.n_bytes,
            "perplexity": math.exp(min(loss, 700.0)),
        }
