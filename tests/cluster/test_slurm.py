"""A real SLURM of this machine: single jobs from docs/cluster.md's sbatch file, and sweeps by
hydra/launcher=submitit_slurm.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_machine
import pytest
from shop import TRAIN, assert_same_training
from warm import Command

from scantling.runs.directory import RunDirectory

ROOT = TRAIN.parents[1]
SWEEP = (
    "-m",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.poll_seconds=0.3",
    "hydra.launcher.timeout_min=10",
)
SBATCH = shutil.which("sbatch", path=one_machine.search_path())
TWO_TASKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=wandb")

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(bool(reason := one_machine.reason_not_to()), reason=str(reason)),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with one_machine.slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "WANDB_MODE": "offline"}


def wait_for(condition, process: Command | None = None, patience: float = 300):
    """What `condition` gives once it gives anything; `process` must not end before."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def queue(environment) -> dict[str, str]:
    """SLURM's word for each job that has not ended."""
    command = ["squeue", "--array", "--noheader", "--format=%i %T"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split() for line in asked.stdout.splitlines())


def hurry(environment: dict[str, str], number: str) -> None:
    """Once a job is queued again, let it start soon: SLURM would wait for two minutes. Within the same second
    it would hold its credential for that of the time before, which it has revoked.
    """
    (state,) = wait_for(lambda: {"PENDING", "gone"} & {queue(environment).get(number, "gone")})
    assert state == "PENDING"
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now+3"], env=environment, check=True)


def runs_of(path: Path) -> list[RunDirectory]:
    return [RunDirectory(p) for p in sorted(path.glob("default/nano-*"))]


def has_begun(path: Path) -> bool:
    """Whether steps were taken, with time left before the last: after the tenth comes a long sample."""
    return any(0 < len(run.metrics()) < 20 for run in runs_of(path))


def wandb_runs(path: Path) -> set[str]:
    """Ids of the offline segments."""
    return {p.name.split("-", 3)[3] for p in path.glob("default/wandb/offline-run-*")}


@pytest.mark.slow
def test_every_job_of_a_sweep_runs_once_whatever_becomes_of_the_launcher(shop, slurm, tmp_path):
    """Ctrl-C comes to the first launcher while sbatch has taken the jobs and not yet said their numbers, to
    the second while it watches; the third sees them end.
    """
    runs = shop.path / "sweep"
    held = "+hydra.launcher.additional_parameters.hold=true"
    arguments = (*SWEEP, "seed=0,1,2", "budget.steps=2", held)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nsaid=$({SBATCH} "$@")\nkill -INT $PPID\nsleep 1\necho "$said"\n')
    sbatch.chmod(0o755)
    interrupting = slurm | {"PATH": f"{tmp_path}:{slurm['PATH']}"}
    first = shop.start(*arguments, runs="sweep", environment=interrupting)
    out, err = first.communicate(timeout=300)
    assert first.returncode == 130, out + err
    waiting = list(queue(slurm))
    assert len(waiting) == 3
    assert {*waiting} <= {*out.partition("scancel")[2].split()}

    def watching():
        launcher = shop.start(*arguments, runs="sweep", environment=slurm)
        wait_for(lambda: launcher.said().count("queued: SLURM's job") == len(waiting), launcher)
        return launcher

    second = watching()
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 130, out + err
    assert "the jobs stay with SLURM" in out

    third = watching()
    cancelled, *others = waiting
    subprocess.run(["scancel", cancelled], env=slurm, check=True)
    subprocess.run(["scontrol", "release", *others], env=slurm, check=True)
    out, err = third.communicate(timeout=300)
    assert third.returncode == 1, out + err
    assert err.strip() == "error: 1 of 3 jobs failed"
    of = {json.loads((run.path / "slurm.json").read_text())["job"]: run for run in runs_of(runs)}
    assert [of[number].is_finished for number in waiting] == [False, True, True]
    for number in others:
        assert (of[number].path / "log.txt").read_text().count("directory  ") == 1
    assert json.loads((of[cancelled].path / "failed.json").read_text())["reason"] == "SLURM's job is no more"


@pytest.mark.slow
def test_two_tasks_are_one_run_that_goes_on_when_its_time_is_up(shop, alone, slurm):
    runs = shop.path / "tasks"
    sweep = shop.start(
        *SWEEP, "seed=0", *TWO_TASKS, "sample.n_tokens=2000", runs="tasks", processes=1, environment=slurm
    )
    wait_for(lambda: has_begun(runs), sweep)
    (job,) = queue(slurm)
    subprocess.run(
        ["scancel", "--signal=USR1", job], env=slurm, check=True
    )  # as before the limit, to its tasks
    hurry(slurm, job)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    (run,) = runs_of(runs)
    assert "resuming after step" in (run.path / "log.txt").read_text()
    assert_same_training(run, alone)
    assert wandb_runs(runs) == {run.wandb_id}


@pytest.mark.slow
def test_the_sbatch_file_of_the_docs(shop, alone, slurm, tmp_path):
    """On one node of two CPUs; requeued, it goes on."""
    (text,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    (tmp_path / "train.sbatch").write_text(text.replace("#SBATCH --gpus-per-node=8\n", ""))
    (tmp_path / "src").symlink_to(ROOT / "src")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "book.txt").symlink_to(shop.path / "book.txt")
    here = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
    options = shop.options(
        "trainer.accelerator=cpu", "sample.n_tokens=2000", "paths.runs=runs", "logger=wandb"
    )
    command = ["sbatch", "--parsable", *here, "train.sbatch", *options]
    submitted = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True, check=True)
    number = submitted.stdout.strip()
    wait_for(lambda: has_begun(tmp_path / "runs"))
    subprocess.run(["scontrol", "requeue", number], env=slurm, check=True)
    hurry(slurm, number)
    wait_for(lambda: number not in queue(slurm))
    said = (tmp_path / f"train-{number}.txt").read_text()
    (run,) = runs_of(tmp_path / "runs")
    assert run.is_finished, said
    assert "resuming after step" in said
    assert run.environment["world_size"] == 2
    assert_same_training(run, alone)
    assert wandb_runs(tmp_path / "runs") == {run.wandb_id}


def test_what_slurm_refuses_is_one_line(shop, slurm):
    process = shop.start(*SWEEP, "seed=0", "hydra.launcher.partition=none", runs="refused", environment=slurm)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert err.strip() == (
        "error: SLURM does not take the jobs: sbatch: error: Batch job submission failed: "
        "Invalid partition name specified"
    )
