"""What benchmarks share: shapes, the models of others in them, and the loop that trains those."""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import lightning.pytorch as L
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from scantling.config.options import CONF
from scantling.training import run as scantling_run
from scantling.training.assembly import Run, training_batches
from scantling.training.callbacks import StepCallback, StepCallbacks


@dataclass(frozen=True)
class Shape:
    name: str
    n_layers: int
    n_heads: int
    d_model: int
    seq_len: int
    batch_size: int
    vocab_size: int
    multiple_of: int = 8
    """Of which a gated feed-forward's width is one."""
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
    """The peer's model of the same shape. GPT-2's cannot leave out its biases: 0.3 % of its parameters."""
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
        intermediate_size=round(8 * shape.d_model / 3 / shape.multiple_of) * shape.multiple_of,
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


# --- training ---


class Enough(Exception):
    """The last round is over."""


def fit_watched(run: Run, last: StepCallback) -> None:
    """Train as `python src/train.py` does, silently, with `last` behind the run's own callbacks; it may
    raise Enough."""

    class Trainer(L.Trainer):
        def __init__(self, *, callbacks: StepCallbacks, **settings):
            callbacks.callbacks.append(last)
            super().__init__(callbacks=callbacks, **settings)

    with (
        open(os.devnull, "w") as nowhere,
        patch.object(scantling_run.L, "Trainer", Trainer),
        contextlib.suppress(Enough),
    ):
        scantling_run.fit(run, Console(file=nowhere, force_terminal=True))


def configuration(shape: Shape, family: str, scratch: Path, *overrides: str) -> DictConfig:
    """A run of ours over random characters, of which there are as many as the vocabulary has entries."""
    text = scratch / f"{shape.vocab_size}.txt"
    if not text.exists():
        first = ord("0") if shape.vocab_size < 100 else 0x10000
        characters = [chr(first + i) for i in range(shape.vocab_size - 2)]  # the tokenizer adds two
        drawn = random.Random(0).choices(characters, k=1_000_000)
        text.write_text("".join([*characters, *drawn]))
    common = [
        *FAMILIES[family],
        *shape.overrides,
        *([f"ffn.multiple_of={shape.multiple_of}"] if family == "llama" else []),
        "data=text",
        f"data.files={text}",
        "tokenizer=char",
        "budget=steps",
        "budget.steps=1000000",
        "logger=none",
        f"paths.cache={scratch / 'cache'}",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*common, *overrides])


def bare_loop(
    model: nn.Module, logits_of: Callable[[Tensor], Tensor], run: Run, *, compiled: bool = False
) -> Iterator[Tensor]:
    """Training as one would write it by hand; each `next` is one optimiser step, and gives its loss."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(inputs).flatten(0, 1), targets.flatten())

    if compiled:
        loss_of = torch.compile(loss_of)
    optimizer = instantiate(run.config.optim)(model.named_parameters())
    factor = instantiate(run.config.schedule)
    # Past the partial that Hydra makes, whose every call costs a check.
    schedule = LambdaLR(optimizer, lambda step: factor.func(step, run.plan.steps, **factor.keywords))
    for batch in training_batches(run, rank=0):
        inputs, targets = (batch[key].to(run.device, non_blocking=True) for key in ("inputs", "targets"))
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), run.config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.detach()


@torch.no_grad()
def take_weights(peer: nn.Module, ours: dict[str, Tensor]) -> None:
    """The peer starts from our decoder's weights, biases that we do not have from 0."""
    theirs = dict(peer.named_parameters())
    names = PLAIN if isinstance(peer, PlainGPT) else LLAMA if "model.norm.weight" in theirs else GPT2
    taken = set()
    for name, weight in ours.items():
        i, _, part = (
            name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
        )
        target = [theirs[pattern.format(i)] for pattern in names[part].split()]
        parts = weight.chunk(len(target)) if len(target) > 1 else [weight]
        for p, value in zip(target, parts, strict=True):
            p.copy_(value.T if names is GPT2 and p.ndim == 2 and part not in TABLES else value)
            taken.add(id(p))
    for p in theirs.values():
        if id(p) not in taken:
            p.zero_()


TABLES = ("embed.tokens.weight", "pos.weight")
PLAIN = {
    "embed.tokens.weight": "tokens.weight",
    "pos.weight": "positions.weight",
    "attn.qkv.weight": "blocks.{}.qkv.weight",
    "attn.out.weight": "blocks.{}.out.weight",
    "ffn.up.weight": "blocks.{}.up.weight",
    "ffn.out.weight": "blocks.{}.down.weight",
    "attn_norm.weight": "blocks.{}.norm_1.weight",
    "ffn_norm.weight": "blocks.{}.norm_2.weight",
    "norm.weight": "norm.weight",
}
GPT2 = {
    "embed.tokens.weight": "transformer.wte.weight",
    "pos.weight": "transformer.wpe.weight",
    "attn.qkv.weight": "transformer.h.{}.attn.c_attn.weight",
    "attn.out.weight": "transformer.h.{}.attn.c_proj.weight",
    "ffn.up.weight": "transformer.h.{}.mlp.c_fc.weight",
    "ffn.out.weight": "transformer.h.{}.mlp.c_proj.weight",
    "attn_norm.weight": "transformer.h.{}.ln_1.weight",
    "ffn_norm.weight": "transformer.h.{}.ln_2.weight",
    "norm.weight": "transformer.ln_f.weight",
}
LLAMA = {
    "embed.tokens.weight": "model.embed_tokens.weight",
    "attn.qkv.weight": "model.layers.{0}.self_attn.q_proj.weight model.layers.{0}.self_attn.k_proj.weight "
    "model.layers.{0}.self_attn.v_proj.weight",
    "attn.out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "ffn.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "ffn.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "ffn.out.weight": "model.layers.{}.mlp.down_proj.weight",
    "attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
}
"""Our names -> theirs; GPT-2's matrices are transposed."""
