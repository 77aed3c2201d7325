"""The gradient noise scale, where it is known."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_task import B, T, batches, fit, task_of

from scantling.training.noise import NoiseScale, estimates
from scantling.training.step import StepState

DIMENSIONS = 50


def test_estimates_have_no_bias():
    """Gradients of single examples are normal around G, of variance σ² in 50 directions: tr Σ = 50·σ²."""
    torch.manual_seed(0)
    g, sigma, small, big = torch.randn(DIMENSIONS), 3.0, 4, 32
    found = []
    for _ in range(4000):
        examples = g + sigma * torch.randn(big, DIMENSIONS)
        norms = (examples[:small].mean(0).square().sum(), examples.mean(0).square().sum())
        found.append(torch.stack(estimates(*norms, small, big)))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 4000**0.5
    expected = torch.stack([g.square().sum(), torch.tensor(DIMENSIONS * sigma**2)])
    assert ((mean - expected).abs() < 4 * error).all()
    assert (error < 0.03 * expected).all()


def test_a_known_noise_scale_comes_out():
    """Averages over steps give tr Σ/|G|² in the unit that batches are counted in."""
    torch.manual_seed(0)
    g, sigma = torch.full((DIMENSIONS,), 0.5), 2.0
    noise = NoiseScale(micro_batches=4, processes=1, tokens_before=lambda step: 32 * step)
    noise.DECAY = 0.999

    task = SimpleNamespace(step_state=StepState())
    values = []
    for step in range(6000):
        examples = g + sigma * torch.randn(32, DIMENSIONS)
        noise.small, task.step_state.grad_norm = examples[:8].mean(0).square().sum(), examples.mean(0).norm()
        noise.on_step(cast(Any, None), task, step)
        if step > 3000:
            values.append(noise.columns()["noise_scale"])
    assert sum(values) / len(values) == pytest.approx(sigma**2 / 0.25, rel=0.1)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
)
def test_norms_are_those_of_the_mean_gradients(nano):
    """Of the first micro-batch and of the whole step, in a real trainer, against gradients one by one."""
    decoder, rows = nano(gain=4), torch.randint(512, (B, T + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = rows[:, :-1], rows[:, 1:]
    norms = []
    for size in (2, B):
        loss = decoder(inputs[:size], targets_BT=targets[:size]) / (size * T)
        gradients = torch.autograd.grad(loss, list(decoder.parameters()))
        norms.append(torch.cat([g.flatten() for g in gradients]).square().sum())
    task = task_of(decoder)
    noise = NoiseScale(micro_batches=B // 2, processes=1, tokens_before=lambda step: B * T * step)
    fit(task, batches(inputs, targets, 2), accumulate=B // 2, callbacks=[noise])
    torch.testing.assert_close(noise.small, norms[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(task.step_state.grad_norm.square(), norms[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ((), "noise_scale=true compares a micro-batch with the whole step"),
        (("trainer=fsdp", "trainer.accelerator=cpu", "micro_batch_size=2"), "noise_scale=true is for"),
    ],
)
def test_mistakes(command, overrides, line):
    code, _, err = command("noise_scale=true", *overrides)
    assert code == 2
    assert line in err
