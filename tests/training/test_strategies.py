"""What an engine refuses; that it trains as one process does stands in tests/test_engines.py."""

import pytest
import torch

from scantling.training import strategies
from scantling.training.strategies import FullySharded, Zero, check_launch, devices_per_node

GPU = torch.device("cuda")


def test_more_devices_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_per_node("auto", GPU) == devices_per_node(2, GPU) == 2
    with pytest.raises(ValueError, match=r"trainer.devices=8, but there are 2 GPUs here"):
        devices_per_node(8, GPU)
    assert devices_per_node("auto", torch.device("cpu")) == 1
    assert devices_per_node(8, torch.device("cpu")) == 8


def test_an_engine_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs DeepSpeed: pip install deepspeed"):
        Zero(GPU, "bf16", zero_optimization={"stage": 2})


def test_float16_is_not_sharded():
    with pytest.raises(ValueError, match="use bf16 or fp32"):
        FullySharded(GPU, "fp16", reshard_after_forward=True)


@pytest.mark.parametrize(
    ("launcher", "variables"),
    [
        (
            "torchrun",
            {
                "TORCHELASTIC_RUN_ID": "1",
                "WORLD_SIZE": "4",
                "RANK": "0",
                "GROUP_RANK": "0",
                "LOCAL_RANK": "0",
            },
        ),
        ("SLURM", {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}),
    ],
)
def test_launcher_and_settings_must_agree(monkeypatch, launcher, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_launch(2, 2)
    with pytest.raises(
        ValueError, match=rf"{launcher} started 4 process\(es\), but trainer.devices=2 × trainer.nodes=1"
    ):
        check_launch(2, 1)
