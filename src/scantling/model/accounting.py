"""Parameters, FLOPs and bytes: the one place where they are counted. Every count names its convention."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from scantling.model.cache import BUFFERS, QuantisedBuffer
from scantling.model.decoder import Decoder
from scantling.model.moe import MixtureOfExperts, Router

GROUPS = {
    "embedding": (".embed.tokens.", ".embed.wide.", ".embed.norm."),
    "head": (".embed.head.", ".embed.narrow.", ".head."),
    "position": (".pos.",),
    "attention": (".attn.",),
    "router": (".ffn.router.",),
    "feed-forward": (".ffn.",),
}
"""Marks in the names of a group's parameters; the first group that fits has the parameter.

Parameters that fit none are the norms of the blocks.
"""


# --- parameters ---


def parameter_counts(decoder: Decoder) -> dict[str, int]:
    """Parameters by group; a matrix that embedding and head share counts once, as embedding."""
    counts = dict.fromkeys([*GROUPS, "norm"], 0)
    for name, parameter in decoder.named_parameters():
        counts[group_of(name)] += parameter.numel()
    assert sum(counts.values()) == sum(p.numel() for p in decoder.parameters())
    return counts


def group_of(parameter: str) -> str:
    """The group of `GROUPS` that the parameter of this dotted name counts in; "norm" where no mark fits."""
    dotted = f".{parameter}"
    return next((group for group, marks in GROUPS.items() if any(mark in dotted for mark in marks)), "norm")


def active_counts(decoder: Decoder) -> dict[str, int]:
    """Parameters by group that one token passes.

    Of the experts they are those that the router chooses; those of a block that serves
    several layers count each time.
    """
    counts = dict.fromkeys([*GROUPS, "norm"], 0)
    for path, module, times in passed(decoder):
        for name, parameter in module.named_parameters(recurse=False):
            counts[group_of(f"{path}.{name}")] += times * parameter.numel()
    return counts


def passed(module: nn.Module, path: str = "", times: int = 1) -> Iterator[tuple[str, nn.Module, int]]:
    """Every module below, its path, and how often one token passes it or one like it.

    Experts are alike, so that only the first is given, with the number of those chosen.
    """
    yield path, module, times
    for name, child in module.named_children():
        if isinstance(module, MixtureOfExperts) and child is module.experts:
            yield from passed(module.experts[0], f"{path}.{name}.0", times * module.router.n_active)
        elif isinstance(module, Decoder) and child is module.blocks:
            yield from passed(child, f"{path}.{name}", times * module.layers_per_block)
        else:
            yield from passed(child, f"{path}.{name}", times)


def active_parameters(decoder: Decoder) -> int:
    """The sum of `active_counts`: N of the conventions that count 6·N."""
    return sum(active_counts(decoder).values())


def non_embedding(counts: dict[str, int]) -> int:
    """Parameters that belong neither to embeddings of tokens or positions nor to the output head."""
    return sum(counts.values()) - counts["embedding"] - counts["head"] - counts["position"]


# --- FLOPs ---


def linear_flops(module: nn.Module) -> int:
    """Forward FLOPs per token of all linear layers below `module`, of the experts only those chosen."""
    return sum(2 * n * m.weight.numel() for _, m, n in passed(module) if isinstance(m, nn.Linear))


def forward_flops_by_part(decoder: Decoder, keys: float | None, seq_len: int) -> dict[str, float]:
    """Matrix products of one token's forward pass by part; 2 FLOPs a multiply-add.

    The token sees `keys` keys in every layer; None: as many as causality and the layer's pattern leave on
    average in a sequence of `seq_len`. Norms, activations, softmax and the lookup of embeddings are left out,
    as in most of the literature's counts.
    """
    layers = decoder.layers
    projections = sum(linear_flops(block.attn) for block in layers)
    feed_forward = sum(linear_flops(block.ffn) for block in layers)
    router = sum(
        linear_flops(part) for block in layers for _, part, _ in passed(block.ffn) if isinstance(part, Router)
    )
    return {
        "embedding": sum(
            2 * p.numel() for name, p in decoder.embed.named_parameters() if name.startswith("wide.")
        ),
        "attention projections": projections,
        "attention mixing": sum(
            block.attn.mixing_flops(block.attn.mean_keys(seq_len) if keys is None else float(keys))
            for block in layers
        ),
        "router": router,
        "feed-forward": feed_forward - router,
        "block": sum(linear_flops(block) for block in layers) - projections - feed_forward,
        "head": decoder.head.flops(decoder.embed),
    }


def forward_flops_per_token(decoder: Decoder, keys: float | None, seq_len: int) -> float:
    """The sum of `forward_flops_by_part`."""
    return sum(forward_flops_by_part(decoder, keys, seq_len).values())


def mixing_in_full(decoder: Decoder, seq_len: int) -> float:
    """Forward FLOPs per token of attention itself, as if every token saw all `seq_len` keys."""
    return sum(block.attn.mixing_flops(float(seq_len)) for block in decoder.layers)


def exact(decoder: Decoder, seq_len: int) -> float:
    """3 × the products, over the keys that a token sees.

    These are (T+1)/2 on average under causality, and fewer under a pattern.
    """
    return 3 * forward_flops_per_token(decoder, None, seq_len)


def exact_full(decoder: Decoder, seq_len: int) -> float:
    """3 × the products, over all T keys. What a kernel computes that masks only afterwards."""
    return 3 * forward_flops_per_token(decoder, float(seq_len), seq_len)


def kaplan(decoder: Decoder, seq_len: int) -> float:
    """6·N, N active without vocabulary and positions. Kaplan et al. 2020, arXiv:2001.08361, §1.3 and §2.1."""
    return 6 * non_embedding(active_counts(decoder))


def kaplan_context(decoder: Decoder, seq_len: int) -> float:
    """6·N + 6·n_layers·T·d_attn, N as in kaplan. Ibid., table 1; its context term counts attention half."""
    return kaplan(decoder, seq_len) + 3 * mixing_in_full(decoder, seq_len) / 2


def six_n(decoder: Decoder, seq_len: int) -> float:
    """6·N, N all active parameters. Hoffmann et al. 2022, arXiv:2203.15556, §3."""
    return 6 * active_parameters(decoder)


def palm(decoder: Decoder, seq_len: int) -> float:
    """6·N + 12·L·H·E·T, N as in 6n. Chowdhery et al. 2022, arXiv:2204.02311, app. B; attention in full."""
    return six_n(decoder, seq_len) + 3 * mixing_in_full(decoder, seq_len)


def hoffmann(decoder: Decoder, seq_len: int) -> float:
    """3 × (products over all T keys + softmax + lookup). Hoffmann et al. 2022, arXiv:2203.15556, app. F.

    The softmax takes 3 FLOPs a head and key, and the lookup counts as a product with the table.
    """
    softmax = 3 * decoder.n_heads * seq_len * len(decoder.layers)
    lookup = 2 * decoder.embed.tokens.weight.numel()
    return exact_full(decoder, seq_len) + 3 * (softmax + lookup)


CONVENTIONS: dict[str, Callable[[Decoder, int], float]] = {
    "exact": exact,
    "exact_full": exact_full,
    "kaplan": kaplan,
    "kaplan_context": kaplan_context,
    "6n": six_n,
    "palm": palm,
    "hoffmann": hoffmann,
}
"""Training FLOPs per token, forward and backward, under each name.

The papers count dense models whose layers share no weights. In a mixture of experts N is the active
parameters in every convention, for the idle experts compute nothing; shared weights count in N for
each layer, for each computes. The exact counts and Hoffmann's take the products of the chosen
experts and of the router.
"""


def convention(name: str) -> Callable[[Decoder, int], float]:
    """The count of training FLOPs per token of this name. Raises ValueError for an unknown one."""
    if name not in CONVENTIONS:
        raise ValueError(f"budget.convention={name} is unknown: use one of {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


# --- bytes ---

CACHED = {"fp32": (4, 0), "bf16": (2, 0)} | {
    name: (buffer.dtype.itemsize, torch.float32.itemsize)
    for name, buffer in BUFFERS.items()
    if issubclass(buffer, QuantisedBuffer)
}
"""Bytes of a cached number, and of the scale that a quantised cache keeps for each vector."""


def cache_bytes(decoder: Decoder, *, context: int, batch: int, precision: str) -> int:
    """What `batch` sequences of `context` tokens take in a key/value cache.

    Windows and latent vectors save some of it. For one token: `context=1`, as long as no window is full. A
    state that sums tokens up stays in float32, whatever `precision` is.
    """
    if precision not in CACHED:
        raise ValueError(f"a cache in {precision} is unknown: use one of {', '.join(CACHED)}")
    number, scale = CACHED[precision]
    total = 0
    for mixer in (block.attn for block in decoder.layers):
        numbers, vectors = mixer.cached_numbers(context), mixer.cached_vectors(context)
        total += number * numbers + scale * vectors if vectors else CACHED["fp32"][0] * numbers
    return batch * total
