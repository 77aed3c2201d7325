"""The training task in a real Lightning Trainer, against plain PyTorch and `transformers`."""

import copy
import math
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.testing import assert_close
from torch.utils.data import DataLoader

from scantling.inference.text_loss import TextLoss
from scantling.model.cross_entropy import IGNORED, negative_log_likelihood
from scantling.model.scores import RECOMPILATIONS
from scantling.training.optim import sgd
from scantling.training.task import LanguageModelTask

B, T, V = 8, 16, 512
LR = 0.5


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def targets(tokens) -> torch.Tensor:
    """Rows with 16, 1, 5 … targets to predict: a mean over micro-batches' means would be another number."""
    targets = tokens[:, 1:].clone()
    for row, valid in zip(targets, (16, 1, 5, 11, 2, 16, 9, 3), strict=True):
        row[valid:] = IGNORED
    return targets


def task_of(
    decoder, *, total_steps: int = 1, schedule=lambda step, total: 1.0, compiled: bool = False
) -> LanguageModelTask:
    return LanguageModelTask(
        decoder,
        optimizer=lambda named: sgd(named, lr=LR, momentum=0.0, nesterov=False, weight_decay=0.0),
        schedule=schedule,
        total_steps=total_steps,
        token_bytes=np.ones(V, dtype=np.int64),
        compiled=compiled,
    )


def batches(inputs, targets, micro_batch_size: int) -> list[dict]:
    """One optimiser step cut into micro-batches, each with the step's count of valid targets."""
    step_targets = int((targets != IGNORED).sum())
    cut = zip(inputs.split(micro_batch_size), targets.split(micro_batch_size), strict=True)
    return [{"inputs": i, "targets": t, "step_targets": step_targets} for i, t in cut]


def fit(
    task,
    rows: list[dict],
    *,
    accumulate: int,
    clip: float | None = None,
    validate=(),
    callbacks=(),
    plugins=(),
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=len(rows) // accumulate,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        plugins=list(plugins),
    )
    loader, validation = (DataLoader(cast(Any, list(of)), batch_size=None) for of in (rows, validate))
    trainer.fit(task, loader, validation if validate else None)
    return trainer


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:GPU available but not used.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)


def plain_step(decoder, inputs, targets, clip: float = math.inf) -> tuple[float, float]:
    """One step of gradient descent on the mean loss of the whole batch; loss and gradient norm."""
    loss = torch.nn.functional.cross_entropy(
        decoder(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), clip)
    with torch.no_grad():
        for p in decoder.parameters():
            p.sub_(LR * p.grad)
            p.grad = None
    return loss.item(), norm.item()


@pytest.mark.parametrize("micro_batch_size", [8, 4, 2, 1])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_equals_the_whole_batch_and_plain_pytorch(nano, tokens, targets, micro_batch_size, clip):
    decoder = nano(gain=8)
    by_hand = copy.deepcopy(decoder)
    before = copy.deepcopy(decoder)
    task = task_of(decoder)
    fit(task, batches(tokens[:, :-1], targets, micro_batch_size), accumulate=B // micro_batch_size, clip=clip)
    loss, norm = plain_step(by_hand, tokens[:, :-1], targets, math.inf if clip is None else clip)
    for (name, p), q, start in zip(
        decoder.named_parameters(), by_hand.parameters(), before.parameters(), strict=True
    ):
        assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert not torch.equal(p, start), name
    assert task.take_step_loss().item() == pytest.approx(loss, rel=1e-5)
    assert task.step_state.grad_norm.item() == pytest.approx(norm, rel=1e-4)  # before clipping
    assert task.step_state.lr == LR


def test_a_scaled_loss_is_clipped_by_the_norm_of_its_own_gradient(nano, tokens, targets):
    """float16, whose loss scale a fused optimiser takes off itself, after clipping."""
    decoder = nano(gain=8)
    by_hand = copy.deepcopy(decoder)
    task = task_of(decoder)
    half = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    fit(task, batches(tokens[:, :-1], targets, 4), accumulate=2, clip=0.1, plugins=[half])
    _, norm = plain_step(by_hand, tokens[:, :-1], targets, 0.1)
    assert norm > 1
    assert task.step_state.grad_norm.item() == pytest.approx(norm, rel=1e-2)
    for p, q in zip(decoder.parameters(), by_hand.parameters(), strict=True):
        assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_a_compiled_model_is_compiled_for_each_of_many_sizes_of_batch(nano):
    """Past torch's own limit of 8 the rest of a run would not be. Batch-size warm-up has as many as it has
    steps."""
    task_of(nano(), compiled=True)
    assert torch._dynamo.config.recompile_limit == RECOMPILATIONS > 100


def test_experts_are_rebalanced_once_a_step(nano, tokens, targets):
    decoder = nano("ffn=moe_deepseek_v3", "ffn.n_dense=0")
    fit(task_of(decoder), batches(tokens[:, :-1], targets, 4), accumulate=2)
    corrections = torch.stack([router.correction for router in decoder.routers])
    assert corrections.any(1).all()
    assert corrections.abs().max().item() == pytest.approx(1e-3)


def test_step_loss_starts_anew_after_it_is_taken(nano, tokens, targets):
    task = task_of(nano())
    fit(task, batches(tokens[:, :-1], targets, 4), accumulate=2)
    assert task.take_step_loss() > 0
    assert task.take_step_loss() == 0


def test_the_schedule_multiplies_the_rate_of_each_step(nano, tokens, targets):
    """Three steps at 1, 1/2 and 1/4 of the rate equal plain steps at those rates."""
    decoder = nano(gain=8)
    by_hand = copy.deepcopy(decoder)
    task = task_of(decoder, total_steps=3, schedule=lambda step, total: 2.0**-step * total / 3)
    fit(task, 3 * batches(tokens[:, :-1], targets, 4), accumulate=2)
    for step in range(3):
        loss = torch.nn.functional.cross_entropy(
            by_hand(tokens[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=IGNORED
        )
        for p, g in zip(
            by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters())), strict=True
        ):
            p.data.sub_(LR * 2.0**-step * g)
    for p, q in zip(decoder.parameters(), by_hand.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert task.step_state.lr == LR / 4


def test_training_loss_equals_gpt2s(gpt2_pair, tokens):
    """`transformers` shifts the labels itself; our targets come shifted."""
    ours, theirs = gpt2_pair()
    task = task_of(ours.train())
    fit(task, batches(tokens[:, :-1], tokens[:, 1:], B), accumulate=1)
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens).loss
    assert task.take_step_loss().item() == pytest.approx(expected.item(), rel=1e-5)


def test_negative_log_likelihood_by_hand():
    """Two classes: -ln p is ln(1 + e^-d) with d the target's lead; summed, the ignored left out."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 5.0]]])
    nats = negative_log_likelihood(logits, torch.tensor([[0, 0, IGNORED]]))
    assert nats.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)))


def test_negative_log_likelihood_is_taken_in_float32():
    """In bfloat16 a sum over thousands of tokens would keep two or three digits."""
    logits = torch.zeros(1, 3000, 7, dtype=torch.bfloat16)
    nats = negative_log_likelihood(logits, torch.zeros(1, 3000, dtype=torch.long))
    assert nats.item() == pytest.approx(3000 * math.log(7), rel=1e-6)


def test_bits_per_byte_by_hand():
    """8 nats over 4 targets that stand for 1 + 3 + 2 + 0 bytes, end-of-text (id 3) for none."""
    text_loss = TextLoss(np.array([1, 3, 2, 0]))
    text_loss.add(torch.tensor(5.0), torch.tensor([[0, 1, IGNORED]]))
    text_loss.add(torch.tensor(3.0), torch.tensor([[2, 3]]))
    assert text_loss.results() == pytest.approx(
        {"loss": 2.0, "bpb": 8 / math.log(2) / 6, "perplexity": math.exp(2)}
    )


def test_a_uniform_model_over_bytes_takes_eight_bits_per_byte():
    targets = torch.arange(256)[None]
    text_loss = TextLoss(np.ones(256, dtype=np.int64))
    text_loss.add(negative_log_likelihood(torch.zeros(1, 256, 256), targets), targets)
    assert text_loss.results()["bpb"] == pytest.approx(8.0, rel=1e-6)
    assert text_loss.results()["perplexity"] == pytest.approx(256, rel=1e-5)


def test_bits_per_byte_do_not_depend_on_the_cut_into_batches(tokens, targets):
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(1))
    token_bytes = np.arange(V) % 5
    results = []
    for size in (8, 3, 1):
        text_loss = TextLoss(token_bytes)
        for l, t in zip(logits.split(size), targets.split(size), strict=True):  # noqa: E741
            text_loss.add(negative_log_likelihood(l, t), t)
        results.append(text_loss.results())
    assert results[0] == pytest.approx(results[1], rel=1e-6)
    assert results[0] == pytest.approx(results[2], rel=1e-6)


def test_validation_equals_gpt2s_loss(gpt2_pair, tokens):
    """After training a step at rate 0, over unequal validation batches."""
    ours, theirs = gpt2_pair()
    task = task_of(ours.train(), schedule=lambda step, total: 0.0)
    rows = batches(tokens[:, :-1], tokens[:, 1:], B)
    fit(task, rows, accumulate=1, validate=batches(tokens[:, :-1], tokens[:, 1:], 3))
    with torch.no_grad():
        expected = theirs(tokens, labels=tokens).loss.item()
    results = task.text_loss.results()
    assert results["loss"] == pytest.approx(expected, rel=1e-5)
    assert results["bpb"] == pytest.approx(expected / math.log(2), rel=1e-5)  # one byte a token
