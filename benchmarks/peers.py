"""The shapes that benchmarks measure, and models of others in them."""

from __future__ import annotations

import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    name: str
    n_layers: int
    n_heads: int
    d_model: int
    seq_len: int
    batch_size: int
    vocab_size: int
    steps: int = 1
    """Optimiser steps of one contestant in one round."""
    seconds: float = 100
    """Time for a cell."""

    @property
    def overrides(self) -> list[str]:
        return [
            f"model.n_layers={self.n_layers}",
            f"model.n_heads={self.n_heads}",
            f"model.d_model={self.d_model}",
            f"model.d_ff={4 * self.d_model}",
            f"model.seq_len={self.seq_len}",
            f"batch_size={self.batch_size}",
        ]


FAMILIES = {
    "gpt2": ["model=gpt2_tiny", "model.bias=false", "ffn=gelu"],  # nanoGPT's parts
    "llama": ["model=llama_tiny", "optim=adamw"],
}
"""Our parts, as they are chosen."""


def hugging_face(family: str, shape: Shape, attention: str) -> nn.Module:
    """The peer's model of the same shape. GPT-2's has biases, which it cannot leave out: 0.3 % of its parameters."""
    common = {
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": True,
        "use_cache": False,
        "attn_implementation": attention,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        config = transformers.GPT2Config(
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            n_positions=shape.seq_len,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        hidden_size=shape.d_model,
        intermediate_size=round(8 * shape.d_model / 3 / 8) * 8,
        max_position_embeddings=shape.seq_len,
        rms_norm_eps=1e-5,
        **common,
    )
    return transformers.LlamaForCausalLM(config)


class PlainGPT(nn.Module):
    """GPT-2 as one writes it in plain PyTorch, in nanoGPT's manner: one product for queries, keys and values,
    `scaled_dot_product_attention`, GELU, LayerNorms without bias, a tied head. tokens_BT -> logits_BTV.
    """

    def __init__(self, shape: Shape):
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.seq_len, shape.d_model)
        self.blocks = nn.ModuleList(PlainBlock(shape.d_model, shape.n_heads) for _ in range(shape.n_layers))
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        self.head = nn.Linear(shape.d_model, shape.vocab_size, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, 0.0, 0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x = self.tokens(tokens_BT) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PlainBlock(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_1(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in qkv)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))
