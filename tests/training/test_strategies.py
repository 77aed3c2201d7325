"""What an engine refuses; that it trains as one process does stands in tests/training/test_engines.py."""

import pytest
import torch

from scantling.training import strategies
from scantling.training.launch import check_launch, devices_per_node
from scantling.training.strategies import FullySharded, Zero

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


LAUNCHERS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
    "SLURM": {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_and_settings_must_agree(monkeypatch, launcher):
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    check_launch(2, 2)
    for devices, nodes in ((2, 1), (4, 1)):
        with pytest.raises(
            ValueError, match=rf"{launcher} started 4 process\(es\), 2 a node, but trainer.devices={devices} "
        ):
            check_launch(devices, nodes)


def test_tasks_without_a_number_for_each_node(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match="say --ntasks-per-node=2"):
        check_launch(2, 1)


def test_other_hosts_need_somebody_who_starts_them(monkeypatch):
    check_launch(2, 1)
    with pytest.raises(ValueError, match="nothing started this on other hosts"):
        check_launch(2, 2)
    monkeypatch.setenv("NODE_RANK", "1")
    check_launch(2, 2)
