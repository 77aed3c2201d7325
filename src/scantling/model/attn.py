"""How tokens exchange information: `attn=`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.cache import Buffer, LayerCache
from scantling.model.checks import check_positive, check_share, check_whole
from scantling.model.linear import Linear
from scantling.model.norm import NormFactory
from scantling.model.pattern import Pattern
from scantling.model.pos import Rotation, unrotated
from scantling.model.scores import Scores

QKNorm = Callable[[int, int], nn.Module]
"""(heads, d_head) -> a norm of queries or keys [B, T, heads, E]."""


class Mixer(nn.Module, ABC):
    """Base of every option: x_BTD -> x_BTD, each position from itself and those before it."""

    takes_bias: ClassVar[bool] = True
    """Whether a position may add to its scores."""
    d_rotated: int
    """Width of the head vectors that a position rotates."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: Scores,
        cache: Any,
    ) -> Float[Tensor, "B T D"]:
        """`rotate` turns queries and keys, `scores` attends, `cache` holds what is kept of past tokens."""

    def rescale(self, factor: float) -> None:
        """Scores times `factor`. Raises ValueError for a mixer whose scores are not a scale times q·k."""
        raise ValueError("param=mup is not defined for this attention: use attn=mha, gqa or mqa")

    @abstractmethod
    def mixing_flops(self, keys: float) -> float:
        """Forward FLOPs per token that sees `keys` keys, beyond those of the part's linear layers."""

    @abstractmethod
    def mean_keys(self, seq_len: int) -> float:
        """Keys that a token of a sequence sees on average, itself among them."""

    @abstractmethod
    def cached_numbers(self, context: int) -> int:
        """Numbers kept of `context` past tokens, for one sequence."""

    def cached_vectors(self, context: int) -> int:
        """Vectors that these numbers form, each with its own scale in a quantised cache.

        0: the state stays in float32.
        """
        return 0

    @abstractmethod
    def new_cache(self, max_len: int, buffer: type[Buffer]) -> Any:
        """Room for at most `max_len` past tokens, with `select` and `nbytes` like `cache.LayerCache`."""


class HeadSizes(NamedTuple):
    """Numbers of heads and their widths, by which attention over queries, keys and values is computed."""

    n_heads: int
    n_kv_heads: int
    width: int
    value_width: int


class PatternedAttention(Mixer):
    """Base of the options that attend by a softmax over the keys of a pattern."""

    def __init__(
        self, layer: int, *, pattern: Callable[[int], Pattern], softcap: float | None, dropout: float
    ):
        super().__init__()
        check_positive("attn.softcap", softcap, or_null=True)
        check_share("attn.dropout", dropout)
        self.pattern, self.softcap, self.dropout = pattern(layer), softcap, dropout

    @property
    @abstractmethod
    def head_sizes(self) -> HeadSizes:
        """In training; over cached keys they may be others."""

    @property
    @abstractmethod
    def cached_widths(self) -> int:
        """Numbers kept of one token."""

    @property
    @abstractmethod
    def cached_heads(self) -> int:
        """Vectors that the numbers of one token form."""

    def mean_keys(self, seq_len: int) -> float:
        return self.pattern.mean_keys(seq_len)

    def cached_numbers(self, context: int) -> int:
        return self.cached_widths * self.cached_tokens(context)

    def cached_vectors(self, context: int) -> int:
        return self.cached_heads * self.cached_tokens(context)

    def cached_tokens(self, context: int) -> int:
        """Tokens kept of `context`: all, or the first and the last ones that the pattern still reaches."""
        reach = context if self.pattern.reach is None else self.pattern.n_first + self.pattern.reach
        return min(context, reach)

    def new_cache(self, max_len: int, buffer: type[Buffer]) -> LayerCache:
        return LayerCache(max_len, self.pattern, buffer)


class Attention(PatternedAttention):
    """out(softmax(QKᵀ·scale)·V). Vaswani et al. 2017, arXiv:1706.03762, §3.2; one class for three names.

    Every key/value head serves H/K query heads: K = H is multi-head attention (MHA), 1 < K < H grouped-query
    attention (GQA, Ainslie et al. 2023, arXiv:2305.13245), K = 1 multi-query attention (MQA, Shazeer 2019,
    arXiv:1911.02150). `scale` null is 1/√E. `qk_norm` normalises queries and keys before they are rotated,
    `softcap` c bounds scores by c·tanh(s/c) (Gemma 2), `dropout` falls on the attention weights, `clip_qkv`
    bounds the entries of queries, keys and values (OLMo, MPT).
    """

    q_bias: nn.Parameter | None
    k_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        layer: int,
        *,
        n_kv_heads: int,
        q_bias: bool,
        k_bias: bool,
        v_bias: bool,
        out_bias: bool,
        qk_norm: QKNorm,
        clip_qkv: float | None,
        scale: float | None,
        softcap: float | None,
        pattern: Callable[[int], Pattern],
        dropout: float,
    ):
        super().__init__(layer, pattern=pattern, softcap=softcap, dropout=dropout)
        if not 1 <= n_kv_heads <= n_heads or n_heads % n_kv_heads:
            fits = [k for k in range(1, n_heads + 1) if n_heads % k == 0]
            raise ValueError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}: use one of {fits}")
        check_positive("attn.clip_qkv", clip_qkv, or_null=True)
        self.heads = [n_heads, n_kv_heads, n_kv_heads]
        self.d_head = self.d_rotated = d_head
        self.scale, self.clip_qkv = d_head**-0.5 if scale is None else scale, clip_qkv
        self.qkv = Linear(d_model, sum(self.heads) * d_head, bias=False)
        for name, wanted, heads in zip("qkv", (q_bias, k_bias, v_bias), self.heads, strict=True):
            bias = nn.Parameter(torch.zeros(heads * d_head)) if wanted else None
            self.register_parameter(f"{name}_bias", bias)
        self.q_norm, self.k_norm = qk_norm(n_heads, d_head), qk_norm(n_kv_heads, d_head)
        self.out = Linear(n_heads * d_head, d_model, bias=out_bias)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: Scores,
        cache: LayerCache | None,
    ) -> Float[Tensor, "B T D"]:
        qkv = self.qkv(x_BTD)
        if (bias := self.bias()) is not None:
            qkv = qkv + bias
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        qkv_BTNE = qkv.unflatten(-1, (sum(self.heads), self.d_head))
        n_heads, n_kv_heads, _ = self.heads
        if (
            isinstance(self.q_norm, NoQKNorm) and rotate is not unrotated
        ):  # then queries and keys turn together
            qk_BTNE, v_BTKE = qkv_BTNE.split([n_heads + n_kv_heads, n_kv_heads], dim=2)
            q_BTHE, k_BTKE = rotate(qk_BTNE).split([n_heads, n_kv_heads], dim=2)
        else:
            q_BTHE, k_BTKE, v_BTKE = qkv_BTNE.split(self.heads, dim=2)
            q_BTHE, k_BTKE = rotate(self.q_norm(q_BTHE)), rotate(self.k_norm(k_BTKE))
        keys = None
        if cache is not None:
            k_BTKE, v_BTKE, keys = cache.append(k_BTKE, v_BTKE, scores.placement)
        o_BHTE = scores.attend(
            q_BTHE.transpose(1, 2),
            k_BTKE.transpose(1, 2),
            v_BTKE.transpose(1, 2),
            keys=keys,
            pattern=self.pattern,
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.out(o_BHTE.transpose(1, 2).flatten(2))

    def rescale(self, factor: float) -> None:
        self.scale *= factor

    def bias(self) -> Tensor | None:
        """The biases of q, k and v side by side; zero where one of them has none. None: no layer has one."""
        biases = (self.q_bias, self.k_bias, self.v_bias)
        if all(bias is None for bias in biases):
            return None
        widths = (heads * self.d_head for heads in self.heads)
        none = self.qkv.weight.new_zeros
        return torch.cat([none(w) if b is None else b for b, w in zip(biases, widths, strict=True)])

    @property
    def head_sizes(self) -> HeadSizes:
        return HeadSizes(self.heads[0], self.heads[1], self.d_head, self.d_head)

    @property
    def cached_widths(self) -> int:
        return 2 * self.heads[1] * self.d_head

    @property
    def cached_heads(self) -> int:
        return 2 * self.heads[1]

    def mixing_flops(self, keys: float) -> float:
        """QKᵀ and weights·V: two products, each 2 FLOPs a channel, key and head."""
        return 4 * self.heads[0] * self.d_head * keys


class NoQKNorm(nn.Module):
    """Queries and keys as they are."""

    def __init__(self, n_heads: int, d_head: int):
        super().__init__()

    def forward(self, x_BTHE: Float[Tensor, "B T H E"]) -> Float[Tensor, "B T H E"]:
        return x_BTHE


class PerHeadNorm(nn.Module):
    """One norm of width E that all heads share.

    Dehghani et al. 2023, arXiv:2302.05442, §2; Qwen3, Gemma 3.
    """

    def __init__(self, n_heads: int, d_head: int, *, norm: NormFactory):
        super().__init__()
        self.norm = norm(d_head)

    def forward(self, x_BTHE: Float[Tensor, "B T H E"]) -> Float[Tensor, "B T H E"]:
        return self.norm(x_BTHE).type_as(x_BTHE)


class EachHeadNorm(nn.Module):
    """A norm of width E for each head, of its own weights. StableLM 2, Cohere's Command R+."""

    def __init__(self, n_heads: int, d_head: int, *, norm: NormFactory):
        super().__init__()
        self.norms = nn.ModuleList([norm(d_head) for _ in range(n_heads)])

    def forward(self, x_BTHE: Float[Tensor, "B T H E"]) -> Float[Tensor, "B T H E"]:
        heads = x_BTHE.unbind(2)
        return torch.stack([norm(x) for norm, x in zip(self.norms, heads, strict=True)], 2).type_as(x_BTHE)


class FullWidthNorm(nn.Module):
    """One norm over all heads together, of width H·E. OLMo 2, arXiv:2501.00656, §3.2."""

    def __init__(self, n_heads: int, d_head: int, *, norm: NormFactory):
        super().__init__()
        self.norm = norm(n_heads * d_head)

    def forward(self, x_BTHE: Float[Tensor, "B T H E"]) -> Float[Tensor, "B T H E"]:
        return self.norm(x_BTHE.flatten(2)).view_as(x_BTHE).type_as(x_BTHE)


class LatentAttention(PatternedAttention):
    """out(softmax([q ; q_r]·[W_k·c ; r]ᵀ·scale)·W_v·c), c = norm(W_down·x): multi-head latent attention
    (MLA). DeepSeek-V2, arXiv:2405.04434, §2.1.

    c = norm(W_down·x) of width C is all that is kept of a token, beside one rotated key r of width R
    that the heads share: k_h = [W_k,h·c ; r], v_h = W_v,h·c, and the query is [nope part ; rotated
    part]. With `q_rank` the query too comes from a narrow vector. Over cached tokens W_k moves to the
    query's side and W_v behind the sum, so that attention works on c itself, as one key/value head of
    width C + R (ibid., §2.1.2).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int,
        layer: int,
        *,
        q_rank: int | None,
        kv_rank: int,
        d_rotated: int,
        d_value: int | None,
        bias: bool,
        norm: NormFactory,
        scale: float | None,
        softcap: float | None,
        pattern: Callable[[int], Pattern],
        dropout: float,
    ):
        super().__init__(layer, pattern=pattern, softcap=softcap, dropout=dropout)
        check_whole("attn.kv_rank", kv_rank)
        check_whole("attn.d_rotated", d_rotated, least=0)
        for name, width in {"attn.q_rank": q_rank, "attn.d_value": d_value}.items():
            if width is not None:
                check_whole(name, width)
        self.n_heads, self.d_nope, self.d_rotated = n_heads, d_head, d_rotated
        self.d_value = d_head if d_value is None else d_value
        self.kv_rank = kv_rank
        self.scale = (d_head + d_rotated) ** -0.5 if scale is None else scale
        width = n_heads * (d_head + d_rotated)
        # torch's layers: oneDNN's round otherwise at another length of context, past 1e-5 at wide ranks.
        if q_rank is None:
            self.q = nn.Linear(d_model, width, bias=False)
        else:
            self.q = nn.Sequential(
                nn.Linear(d_model, q_rank, bias=bias), norm(q_rank), nn.Linear(q_rank, width, bias=False)
            )
        self.kv_down = nn.Linear(d_model, kv_rank + d_rotated, bias=bias)
        self.kv_norm = norm(kv_rank)
        self.kv_up = nn.Linear(kv_rank, n_heads * (d_head + self.d_value), bias=False)
        self.out = nn.Linear(n_heads * self.d_value, d_model, bias=bias)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        rotate: Rotation,
        scores: Scores,
        cache: LayerCache | None,
    ) -> Float[Tensor, "B T D"]:
        q_BTHE = self.q(x_BTD).unflatten(-1, (self.n_heads, -1))
        nope_BTHE, turned_BTHR = q_BTHE.split([self.d_nope, self.d_rotated], -1)
        turned_BTHR = rotate(turned_BTHR)
        c_BTC, r_BTR = self.kv_down(x_BTD).split([self.kv_rank, self.d_rotated], -1)
        # The norm's weights are in float32 under autocast, and so would be what it gives.
        c_BT1C = self.kv_norm(c_BTC).type_as(c_BTC)[:, :, None]
        r_BT1R = rotate(r_BTR[:, :, None])
        settings = {
            "pattern": self.pattern,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout": self.dropout if self.training else 0.0,
        }
        if cache is not None:
            c_BS1C, r_BS1R, keys = cache.append(c_BT1C, r_BT1R, scores.placement)
            up_HEC = self.kv_up.weight.view(self.n_heads, -1, self.kv_rank)
            up_k, up_v = up_HEC.split([self.d_nope, self.d_value], 1)
            q = torch.cat((torch.einsum("bthe,hec->bthc", nope_BTHE, up_k), turned_BTHR), -1)
            k = torch.cat((c_BS1C, r_BS1R), -1)
            o_BHTC = scores.attend(
                q.transpose(1, 2), k.transpose(1, 2), c_BS1C.transpose(1, 2), keys=keys, **settings
            )
            o_BTHE = torch.einsum("bhtc,hec->bthe", o_BHTC, up_v)
        else:
            kv_BTHE = self.kv_up(c_BT1C.squeeze(2)).unflatten(-1, (self.n_heads, -1))
            k_BTHE, v_BTHE = kv_BTHE.split([self.d_nope, self.d_value], -1)
            q = torch.cat((nope_BTHE, turned_BTHR), -1)
            k = torch.cat((k_BTHE, r_BT1R.expand(-1, -1, self.n_heads, -1)), -1)
            o_BHTE = scores.attend(
                q.transpose(1, 2), k.transpose(1, 2), v_BTHE.transpose(1, 2), keys=None, **settings
            )
            o_BTHE = o_BHTE.transpose(1, 2)
        return self.out(o_BTHE.flatten(2))

    @property
    def head_sizes(self) -> HeadSizes:
        return HeadSizes(self.n_heads, self.n_heads, self.d_nope + self.d_rotated, self.d_value)

    @property
    def cached_widths(self) -> int:
        return self.kv_rank + self.d_rotated

    @property
    def cached_heads(self) -> int:
        return 2 if self.d_rotated else 1

    def mixing_flops(self, keys: float) -> float:
        return 2 * self.n_heads * (self.d_nope + self.d_rotated + self.d_value) * keys
