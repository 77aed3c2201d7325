"""How tokens exchange information: `attn=`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from scantling.model.cache import LayerCache
from scantling.model.pos import Rotation, ScoreBias


class CausalScores:
    """softmax(QKᵀ/√E + bias)·V over the keys up to each query; one object a forward pass, shared by its layers.

    Queries stand at positions `start … start+T-1`, keys at `0 … start+T-1`. `scaled_dot_product_attention` does
    the work (its flash or math kernel, PyTorch's choice). FlexAttention takes over on a GPU when there is a bias,
    where a dense mask would rule the flash kernel out.
    """

    def __init__(
        self, *, bias: ScoreBias | None, n_heads: int, start: int, length: int, device: torch.device
    ):
        self.bias, self.n_heads, self.start, self.length, self.device = bias, n_heads, start, length, device

    def attend(
        self,
        q_BHTE: Float[Tensor, "B H T E"],
        k_BKSE: Float[Tensor, "B K S E"],
        v_BKSE: Float[Tensor, "B K S E"],
        dropout: float,
    ) -> Float[Tensor, "B H T E"]:
        if self.bias is not None and q_BHTE.is_cuda and dropout == 0:
            return self.flex(q_BHTE, k_BKSE, v_BKSE, compiled_flex_attention())
        return self.dense(q_BHTE, k_BKSE, v_BKSE, dropout)

    def dense(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, dropout: float) -> Tensor:
        dtype, (*_, length, width) = q_BHTE.dtype, q_BHTE.shape
        if q_BHTE.is_cpu and dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported():
            # The CPU's flash kernel is slow in bfloat16 without AMX. Written out, attention takes half its time,
            # and up to here no more memory than a cast to float32, which serves longer contexts.
            if length <= 8 * width:
                return self.written_out(q_BHTE, k_BKSE, v_BKSE, dropout)
            q_BHTE, k_BKSE, v_BKSE = q_BHTE.float(), k_BKSE.float(), v_BKSE.float()
        elif q_BHTE.is_cpu and self.start + length <= 64:
            return self.written_out(q_BHTE, k_BKSE, v_BKSE, dropout)  # faster than flash up to here
        whole = self.bias is None and self.start == 0
        mask = None if whole else self.mask if self.bias is None else self.biased_mask.type_as(q_BHTE)
        with torch.autocast(q_BHTE.device.type, enabled=False):  # it would undo the cast above
            o_BHTE = nn.functional.scaled_dot_product_attention(
                q_BHTE,
                k_BKSE,
                v_BKSE,
                attn_mask=mask,
                is_causal=whole,
                dropout_p=dropout,
                enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
            )
        return o_BHTE.to(dtype)

    def written_out(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, dropout: float) -> Tensor:
        B, H, T, E = q_BHTE.shape
        groups = H // k_BKSE.shape[1]
        k_BHSE, v_BHSE = k_BKSE.repeat_interleave(groups, 1), v_BKSE.repeat_interleave(groups, 1)
        mask_BHTS = self.biased_mask.type_as(q_BHTE).expand(B, H, T, -1)
        with torch.autocast(q_BHTE.device.type, enabled=False):  # it would take the softmax in float32
            scores_NTS = torch.baddbmm(
                mask_BHTS.flatten(0, 1), q_BHTE.flatten(0, 1), k_BHSE.flatten(0, 1).mT, alpha=E**-0.5
            )
            weights_NTS = nn.functional.dropout(scores_NTS.softmax(-1), dropout)
            return torch.bmm(weights_NTS, v_BHSE.flatten(0, 1)).unflatten(0, (B, H))

    def flex(self, q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, kernel=flex_attention) -> Tensor:
        return kernel(
            q_BHTE,
            k_BKSE,
            v_BKSE,
            score_mod=self.flex_score,
            block_mask=self.block_mask,
            enable_gqa=q_BHTE.shape[1] != k_BKSE.shape[1],
        )

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Of queries [T, 1] and keys [1, S]."""
        keys = torch.arange(self.start + self.length, device=self.device)
        return keys[self.start :, None], keys[None, :]

    @cached_property
    def mask(self) -> Bool[Tensor, "T S"]:
        queries, keys = self.positions
        return keys <= queries

    @cached_property
    def biased_mask(self) -> Float[Tensor, "H T S"]:
        heads = torch.arange(self.n_heads, device=self.device)[:, None, None]
        bias = (
            torch.zeros(1, 1, 1, device=self.device)
            if self.bias is None
            else self.bias(heads, *self.positions)
        )
        return bias.masked_fill(~self.mask, -torch.inf)

    @property
    def flex_score(self):
        bias, start = self.bias, self.start
        if bias is None:
            return None
        return lambda score, b, h, t, s: score + bias(h, t + start, s)

    @cached_property
    def block_mask(self):
        start = self.start
        return create_block_mask(
            lambda b, h, t, s: s <= t + start,
            B=None,
            H=None,
            Q_LEN=self.length,
            KV_LEN=start + self.length,
            device=self.device,
        )


def compiled_flex_attention():
    """Flex attention is fast only when compiled; torch keeps the compiled code."""
    return torch.compile(flex_attention, dynamic=False)


class Mixer(nn.Module, ABC):
    """Base of every option: x_BTD -> x_BTD, each position from itself and those before it."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: CausalScores,
        cache: LayerCache | None,
    ) -> Float[Tensor, "B T D"]:
        """`rotate` turns queries and keys, `scores` attends, `cache` holds the keys and values of past tokens."""

    @abstractmethod
    def mixing_flops(self, context: float) -> float:
        """Forward FLOPs per token over `context` keys, beyond those of the part's linear layers."""


class Attention(Mixer):
    """out(softmax(QKᵀ/√E)·V), Vaswani et al. 2017, arXiv:1706.03762, §3.2; one class for three names.

    Every key/value head serves H/K query heads: K = H is multi-head attention (MHA), 1 < K < H grouped-query
    attention (GQA, Ainslie et al. 2023, arXiv:2305.13245), K = 1 multi-query attention (MQA, Shazeer 2019,
    arXiv:1911.02150). `bias` is that of the linear layers, `dropout` falls on the attention weights.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_head: int, *, n_kv_heads: int, bias: bool, dropout: float
    ):
        super().__init__()
        if not 1 <= n_kv_heads <= n_heads or n_heads % n_kv_heads:
            fits = [k for k in range(1, n_heads + 1) if n_heads % k == 0]
            raise ValueError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}: use one of {fits}")
        self.heads = [n_heads, n_kv_heads, n_kv_heads]
        self.d_head = d_head
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, sum(self.heads) * d_head, bias=bias)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=bias)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: CausalScores,
        cache: LayerCache | None,
    ) -> Float[Tensor, "B T D"]:
        qkv_BTNE = self.qkv(x_BTD).unflatten(-1, (sum(self.heads), self.d_head))
        q_BTHE, k_BTKE, v_BTKE = qkv_BTNE.split(self.heads, dim=2)
        q_BTHE, k_BTKE = rotate(q_BTHE), rotate(k_BTKE)
        if cache is not None:
            k_BTKE, v_BTKE = cache.append(k_BTKE, v_BTKE)
        o_BHTE = scores.attend(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            self.dropout if self.training else 0.0,
        )
        return self.out(o_BHTE.transpose(1, 2).flatten(2))

    def mixing_flops(self, context: float) -> float:
        """QKᵀ and weights·V: a multiplication and an addition for each of E channels, twice, for each head."""
        return 4 * self.heads[0] * self.d_head * context
