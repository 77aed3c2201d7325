"""The forecast of memory, against what PyTorch allocates."""

import itertools
from typing import Any, cast

import pytest
import torch

from scantling.model import cross_entropy
from scantling.training import memory
from scantling.training.memory import (
    ENGINES,
    Choice,
    DecoderSizes,
    choices_of_memory,
    number_of_bytes,
    training_memory,
)
from scantling.training.optim import adamw, lion, muon, sgd

ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def forecast(decoder, **settings) -> memory.Memory:
    usual = {
        "half_precision": False,
        "checkpoint_activations": False,
        "engine": ENGINES["ddp"],
        "devices": 1,
        "accumulates": False,
        "averages": False,
        "on_gpu": False,
    }
    return training_memory(DecoderSizes.of(decoder, lambda named: adamw(named, **ADAMW)), **usual | settings)


def allocated(decoder, optimizer, sequences: int, half: bool) -> int:
    """Bytes at the peak of a training step, exactly: weights, optimiser, and all that PyTorch allocates."""
    tokens = torch.randint(0, decoder.embed.tokens.num_embeddings, (sequences, decoder.seq_len))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = decoder(tokens, targets_BT=tokens) / tokens.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes its state
    optimizer.zero_grad(set_to_none=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    assert profile.profiler is not None
    results = cast(Any, profile.profiler.kineto_results)
    events = [e for e in results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    states = (value for state in optimizer.state.values() for value in state.values())
    standing = sum(t.nbytes for t in itertools.chain(decoder.parameters(), states))
    return standing + max(itertools.accumulate(event.nbytes() for event in events))


SHAPES = {
    "narrow": (16, "model.d_model=128 model.d_ff=512 model.n_layers=4 model.seq_len=64"),
    "wide vocabulary": (
        2,
        "model.d_model=256 model.d_ff=1024 model.n_layers=3 model.seq_len=256 model.vocab_size=8192",
    ),
    "chunks": (
        4,
        "model.d_model=128 model.d_ff=512 model.n_layers=3 model.seq_len=128 model.vocab_size=8192",
    ),
    "gpt": (
        8,
        "model.d_model=192 model.d_ff=768 model.n_layers=3 model.seq_len=128 norm=layernorm pos=learned "
        "ffn=gelu model.dropout=0.1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_is_within_a_fifth_of_what_is_allocated(monkeypatch, nano, shape, half, checkpointed):
    sequences, overrides = SHAPES[shape]
    if shape == "chunks":
        monkeypatch.setattr(cross_entropy, "CHUNK", 2**20)  # of 128 tokens
    decoder = nano(*overrides.split())
    decoder.checkpoint_activations = checkpointed
    optimizer = adamw(decoder.named_parameters(), **ADAMW)
    measured = allocated(decoder, optimizer, sequences, half)
    predicted = forecast(
        decoder,
        sequences=sequences,
        seq_len=decoder.seq_len,
        half_precision=half,
        checkpoint_activations=checkpointed,
    )
    assert predicted.total / measured == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (adamw, ADAMW),
        (muon, ADAMW | {"momentum": 0.95}),
        (lion, {"lr": 1e-3, "lr_ratio": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}),
        (sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}),
        (sgd, {"lr": 0.1, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}),
    ],
)
def test_numbers_of_an_optimiser_are_those_of_a_real_step(nano, optimizer, settings):
    decoder = nano("embed=untied", "ffn=moe", "norm=layernorm", "model.bias=true")
    stepped = optimizer(decoder.named_parameters(), **settings)
    for p in decoder.parameters():
        p.grad = torch.ones_like(p)
    stepped.step()
    kept = sum(
        v.numel()
        for p in decoder.parameters()
        for v in stepped.state[p].values()
        if v is not None and v.shape == p.shape
    )
    assert memory.optimizer_numbers(decoder, lambda named: optimizer(named, **settings)) == kept


def test_shares_of_the_engines(composed):
    """Rajbhandari et al. 2020, arXiv:1910.02054, fig. 1 with Ψ = 7.5 B and 64 devices, in bytes a parameter
    as they stand there, K = 12: float32 weights count 4 with the optimiser's 8, where theirs are 2 and
    gradients 2.
    """
    n = 7_500_000_000
    sizes = DecoderSizes(
        parameters=n,
        optimizer=2 * n,
        blocks=(0,),
        matrices=0,
        head=0,
        vocab_size=0,
        d_model=0,
        products=(0,),
        norms=(0,),
        attentions=(None,),
    )

    def per_device(engine: str) -> float:
        settings = {"sequences": 1, "seq_len": 1, "half_precision": False, "checkpoint_activations": False}
        m = training_memory(
            sizes,
            engine=ENGINES[engine],
            devices=64,
            accumulates=False,
            averages=False,
            on_gpu=False,
            **settings,
        )
        return (m.weights + m.gradients + m.optimizer) / 1e9

    expected = {
        "ddp": 16 * 7.5,
        "zero1": (8 + 12 / 64) * 7.5,
        "zero2": (4 + 16 / 64) * 7.5,
        "zero3": 20 / 64 * 7.5,  # DeepSpeed keeps float32 copies of its weights
        "fsdp": 16 / 64 * 7.5,
    }
    for engine, size in expected.items():
        assert per_device(engine) == pytest.approx(size, rel=1e-6), engine
    bucket = composed("trainer=zero1").trainer.strategy.zero_optimization.reduce_bucket_size
    assert bucket == memory.BUCKET


def test_the_cheapest_comes_first():
    order = list(choices_of_memory(4))
    assert order[:4] == [Choice("ddp", False, size) for size in (4, 2, 1)] + [Choice("zero1", False, 4)]
    assert len(set(order)) == len(order) == (6 + 4) * 3
    kinds = [(ENGINES[choice.engine].offloads, choice.checkpoint_activations) for choice in order]
    assert kinds == sorted(kinds)


def test_sizes_as_they_are_typed():
    assert [number_of_bytes(text) for text in ("80GB", "1.5MB", "7B")] == [80 * 10**9, 1_500_000, 7]
    with pytest.raises(ValueError, match="memory=80 is no size: write 80GB or 500MB"):
        number_of_bytes("80")


def test_memory_of_weights_gradients_and_adamw_equals_torchs(nano):
    decoder = nano()
    optimizer = adamw(decoder.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decoder(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()

    def size(tensors) -> int:
        return sum(t.nbytes for t in tensors)

    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    memory = forecast(decoder, sequences=1, seq_len=8, accumulates=True)
    assert memory.weights == size(decoder.parameters())
    assert memory.gradients == size(p.grad for p in decoder.parameters())
    assert memory.optimizer == size(states)
    assert (
        memory.total
        == memory.weights + memory.gradients + memory.optimizer + memory.activations + memory.logits
    )
    assert memory.states == memory.weights + memory.optimizer


@pytest.mark.parametrize(
    "parts",
    [
        "norm=rmsnorm ffn=swiglu pos=rope",
        "norm=layernorm ffn=gelu pos=learned",
        "attn=mla attn.kv_rank=32",
        "ffn=moe",
        "ffn=moe_shared attn=mqa",
        "block=sandwich attn=mha_qk_norm",
        "block=rezero embed=factorised",
        "block=parallel head=adaptive",
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_memory_of_activations_is_near_what_autograd_keeps(nano, parts, half):
    decoder = nano(*parts.split(), "model.d_model=128", "model.d_ff=512", "model.n_layers=4")
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    tokens = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = decoder(tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    measured = sum(n for n, _ in kept.values())
    memory = forecast(decoder, sequences=4, seq_len=64, half_precision=half)
    estimate = memory.activations + memory.logits + memory.workspace  # which are the copies in half precision
    assert loss > 0
    assert 2 / 3 < estimate / measured < 3 / 2
