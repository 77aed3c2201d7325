"""softmax(QKᵀ)·V: the kernels that compute it, and the masks and biases that go in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from scantling.model import processors
from scantling.model.cache import Keys, Placement
from scantling.model.kernels import choose_kernel
from scantling.model.pattern import Pattern
from scantling.model.pos import ScoreBias

RECOMPILATIONS = 256
"""Shapes and patterns for which code may be compiled; torch's own limit is 8."""


class Scores:
    """softmax(cap(scale·QKᵀ) + bias)·V over the keys that causality and the pattern show.

    cap(s) = c·tanh(s/c). Each forward pass has one object, which its layers share.
    `choose_kernel` says what computes it.
    """

    def __init__(self, *, bias: ScoreBias | None, n_heads: int, placement: Placement):
        self.bias, self.n_heads, self.placement = bias, n_heads, placement
        self.masks: dict[Pattern, Tensor] = {}
        self.block_masks: dict[Pattern, object] = {}

    def attend(
        self,
        q_BHTE: Float[Tensor, "B H T E"],
        k_BKSE: Float[Tensor, "B K S E"],
        v_BKSE: Float[Tensor, "B K S C"],
        *,
        keys: Keys | None,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        dropout: float,
    ) -> Float[Tensor, "B H T C"]:
        """`keys` says where cached keys stand; None: the keys are those of the queries' own positions."""
        dtype, device = q_BHTE.dtype, q_BHTE.device.type
        plain = (
            self.bias is None and softcap is None and pattern.is_full and self.placement.documents_BT is None
        )
        kernel = choose_kernel(
            q_BHTE.shape,
            k_BKSE.shape,
            dtype,
            device,
            plain=plain,
            softcap=softcap,
            cached=keys is not None,
            dropout=dropout,
            processor=processors.HERE,
        )
        if kernel == "flex":
            return self.flex(q_BHTE, k_BKSE, v_BKSE, pattern, scale, softcap, compiled_flex_attention())
        all_seen = self.bias is None and keys is not None and keys.all_seen
        if kernel == "formula":
            mask = None if all_seen else self.mask(keys, pattern)
            return self.formula(q_BHTE, k_BKSE, v_BKSE, mask, scale, softcap, dropout)
        if kernel == "sdpa in float32":
            q_BHTE, k_BKSE, v_BKSE = q_BHTE.float(), k_BKSE.float(), v_BKSE.float()
        causal = plain and keys is None  # the kernel's own mask serves
        mask = None if all_seen or causal else as_type(self.mask(keys, pattern), q_BHTE)
        return sdpa(q_BHTE, k_BKSE, v_BKSE, mask, causal, scale, dropout).to(dtype)

    def formula(
        self,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSE: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        """Written out; the queries of one key/value head stand in one matrix of G·T rows."""
        (B, H, T, _), (_, K, S, _) = q_BHTE.shape, k_BKSE.shape
        groups = H // K
        q = q_BHTE.reshape(B * K, groups * T, -1)
        k, v = k_BKSE.reshape(B * K, S, -1), v_BKSE.reshape(B * K, S, -1)
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
            if mask.shape[:2] == (1, 1) and groups == 1:  # one for all, of which no copies need be made
                mask = mask.type_as(q).view(1, T, S).expand(B * K, T, S)
            else:
                mask = mask.type_as(q).expand(B, H, T, S).reshape(B * K, groups * T, S)
        with outside_of_autocast(q.device.type):  # it would take the softmax in float32
            if softcap is None and mask is not None:
                scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
            else:
                scores = torch.bmm(q * scale, k.mT)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                scores = scores if mask is None else scores + mask
            weights = nn.functional.dropout(scores.softmax(-1), dropout)
            return torch.bmm(weights, v).reshape(B, H, T, -1)

    def mask(self, keys: Keys | None, pattern: Pattern) -> Tensor:
        """What may be seen, or with a bias what is added, [B or 1, H or 1, T, S].

        Layers of one pattern share it.
        """
        if pattern not in self.masks:
            query = self.placement.positions_BT[:, None, :, None]
            key = (self.placement.positions_BT if keys is None else keys.positions())[:, None, None, :]
            seen = (key >= 0) & (key <= query) & pattern.sees(query, key)
            if (of := self.placement.documents_BT) is not None:
                seen = seen & (of[:, None, :, None] == of[:, None, None, :])
            if self.bias is None:
                self.masks[pattern] = seen
            else:
                head = torch.arange(self.n_heads, device=query.device)[:, None, None]
                self.masks[pattern] = torch.where(seen, self.bias(head, query, key), -torch.inf)
        return self.masks[pattern]

    def flex(
        self,
        q_BHTE: Tensor,
        k_BKSE: Tensor,
        v_BKSE: Tensor,
        pattern: Pattern,
        scale: float,
        softcap: float | None,
        kernel=flex_attention,
    ) -> Tensor:
        """FlexAttention over whole sequences: the pattern makes a block mask, cap and bias change scores.

        `kernel`: FlexAttention itself, or compiled.
        """
        if pattern not in self.block_masks:
            of = self.placement.documents_BT
            self.block_masks[pattern] = create_block_mask(
                (lambda b, h, t, s: (s <= t) & pattern.sees(t, s))
                if of is None
                else (lambda b, h, t, s: (s <= t) & pattern.sees(t, s) & (of[b, t] == of[b, s])),
                B=None if of is None else len(of),
                H=None,
                Q_LEN=q_BHTE.shape[2],
                KV_LEN=k_BKSE.shape[2],
                device=q_BHTE.device,
            )
        bias = self.bias

        def score(score, b, h, t, s):
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score if bias is None else score + bias(h, t, s)

        return kernel(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            score_mod=None if bias is None and softcap is None else score,
            block_mask=self.block_masks[pattern],
            scale=scale,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )


def sdpa(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`, in the precision of its inputs also under autocast."""
    groups = q_BHTE.shape[1] // k_BKSE.shape[1]
    if groups > 1 and q_BHTE.is_cuda and (mask is not None or q_BHTE.dtype == torch.float32):
        # Of a GPU's kernels only flash shares heads of keys, and it takes neither masks nor float32.
        k_BKSE, v_BKSE = (t.repeat_interleave(groups, dim=1) for t in (k_BKSE, v_BKSE))
    with outside_of_autocast(q_BHTE.device.type):  # it would undo a cast to float32
        return nn.functional.scaled_dot_product_attention(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask,
            is_causal=causal,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )


def outside_of_autocast(device: str) -> AbstractContextManager[object]:
    """A context without autocast; none where autocast is off, as entering one takes 15 µs a layer."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def as_type(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of numbers in the type that the kernel adds it to; one of booleans as it is."""
    return mask if mask.dtype == torch.bool else mask.type_as(like)


@cache
def compiled_flex_attention():
    """FlexAttention, compiled once: only so it is fast.

    Past torch's limit of compilations it would silently form all scores, hence a higher limit.
    """
    torch._dynamo.config.recompile_limit = RECOMPILATIONS
    return torch.compile(flex_attention, dynamic=False)
