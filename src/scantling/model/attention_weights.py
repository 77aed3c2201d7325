"""The softmax weights of a forward pass: which token attends to which."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scantling.model.attn import PatternedAttention
from scantling.model.cache import Keys
from scantling.model.decoder import Decoder
from scantling.model.scores import Scores


class Watched(Scores):
    """Scores that add the weights of every call to `seen`, by the formula with the unit matrix for values."""

    def __init__(self, scores: Scores, seen: list[Tensor]):
        super().__init__(bias=scores.bias, n_heads=scores.n_heads, placement=scores.placement)
        self.seen = seen

    def attend(
        self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, *, keys: Keys | None, **settings: Any
    ) -> Tensor:
        B, K, S, _ = k_BKSE.shape
        unit_BKSS = torch.eye(S, dtype=q_BHTE.dtype, device=q_BHTE.device).expand(B, K, S, S)
        mask = self.mask(keys, settings["pattern"])
        self.seen.append(
            self.formula(q_BHTE, k_BKSE, unit_BKSS, mask, settings["scale"], settings["softcap"], dropout=0.0)
        )
        return super().attend(q_BHTE, k_BKSE, v_BKSE, keys=keys, **settings)


@torch.no_grad()
def attention_weights(decoder: Decoder, tokens_BT: Int[Tensor, "B T"]) -> Float[Tensor, "L B H T T"]:
    """Weights of every layer and head, without dropout; the weights of a query sum to one over its keys.

    Raises ValueError for a mixer that takes no softmax over keys.
    """
    mixers = [block.attn for block in decoder.layers]
    for mixer in mixers:
        if not isinstance(mixer, PatternedAttention):
            raise ValueError(
                f"{type(mixer).__name__} takes no softmax over keys: it has no attention weights"
            )
    seen: list[Tensor] = []

    def watch(_, arguments):
        x_BTD, rotate, scores, cache = arguments
        return x_BTD, rotate, Watched(scores, seen), cache

    hooks = [mixer.register_forward_pre_hook(watch) for mixer in dict.fromkeys(mixers)]
    try:
        decoder(tokens_BT)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)
