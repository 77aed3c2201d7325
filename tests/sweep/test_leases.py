"""Of several who want one job, one gets it."""

import json
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest

from scantling.sweep.leases import Lease, host_name, is_held, lease_files, process_start

SECONDS = 60


def take(folder: Path) -> Lease:
    """A lease that nobody else may hold."""
    lease = Lease.take(folder, SECONDS)
    assert lease is not None
    return lease


def age(lease: Lease, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lease.path, (then, then))


def test_a_held_lease_is_nobody_elses(tmp_path):
    mine = take(tmp_path)
    assert Lease.take(tmp_path, SECONDS) is None
    os.utime(mine.path)
    before = mine.path.stat().st_mtime
    age(mine, SECONDS - 5)
    assert mine.beat()
    assert mine.path.stat().st_mtime >= before
    mine.release()
    assert Lease.take(tmp_path, SECONDS) is not None


def test_a_stale_lease_is_taken_over_and_its_holder_learns_of_it(tmp_path):
    sleeper = take(tmp_path)
    age(sleeper, SECONDS + 5)
    heir = take(tmp_path)
    assert not sleeper.beat()
    assert heir.beat()
    sleeper.release()  # at its end, as always
    assert heir.beat()
    # The heir is done; a third comes to the number that the sleeper had.
    heir.release()
    third = take(tmp_path)
    assert third.path == sleeper.path
    assert not sleeper.beat()
    assert not sleeper.write([os.getpid()])
    sleeper.release()
    assert third.beat()
    assert Lease.take(tmp_path, SECONDS) is None


def test_a_dead_process_of_this_host_holds_nothing(tmp_path):
    lease = take(tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    lease.write([process.pid])
    assert is_held(lease.path, SECONDS)
    process.kill()
    while process_start(process.pid) is not None:  # not yet waited for: a zombie is dead too
        time.sleep(0.01)
    assert not is_held(lease.path, SECONDS)
    process.wait()
    # Its number may be another's by now.
    holder = json.loads(lease.path.read_text())
    holder["processes"] = {str(os.getpid()): "0"}
    lease.path.write_text(json.dumps(holder))
    assert not is_held(lease.path, SECONDS)
    # Of another host only the clock tells.
    lease.path.write_text(json.dumps(holder | {"host": "elsewhere"}))
    assert is_held(lease.path, SECONDS)
    assert host_name() != "elsewhere"


def contend(folder, start, winners):
    start.wait()
    lease = Lease.take(folder, SECONDS)
    if lease is not None:
        winners.put(lease.token)
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_wins(tmp_path, stale):
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        if stale:
            folder.mkdir()
            age(take(folder), SECONDS + 5)
        start, winners = context.Event(), context.SimpleQueue()
        many = [context.Process(target=contend, args=(folder, start, winners)) for _ in range(8)]
        for process in many:
            process.start()
        start.set()
        for process in many:
            process.join()
        tokens = []
        while not winners.empty():
            tokens.append(winners.get())
        assert len(tokens) == 1
        assert [json.loads(path.read_text())["token"] for path in lease_files(folder)] == tokens
