"""Peak memory of a device while it trains: weights, gradients, optimiser and activations, by engine."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from scantling.model import cross_entropy, processors
from scantling.model.accounting import passed
from scantling.model.attn import HeadSizes, PatternedAttention
from scantling.model.decoder import Decoder
from scantling.model.kernels import choose_kernel, forms_scores

FLOAT32 = 4


@dataclass(frozen=True)
class Engine:
    """What one of N devices holds only a share of."""

    optimizer: bool = False
    gradients: bool = False
    weights: bool = False
    copies: int = 0
    """Copies of its share of the weights, beside them."""
    buckets: int = 0
    """Bytes that gradients and weights are sent in."""
    offloads: bool = False
    """Whether shares of weights and optimiser lie in the host's memory."""
    recomputes: bool = True
    """Whether blocks may be computed twice in it."""


BUCKET = 50_000_000
"""Numbers in a bucket of DeepSpeed's, conf/trainer/zero1.yaml."""

ZERO3 = Engine(
    optimizer=True, gradients=True, weights=True, copies=1, buckets=2 * FLOAT32 * BUCKET, recomputes=False
)

ENGINES = {
    "ddp": Engine(),
    "zero1": Engine(optimizer=True, copies=1, buckets=FLOAT32 * BUCKET),
    "zero2": Engine(optimizer=True, gradients=True, copies=1, buckets=FLOAT32 * BUCKET),
    "fsdp": Engine(optimizer=True, gradients=True, weights=True),
    "zero3": ZERO3,
    "zero3_offload": replace(ZERO3, offloads=True),
}
"""By `trainer.engine`, the fastest first. Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1, less its
float16: weights are float32 here.
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device while it trains, without the framework's own few hundred megabytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    """Gathered weights, copies of them in half precision, their average, buckets."""
    states: int
    """Weights and the optimiser's numbers whole, as in a checkpoint; no part of the sum."""
    overlap: int
    """What of gradients, activations and logits is not there at the peak."""

    @property
    def total(self) -> int:
        """The peak."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.workspace)
        return sum(parts) - self.overlap


@dataclass(frozen=True)
class AttentionSizes:
    """What the choice of a layer's kernel follows from, and what that kernel keeps."""

    heads: HeadSizes
    plain: bool
    """Whether only causality hides scores, and neither bias nor cap changes them."""
    learned_bias: bool
    softcap: float | None
    dropout: float

    @classmethod
    def of(cls, decoder: Decoder, mixer: PatternedAttention) -> AttentionSizes:
        """The sizes of one mixer of the decoder in training."""
        biased = decoder.pos.bias is not None
        unmasked = mixer.pattern.is_full and decoder.first_of_document is None
        return cls(
            heads=mixer.head_sizes,
            plain=unmasked and not biased and mixer.softcap is None,
            learned_bias=biased and any(p.requires_grad for p in decoder.pos.parameters()),
            softcap=mixer.softcap,
            dropout=mixer.dropout,
        )

    def kept(self, sequences: int, seq_len: int, half_precision: bool, on_gpu: bool) -> int:
        """Bytes, beside queries, keys, values and output, which stand among the layer's `products`.

        A kernel that forms no scores keeps a number for each query, the logarithm of its sum of exponentials.
        One that forms them keeps the weights; with dropout its mask and what that leaves too, with a cap the
        tangent. PyTorch's own formula takes bfloat16 to float32.
        """
        device = "cuda" if on_gpu else "cpu"
        n_heads, n_kv_heads, width, value_width = self.heads
        kernel = choose_kernel(
            torch.Size((sequences, n_heads, seq_len, width)),
            torch.Size((sequences, n_kv_heads, seq_len, width)),
            torch.bfloat16 if half_precision else torch.float32,
            device,
            plain=self.plain,
            softcap=self.softcap,
            cached=False,
            dropout=self.dropout,
            processor=processors.HERE,
        )
        forms = forms_scores(
            kernel,
            device,
            same_widths=width == value_width,
            learned_bias=self.learned_bias,
            dropout=self.dropout,
        )
        casts = half_precision and (kernel == "sdpa in float32" or (kernel == "sdpa" and forms))
        queries, kept = sequences * n_heads * seq_len, 0
        if forms:
            scores = (3 if self.dropout else 1) + (0 if self.softcap is None else 1)
            kept += queries * seq_len * scores * (2 if half_precision and not casts else FLOAT32)
        else:
            kept += FLOAT32 * queries
        if (
            casts
        ):  # queries, keys and values are kept in float32 instead, and the flash kernel's output besides
            numbers = n_heads * width + n_kv_heads * (width + value_width)
            output = 0 if forms else n_heads * value_width
            kept += sequences * seq_len * ((FLOAT32 - 2) * numbers + FLOAT32 * output)
        return kept


@dataclass(frozen=True)
class DecoderSizes:
    """A model in the numbers that its memory follows from."""

    parameters: int
    optimizer: int
    """The optimiser's numbers, kept beside the parameters."""
    blocks: tuple[int, ...]
    """Parameters of each."""
    matrices: int
    """Parameters of the matrices in blocks and head."""
    head: int
    vocab_size: int
    d_model: int
    products: tuple[int, ...]
    """For each layer: inputs and outputs of its linear layers, and masks of dropout, a token."""
    norms: tuple[int, ...]
    """For each layer: inputs of norms and residual sums, a token."""
    attentions: tuple[AttentionSizes | None, ...]
    """For each layer; None for a mixer without scores."""

    @classmethod
    def of(cls, decoder: Decoder, optimizer: Callable[..., torch.optim.Optimizer]) -> DecoderSizes:
        """The sizes of a decoder, counted after Korthikanti et al. 2022, arXiv:2205.05198, §4.

        A layer keeps the input and output of every linear layer, of the experts those chosen, and two tensors
        of width D for each norm, at least four for the residual sums.
        """
        head = decoder.head.flops(decoder.embed) // 2
        out = decoder.layers[0].attn.out
        assert isinstance(out, nn.Linear)
        products, norms = [], []
        for block in decoder.layers:
            linear = [(m, times) for _, m, times in passed(block) if isinstance(m, nn.Linear)]
            n_norms = sum(name.endswith("norm") for name, _ in block.named_children())
            masks = 2 * out.out_features if block.residual.dropout.p else 0
            products.append(sum(times * (m.in_features + m.out_features) for m, times in linear) + masks)
            norms.append(2 * max(2, n_norms) * out.out_features)
        matrices = [
            m.weight.numel() for block in decoder.blocks for m in block.modules() if isinstance(m, nn.Linear)
        ]
        return cls(
            parameters=sum(p.numel() for p in decoder.parameters()),
            optimizer=optimizer_numbers(decoder, optimizer),
            blocks=tuple(sum(p.numel() for p in block.parameters()) for block in decoder.blocks),
            matrices=sum(matrices) + head,
            head=head,
            vocab_size=decoder.embed.tokens.num_embeddings,
            d_model=out.out_features,
            products=tuple(products),
            norms=tuple(norms),
            attentions=tuple(
                AttentionSizes.of(decoder, block.attn) if isinstance(block.attn, PatternedAttention) else None
                for block in decoder.layers
            ),
        )


def optimizer_numbers(decoder: Decoder, optimizer: Callable[..., torch.optim.Optimizer]) -> int:
    """Numbers that the optimiser keeps, seen in one step on small parameters of the same names.

    All their axes have length 1; of parameters that are alike one stands for all.
    """
    kinds: dict[str, int] = defaultdict(int)
    small = {}
    for name, p in decoder.named_parameters():
        kind = re.sub(r"\d+", "0", name)
        kinds[kind] += p.numel()
        small[kind] = nn.Parameter(torch.ones((1,) * p.ndim))
    stepped = optimizer(small.items())
    for p in small.values():
        p.grad = torch.zeros_like(p)
    stepped.step()
    return sum(
        kinds[kind] * sum(value.shape == p.shape for value in stepped.state[p].values())
        for kind, p in small.items()
    )


def training_memory(
    sizes: DecoderSizes,
    *,
    sequences: int,
    seq_len: int,
    half_precision: bool,
    checkpoint_activations: bool,
    engine: Engine,
    devices: int,
    accumulates: bool,
    averages: bool,
    on_gpu: bool,
) -> Memory:
    """The peak: float32 weights and gradients, the optimiser's numbers, and what the backward pass needs.

    With checkpoints every block keeps its input, and one all the rest. The logits stand three times in
    float32, their gradient among them, as if every head took the whole vocabulary; where they come in chunks,
    those of one chunk do, and the head's gradient waits beside the others. In half precision autocast keeps a
    copy of each matrix until the backward pass is over. Gradients come while activations go, where not all of
    them stand from the start. An average of the weights is as large as they are. Attention counts what its
    chosen kernel keeps.
    """
    n, tokens, width = sizes.parameters, sequences * seq_len, 2 if half_precision else FLOAT32
    kept = [
        tokens * (width * p + FLOAT32 * m)
        + (0 if attention is None else attention.kept(sequences, seq_len, half_precision, on_gpu))
        for p, m, attention in zip(sizes.products, sizes.norms, sizes.attentions, strict=True)
    ]
    inputs = tokens * FLOAT32 * sizes.d_model * len(kept)
    whole = tokens * sizes.vocab_size <= cross_entropy.chunk(on_gpu)
    formed = tokens if whole else cross_entropy.chunk_rows(sizes.vocab_size, on_gpu)
    logits = formed * FLOAT32 * 3 * sizes.vocab_size
    copies = width * sizes.matrices if half_precision else 0
    outside = n - sum(sizes.blocks)
    gathered = FLOAT32 * (max(sizes.blocks) + outside) if engine.weights and devices > 1 else 0
    weights = FLOAT32 * n // (devices if engine.weights else 1)
    gradients = FLOAT32 * n // (devices if engine.gradients else 1)
    optimizer = FLOAT32 * (sizes.optimizer + engine.copies * n) // (devices if engine.optimizer else 1)
    activations = inputs + max(kept) if checkpoint_activations else sum(kept)
    all_stand = accumulates or devices > 1
    at_the_head = (inputs if checkpoint_activations else sum(kept)) + logits
    if all_stand:
        at_the_head += gradients + (0 if whole else FLOAT32 * sizes.head)
    else:
        at_the_head += min(gradients, FLOAT32 * sizes.head)
    at_the_end = (inputs if checkpoint_activations else 0) + max(kept) + gradients
    return Memory(
        weights=0 if engine.offloads else weights,
        gradients=gradients,
        optimizer=0 if engine.offloads else optimizer,
        activations=activations,
        logits=logits,
        workspace=copies + gathered + engine.buckets + (weights if averages else 0),
        states=FLOAT32 * (n + sizes.optimizer + (n if averages else 0)),
        overlap=activations + logits + gradients - max(at_the_head, at_the_end),
    )


@dataclass(frozen=True)
class Choice:
    """What a forecast is for; the cheaper come first."""

    engine: str
    checkpoint_activations: bool
    micro_batch_size: int


def choices_of_memory(per_device: int) -> Iterator[Choice]:
    """Choices, the cheapest first, each with fewer and fewer sequences at once, `per_device` at most.

    Engines that keep to the device come first, then the same with activations computed twice, at last those
    that offload. Fewer sequences cost next to nothing.
    """
    for offloads, checkpointed in itertools.product((False, True), repeat=2):
        for name, engine in ENGINES.items():
            if engine.offloads == offloads and (engine.recomputes or not checkpointed):
                for size in reversed([s for s in range(1, per_device + 1) if per_device % s == 0]):
                    yield Choice(name, checkpointed, size)


def number_of_bytes(text: str) -> int:
    """A size in bytes: `80GB` is 80·10⁹. Raises ValueError for what is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B", text)
    if match is None:
        raise ValueError(f"memory={text} is no size: write 80GB or 500MB")
    return round(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))
