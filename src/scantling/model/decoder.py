"""The model on one page.

Tensor names end in their axes: B batch, T query position, S key position, D model, H heads, K
key/value heads, E head dim, R rotated or reduced width, C compressed width, F hidden, V vocabulary, X
experts, N tokens of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scantling.model.attn import Mixer
from scantling.model.block import Block
from scantling.model.cache import BUFFERS, KVCache, Placement
from scantling.model.checks import check_whole
from scantling.model.embed import Embedding
from scantling.model.head import Head
from scantling.model.moe import Router
from scantling.model.norm import NormFactory
from scantling.model.param import Parametrisation
from scantling.model.pos import Position
from scantling.model.scores import Scores


class Decoder(nn.Module):
    """tokens_BT -> logits_BTV: embedding, position, `n_layers` blocks, norm, head.

    Parts come as factories that lack only the shape facts, which the decoder supplies. `d_head: null`
    stands for d_model / n_heads; `d_ff` is the hidden width of an ungated feed-forward layer. Each
    block serves `layers_per_block` layers in a row: 1 for most models, n_layers for ALBERT (Lan et
    al. 2019, arXiv:1909.11942, §3.1).

    Raises ValueError when the shapes do not fit each other, or a part's setting is out of range.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        layers_per_block: int,
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
        head: Callable[..., Head],
        param: Callable[[int, int], Parametrisation],
    ):
        super().__init__()
        sizes = {"n_layers": n_layers, "layers_per_block": layers_per_block, "d_model": d_model}
        for name, size in {**sizes, "n_heads": n_heads, "d_ff": d_ff, "seq_len": seq_len}.items():
            check_whole(name, size)
        d_head = head_width(d_model, n_heads) if d_head is None else d_head
        check_whole("d_head", d_head)
        if n_layers % layers_per_block:
            raise ValueError(f"layers_per_block={layers_per_block} does not divide n_layers={n_layers}")
        self.n_heads, self.seq_len, self.layers_per_block = n_heads, seq_len, layers_per_block
        self.embed = embed(vocab_size, d_model)
        self.head = head(vocab_size, d_model)
        self.dropout = nn.Dropout(dropout)
        blocks = [
            block(
                d_model,
                layer,
                n_layers,
                attn=attn(d_model, n_heads, d_head, layer),
                ffn=ffn(d_model, d_ff, layer),
                norm=norm,
            )
            for layer in range(0, n_layers, layers_per_block)
        ]
        self.pos = pos(d_model, n_heads, blocks[0].attn.d_rotated)
        check_position(self.pos, seq_len, blocks)
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm(d_model) if blocks[-1].final_norm else nn.Identity()
        self.routers = tuple(module for module in self.modules() if isinstance(module, Router))
        self.param = param(d_model, d_head)
        if not self.param.is_standard:
            self.rescale(d_model)
        self.first_of_document: int | None = None
        """The token that opens a document, where documents do not see each other."""
        self.checkpoint_activations = False
        """In training keep only each block's input, and compute the block again in the backward pass.

        Chen et al. 2016, arXiv:1604.06174, §4.1.
        """

    def rescale(self, d_model: int) -> None:
        """Scale attention and logits as `param` says. Raises ValueError for parts that it has no rule for."""
        if self.routers or self.embed.output.shape[1] != d_model:
            raise ValueError(
                "param=mup is for matrices whose both sides grow with the width: "
                "no ffn=moe, no embed=factorised"
            )
        self.head.rescale(self.param.logits)
        for block in set(self.layers):
            block.attn.rescale(self.param.scores)

    @property
    def hidden_matrices(self) -> set[str]:
        """Names of the weights of the linear layers inside of blocks."""
        modules = self.blocks.named_modules(prefix="blocks")
        return {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """The factor on each parameter's learning rate, as `param` says."""
        hidden = self.hidden_matrices
        return {p: self.param.hidden_rate if name in hidden else 1.0 for name, p in self.named_parameters()}

    def separate_documents(self, first_of_document: int) -> None:
        """From here on no token of a whole sequence sees another document.

        A cache holds one document, so that nothing changes there. Raises ValueError for a mixer
        that forms no scores to mask.
        """
        if not all(block.attn.takes_bias for block in self.layers):
            raise ValueError(
                "document_mask=true hides scores, and this attention forms none: use another attn="
            )
        self.first_of_document = first_of_document

    @property
    def layers(self) -> list[Block]:
        """The block of each layer; one that serves several stands there as often."""
        return [block for block in self.blocks for _ in range(self.layers_per_block)]  # type: ignore[misc]

    def forward(
        self,
        tokens_BT: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        *,
        lengths_B: Int[Tensor, " B"] | None = None,
        targets_BT: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"] | Float[Tensor, ""]:
        """Logits of the next token at each position, or with targets their summed loss in nats.

        With a cache `tokens_BT` follow those already in it; `lengths_B` then says how many of each row's
        tokens are real, where rows are padded on the right.
        """
        placement = (
            Placement.whole(tokens_BT, self.first_of_document)
            if cache is None
            else cache.advance(tokens_BT, lengths_B)
        )
        layers = self.layers
        for router in self.routers:
            router.forget()
        rotations = self.pos.rotations(placement.positions_BT, len(layers))
        new_scores = partial(Scores, bias=self.pos.bias, n_heads=self.n_heads, placement=placement)
        scores = new_scores()
        recomputed = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        x_BTD = self.dropout(self.pos.embed(self.embed(tokens_BT), placement.positions_BT))
        for i, block in enumerate(layers):
            if recomputed:
                # Scores keep their masks; what a block computes twice must be the same both times.
                x_BTD = checkpoint(
                    lambda x, block=block, i=i: block(x, rotations[i], new_scores(), None),
                    x_BTD,
                    use_reentrant=False,
                )
            else:
                x_BTD = block(x_BTD, rotations[i], scores, None if cache is None else cache.layers[i])
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head.logits(x_BTD, self.embed)
        return self.head.nats(x_BTD, self.embed, targets_BT)

    def auxiliary_loss(self) -> Tensor | float:
        """What the routers of the last forward pass in training add to the loss: a mean over tokens."""
        return sum((router.loss for router in self.routers if router.loss is not None), start=0.0)

    def new_cache(self, max_len: int, precision: str = "full") -> KVCache:
        """Room for `max_len` tokens; `precision` is one of `cache.BUFFERS`."""
        layers = [block.attn.new_cache(max_len, BUFFERS[precision]) for block in self.layers]
        return KVCache(layers, max_len)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Every weight of the model, from `seed`.

        Matrices and tables: normal, standard deviation 0.02; those that write to the residual stream (a
        part's last layer, named `out`) scaled as the block says, by 1/√(2·n_layers) for most. Radford et al.
        2019 (GPT-2), §2.3. Biases 0; other vectors keep what their part gave them. Each tensor draws from a
        generator of its own, seeded by its name, so that two models share the initial weights of every tensor
        they have in common. `param` has a factor for hidden matrices.
        """
        hidden, out_scale = self.hidden_matrices, self.layers[0].out_scale(len(self.layers))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim >= 2:
                std = 0.02 * out_scale if ".out." in name else 0.02
                if name in hidden:
                    std *= self.param.hidden_std
                parameter.copy_(drawn(parameter.shape, f"{seed}/{name}") * std)


def drawn(shape: torch.Size, name: str) -> Tensor:
    """Standard normal numbers that depend on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(generator=generator)


def head_width(d_model: int, n_heads: int) -> int:
    """d_model / n_heads. Raises ValueError unless it is a whole number."""
    if d_model % n_heads:
        raise ValueError(
            f"n_heads={n_heads} does not divide d_model={d_model}: use one of "
            f"{[h for h in range(1, d_model + 1) if d_model % h == 0 and d_model // h >= 8]}"
            ", or set model.d_head"
        )
    return d_model // n_heads


def check_position(pos: Position, seq_len: int, blocks: list[Block]) -> None:
    """Raises ValueError for sequences longer than its table, and for attention that it cannot add to."""
    if pos.max_len is not None and seq_len > pos.max_len:
        raise ValueError(
            f"seq_len={seq_len} is longer than the {pos.max_len} positions of the position embedding: "
            f"use model.seq_len={pos.max_len} or pos.max_len={seq_len}"
        )
    if pos.bias is not None and not all(block.attn.takes_bias for block in blocks):
        raise ValueError(
            "this attention forms no scores that a position could add to: "
            "use pos=rope, learned, sinusoidal or none"
        )
