"""Parameters, FLOPs and bytes: the one place where they are counted. Every count names its convention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from scantling.model.decoder import Decoder
from scantling.model.moe import MixtureOfExperts

GROUPS = {
    "embedding": (".embed.tokens.", ".embed.wide.", ".embed.norm."),
    "head": (".embed.head.", ".embed.narrow.", ".head."),
    "position": (".pos.",),
    "attention": (".attn.",),
    "feed-forward": (".ffn.",),
}


def parameter_counts(decoder: Decoder) -> dict[str, int]:
    """Parameters by group; a matrix that embedding and head share counts once, as embedding."""
    counts = dict.fromkeys([*GROUPS, "norm"], 0)
    for name, parameter in decoder.named_parameters():
        dotted = f".{name}"
        group = next((g for g, marks in GROUPS.items() if any(mark in dotted for mark in marks)), "norm")
        counts[group] += parameter.numel()
    assert sum(counts.values()) == sum(p.numel() for p in decoder.parameters())
    return counts


def active_parameters(decoder: Decoder) -> int:
    """Parameters that one token passes: of the experts, those that its router chooses."""
    idle = 0
    for moe in decoder.modules():
        if isinstance(moe, MixtureOfExperts):
            experts = sum(p.numel() for p in moe.experts.parameters())
            idle += experts * (moe.router.n_experts - moe.router.n_active) // moe.router.n_experts
    return sum(p.numel() for p in decoder.parameters()) - idle


def linear_flops(module: nn.Module) -> float:
    """Forward FLOPs per token of all linear layers below `module`, of the experts only those chosen."""
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    flops = sum(linear_flops(child) for name, child in module.named_children() if name != "experts")
    if isinstance(module, MixtureOfExperts):
        flops += linear_flops(module.experts) * module.router.n_active / module.router.n_experts
    return flops


def forward_flops_per_token(decoder: Decoder, keys: float | None, seq_len: int) -> float:
    """Matrix products of one token's forward pass; 2 FLOPs a multiply-add.

    The token sees `keys` keys in every layer; None: as many as causality and the layer's pattern leave on average.
    Norms, activations, softmax and the lookup of embeddings are left out, as in all the literature's counts.
    """
    mixing = sum(
        block.attn.mixing_flops(block.attn.mean_keys(seq_len) if keys is None else float(keys))
        for block in decoder.layers
    )
    linear = sum(linear_flops(block) for block in decoder.layers)
    widening = sum(2 * p.numel() for name, p in decoder.embed.named_parameters() if name.startswith("wide."))
    return linear + mixing + widening + decoder.head.flops(decoder.embed)


def exact(decoder: Decoder, seq_len: int) -> float:
    """3 × the forward pass, each token attending to the keys that causality and patterns leave it, (T+1)/2 without any."""
    return 3 * forward_flops_per_token(decoder, None, seq_len)


def kaplan(decoder: Decoder, seq_len: int) -> float:
    """6·N, N without vocabulary and position parameters. Kaplan et al. 2020, arXiv:2001.08361, §1.3 and §2.1."""
    return 6 * non_embedding(parameter_counts(decoder))


def six_n(decoder: Decoder, seq_len: int) -> float:
    """6·N, N all parameters. Hoffmann et al. 2022, arXiv:2203.15556, §3."""
    return 6 * sum(parameter_counts(decoder).values())


def palm(decoder: Decoder, seq_len: int) -> float:
    """6·N + 12·L·H·E·T, attention counted in full. Chowdhery et al. 2022, arXiv:2204.02311, appendix B."""
    mixing = sum(block.attn.mixing_flops(float(seq_len)) for block in decoder.layers)
    return six_n(decoder, seq_len) + 3 * mixing


CONVENTIONS: dict[str, Callable[[Decoder, int], float]] = {
    "exact": exact,
    "kaplan": kaplan,
    "6n": six_n,
    "palm": palm,
}
"""Training FLOPs per token, forward and backward, under each name."""


def non_embedding(counts: dict[str, int]) -> int:
    """Parameters that are no embedding of tokens or positions and no output head."""
    return sum(counts.values()) - counts["embedding"] - counts["head"] - counts["position"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one device's share while it trains, without the framework's own few hundred megabytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def training_memory(decoder: Decoder, *, sequences: int, seq_len: int, half_precision: bool) -> Memory:
    """Float32 weights and gradients, AdamW's two states (no optimiser here has more), and activations.

    Per token a layer keeps the input and output of every linear layer, and about four more tensors of width D for
    norms and residual sums (after Korthikanti et al. 2022, arXiv:2205.05198, §4); the logits are kept in the
    precision of the products and twice in float32.
    """
    n = sum(p.numel() for p in decoder.parameters())
    width = 2 if half_precision else 4
    d_model = decoder.layers[0].attn.out.out_features
    linears = [m for block in decoder.layers for m in block.modules() if isinstance(m, nn.Linear)]
    kept = sum(m.in_features + m.out_features for m in linears) + 4 * d_model * len(decoder.layers)
    logits = decoder.embed.tokens.num_embeddings * (width + 8)
    tokens = sequences * seq_len
    return Memory(4 * n, 4 * n, 8 * n, tokens * (kept * width + logits))
