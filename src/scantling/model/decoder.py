"""The model on one page.

Tensor names end in their axes: B batch, T query position, S key position, D model, H heads, K key/value heads,
E head dim, F hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model.attn import CausalScores, Mixer
from scantling.model.block import Block, NormFactory
from scantling.model.cache import KVCache
from scantling.model.embed import Embedding
from scantling.model.pos import Position


class Decoder(nn.Module):
    """tokens_BT -> logits_BTV: embedding, position, `n_layers` blocks, norm, head.

    Parts come as factories that lack only the shape facts, which the decoder supplies. `d_head: null` stands for
    d_model / n_heads; `d_ff` is the hidden width of an ungated feed-forward layer.

    Raises ValueError when the shapes do not fit each other.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        d_model: int,
        n_heads: int,
        d_head: int | None,
        d_ff: int,
        vocab_size: int,
        seq_len: int,
        dropout: float,
        norm: NormFactory,
        pos: Callable[..., Position],
        attn: Callable[..., Mixer],
        ffn: Callable[..., nn.Module],
        block: Callable[..., Block],
        embed: Callable[..., Embedding],
    ):
        super().__init__()
        if d_head is None:
            if d_model % n_heads:
                raise ValueError(
                    f"n_heads={n_heads} does not divide d_model={d_model}: use one of "
                    f"{[h for h in range(1, d_model + 1) if d_model % h == 0 and d_model // h >= 8]}"
                    ", or set model.d_head"
                )
            d_head = d_model // n_heads
        self.n_heads, self.seq_len = n_heads, seq_len
        self.embed = embed(vocab_size, d_model)
        self.pos = pos(d_model, n_heads, d_head)
        if self.pos.max_len is not None and seq_len > self.pos.max_len:
            raise ValueError(
                f"seq_len={seq_len} is longer than the {self.pos.max_len} positions of the position embedding: "
                f"use model.seq_len={self.pos.max_len} or pos.max_len={seq_len}"
            )
        self.dropout = nn.Dropout(dropout)
        blocks = [
            block(
                d_model,
                attn=attn(d_model, n_heads, d_head),
                ffn=ffn(d_model, d_ff),
                norm=norm,
            )
            for _ in range(n_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(d_model) if blocks[-1].final_norm else nn.Identity()

    def forward(self, tokens_BT: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T V"]:
        """Logits of the next token at each position; with a cache, `tokens_BT` follow those already in it."""
        start = 0 if cache is None else cache.length
        length, device = tokens_BT.shape[1], tokens_BT.device
        positions_T = torch.arange(start, start + length, device=device)
        rotate = self.pos.rotate(positions_T)
        scores = CausalScores(
            bias=self.pos.bias, n_heads=self.n_heads, start=start, length=length, device=device
        )
        x_BTD = self.dropout(self.pos.embed(self.embed(tokens_BT), positions_T))
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, rotate, scores, None if cache is None else cache.layers[i])
        return self.embed.logits(self.norm(x_BTD))

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Every weight of the model, from `seed`.

        Matrices and tables: normal, standard deviation 0.02; those that write to the residual stream (a part's
        last layer, named `out`) scaled by 1/√(2·n_layers). Radford et al. 2019 (GPT-2), §2.3. Biases 0; other
        vectors keep what their part gave them. Each tensor draws from a generator of its own, seeded by its
        name, so that two models share the initial weights of every tensor they have in common.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim >= 2:
                residual = ".out." in name
                std = 0.02 / (2 * len(self.blocks)) ** 0.5 if residual else 0.02
                digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
