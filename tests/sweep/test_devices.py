"""What is handed out never exceeds what there is, and all of it is used where the jobs allow."""

import itertools
import random

import pytest

from scantling.runs.directory import RunDirectory
from scantling.sweep.devices import Devices, visible_gpus
from scantling.sweep.jobs import Job, label_jobs


def job(devices: int, *, on_gpu: bool = False) -> Job:
    return Job(0, [], "", RunDirectory("nowhere"), devices, nodes=1, on_gpu=on_gpu, steps=1)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("cores", "n_jobs", "jobs", "processes", "at_once", "threads"),
    [
        (8, None, 40, 1, 8, 1),  # one-core jobs fill the machine
        (8, None, 3, 1, 3, 2),  # three jobs: two cores each
        (8, 2, 40, 1, 2, 4),
        (8, None, 40, 2, 4, 1),
        (8, 1, 40, 4, 1, 2),
        (2, None, 4, 2, 1, 1),
        (2, None, 4, 3, 1, 1),  # more processes than cores: alone
    ],
)
def test_cores_are_shared_out(cores, n_jobs, jobs, processes, at_once, threads):
    devices = Devices(cores, (), n_jobs, jobs)
    taken = (devices.take(job(processes)) for _ in range(jobs))
    shares = [share for share in itertools.takewhile(bool, taken) if share is not None]
    assert (len(shares), shares[0].threads) == (at_once, threads)
    devices.give_back(shares[0])
    assert devices.take(job(processes)) is not None


def test_no_gpu_and_no_core_is_ever_held_twice():
    choose = random.Random(0)
    devices = Devices(6, ("3", "5", "6", "7"), None, jobs=50)
    held = []
    for _ in range(2000):
        if held and choose.random() < 0.5:
            devices.give_back(held.pop(choose.randrange(len(held))))
        else:
            share = devices.take(job(choose.randint(1, 4), on_gpu=choose.random() < 0.5))
            held += [] if share is None else [share]
        gpus = [gpu for share in held for gpu in share.gpus]
        assert len(gpus) == len(set(gpus)) <= 4
        assert sum(share.cores for share in held) <= 6


def test_a_users_own_choice_of_devices_stands(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert visible_gpus(2) == ("4", "GPU-abc")
    share = Devices(8, (), 1, jobs=1).take(job(1))
    assert share is not None
    assert share.threads == 1


def test_a_label_says_what_differs():
    common = ["sweeps=norms", "model=nano"]
    assert label_jobs([[*common, "norm=none", "seed=0"], [*common, "norm=none", "seed=1"]]) == [
        "seed=0",
        "seed=1",
    ]
    arms = [[*common, "arm=plain"], [*common, "norm=none", "arm=bare"], [*common, "pos=alibi", "arm=alibi"]]
    assert label_jobs(arms) == ["arm=plain", "arm=bare", "arm=alibi"]
    cells = [
        ["lr=1", "arm=small", "d=1", "l=1"],
        ["lr=2", "arm=small", "d=1", "l=1"],
        ["lr=1", "arm=large", "d=2", "l=1"],
    ]
    assert label_jobs(cells) == ["lr=1 arm=small", "lr=2 arm=small", "lr=1 arm=large"]
