"""Every engine on two CPU processes, from the command line, against one process that trains alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from shop import TRAIN, assert_same_training

from scantling.inference.safe_loading import read_weights
from scantling.runs.directory import RunDirectory

WHOLE = "trainer.strategy.zero_optimization.stage3_param_persistence_threshold=0"  # cut up small tensors too
ENGINES = {
    "ddp": ("trainer=ddp",),
    "fsdp": ("trainer=fsdp",),
    "zero1": ("trainer=zero1",),
    "zero2": ("trainer=zero2",),
    "zero3": ("trainer=zero3", WHOLE),
    "zero3_offload": ("trainer=zero3_offload", WHOLE),
}
SPIKES = ("guard.spike=3", "guard.window=4", "guard.most=50", "lr=1e-5")
"""Some losses of these short runs are called spikes."""

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one(shop, alone, engine):
    extensions = shop.path / "extensions"
    environment = {"TORCH_EXTENSIONS_DIR": str(extensions)}
    whole = f"{engine}-whole"
    process = shop.start(*ENGINES[engine], "trainer.devices=2", runs=whole, environment=environment)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert "Warning" not in err
    assert "GLOBAL_RANK" not in err
    run = shop.directory(whole)
    assert not extensions.exists()  # nothing was compiled
    assert_same_training(run, alone)
    states = torch.load(run.last, weights_only=True)["callbacks"]["Checkpoints"]["random_states"]
    assert not torch.equal(*(state["torch"] for state in states))  # or dropout would leave out the same
    assert run.environment["world_size"] == 2
    assert run.curves.read_bytes().startswith(b"\x89PNG")
    ours, single = (texts(directory) for directory in (run, alone))
    assert ours == single


def texts(run: RunDirectory) -> list[str]:
    return run.samples.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [*((engine, engine) for engine in ENGINES), ("zero3", "fsdp"), ("fsdp", "zero3")]
)
def test_interrupted_engine_goes_on(shop, alone, before, after):
    # 16 sequences a step are 2 processes × 4 micro-batches × 2.
    common, runs = ("trainer.devices=2", "micro_batch_size=2"), f"{before}-{after}"
    by_lightning = before == after == "zero2"
    interrupt(shop, *ENGINES[before], *common, runs=runs, processes=1 if by_lightning else 2)
    # Computing activations twice changes nothing; ZeRO 3 refuses it.
    twice = [] if after.startswith("zero3") else ["trainer.checkpoint_activations=true"]
    assert_same_training(shop.run(*ENGINES[after], *common, *twice, runs=runs), alone)


def test_one_process_goes_on_where_two_were(shop, alone):
    """With 8 micro-batches a step, where they had 4 each: steps and validations stay where they are."""
    interrupt(shop, "trainer=ddp", "trainer.devices=2", "micro_batch_size=2", runs="two-one", processes=2)
    assert_same_training(shop.run("trainer=cpu", "micro_batch_size=2", runs="two-one"), alone)


def interrupt(shop, *options: str, runs: str, processes: int) -> None:
    """Start a run and let it end by a SIGTERM. The sample at step 10 leaves time for it."""
    process = shop.start(*options, "sample.n_tokens=300", runs=runs, processes=processes)
    while not list(shop.path.glob(f"{runs}/default/*/metrics.jsonl")) or not shop.directory(runs).metrics():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # to the first process alone; all stop after the same step
    out, err = process.communicate()
    assert process.returncode == 130, out + err
    assert "the same command goes on from there" in out
    assert 1 <= len(shop.directory(runs).metrics()) < 20


@pytest.mark.parametrize(("engine", "action"), [("ddp", "rollback"), ("fsdp", "skip")])
def test_processes_agree_on_a_bad_step(shop, engine, action):
    """On what is a spike, in two processes as in one."""
    guard = (f"guard.action={action}", *SPIKES)
    single = shop.run("trainer=cpu", *guard, runs=f"guard-{action}")
    run = shop.run(*ENGINES[engine], "trainer.devices=2", *guard, runs=f"guard-{action}-{engine}")
    assert_same_training(run, single)
    ours, expected = ([(r["step"], r["action"], r["samples"]) for r in r.guarded()] for r in (run, single))
    assert ours == expected
    assert 0 < len(ours) < 15


@pytest.mark.slow
def test_processes_average_weights_and_grow_batches_as_one(shop):
    """What a process averages is its own share, and of a batch that grows it trains as much as the others."""
    common = ("micro_batch_size=4", "batch_warmup.start=4", "batch_warmup.steps=6", "ema.decay=0.9")
    single = shop.run("trainer=cpu", *common, runs="averaged")
    expected = read_weights(single, "last_average")
    for engine in ("fsdp", "zero2"):
        run = shop.run(*ENGINES[engine], *common, "trainer.devices=2", runs=f"averaged-{engine}")
        assert_same_training(run, single)
        assert [row["tokens"] for row in run.metrics()] == [row["tokens"] for row in single.metrics()]
        average = read_weights(run, "last_average")
        assert average.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(average[name], weight, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_processes_balance_experts_as_one(shop):
    """The offsets of DeepSeek-V3's router move once a step, by all processes and micro-batches."""
    router = ("n_active=2", "n_groups=1", "n_active_groups=1", "load_balance=0", "speed=0.02")
    experts = ("ffn=moe_deepseek_v3", "ffn.n_dense=0", "ffn.rest.n_experts=4")
    common = (*experts, *(f"ffn.rest.router.{setting}" for setting in router))
    single = shop.run("trainer=cpu", *common, "micro_batch_size=16", runs="balanced")
    for engine in ("ddp", "zero2"):
        parallel = (*ENGINES[engine], "trainer.devices=2", "micro_batch_size=2")
        assert_same_training(shop.run(*parallel, *common, runs=f"balanced-{engine}"), single)


@pytest.mark.slow
def test_torchrun_starts_the_processes(shop, alone):
    """From nothing. With the loss in chunks, as of a large vocabulary: 100 of the 512 tokens of a process at
    once."""
    script = shop.path / "in_chunks.py"
    script.write_text(
        "import runpy, sys; from scantling.model import cross_entropy as c; c.CHUNK = 100 * 257; "
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    options = shop.options(*ENGINES["fsdp"], "trainer.devices=2", "paths.runs=torchrun")
    done = subprocess.run(
        [sys.executable, *torchrun, script, TRAIN, *options],
        cwd=shop.path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAIN.parent)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_training(shop.directory("torchrun"), alone)


def test_slurm_starts_the_processes(shop, alone):
    """srun's variables, set by hand."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    tasks = [
        shop.start(
            *("trainer=ddp", "trainer.devices=2"),
            runs="slurm",
            processes=1,
            environment={**job, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
        )
        for i in range(2)
    ]
    for task in tasks:
        out, err = task.communicate()
        assert task.returncode == 0, out + err
    assert_same_training(shop.directory("slurm"), alone)


def test_entries_read_what_an_engine_trained(shop, alone):
    """One file of weights, a sample and a loss, of zero3's run as of one process's."""
    run = shop.run(*ENGINES["zero3"], "trainer.devices=2", runs="read")
    file = shop.path / "zero3.safetensors"
    shop.entry("hub", "action=weights", f"run={run.path}", f"to={file}", "checkpoint=last")
    weights = load_file(file)
    single = read_weights(alone, "last")
    assert weights.keys() == single.keys()
    for name, weight in single.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=2e-5)
    said = [
        shop.entry(
            "sample", f"run={directory.path}", "checkpoint=last", "prompt=def", "n_tokens=8", "temperature=0"
        )
        for directory in (run, alone)
    ]
    assert said[0] == said[1]
    measured = shop.entry(
        "evaluate", f"run={run.path}", "checkpoint=last", "paths.cache=cache", "n_windows=8"
    )
    assert f"{alone.summary['val/bpb']:.3f}" in measured


@pytest.mark.slow
def test_a_repeated_run_has_one_directory(shop):
    """Also where Lightning starts the second process when the first has made the directory, and both are
    rolled back."""
    short = ("trainer=ddp", "trainer.devices=2", "resume=never", "guard.action=rollback", *SPIKES)
    for processes in (2, 1):
        process = shop.start(*short, runs="repeated", processes=processes)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    first, second = sorted((shop.path / "repeated" / "default").iterdir())
    assert second.name == f"{first.name}-2"
    assert all(RunDirectory(path).is_finished for path in (first, second))
    assert len(RunDirectory(first).guarded()) > 0
    assert RunDirectory(first).guarded() == RunDirectory(second).guarded()
    assert_same_training(RunDirectory(second), RunDirectory(first))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("trainer=ddp", "trainer.devices=3"),
            "batch_size 16 is not a multiple of 3 ranks; the nearest that fits is 15 or 18",
        ),
        (("trainer=ddp", "trainer.devices=0"), "trainer.devices=0: use auto or a positive number"),
        (("trainer=ddp", "trainer.nodes=0"), "trainer.nodes=0 must be a whole number, at least 1"),
        (("trainer=zero2", "trainer.devices=2", "optim=muon"), "optim=muon works on whole matrices"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(shop, overrides, line):
    assert line in shop.refused(*overrides)
