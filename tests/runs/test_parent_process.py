"""A process that ends with its parent."""

import os
import signal
import sys
import time

import pytest

from scantling.runs.parent_process import end_with_parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")


def fork(call) -> int:
    """The id of a child that calls this and ends."""
    if (pid := os.fork()) == 0:
        try:
            call()
        finally:
            os._exit(0)
    return pid


def test_it_is_killed_when_its_parent_is():
    """The pipe of a grandchild that would speak in a minute is closed when the child between is killed."""
    reading, writing = os.pipe()

    def grandchild():
        end_with_parent(os.getppid())
        os.write(writing, b"asleep")
        time.sleep(60)
        os.write(writing, b"awake")

    def child():
        fork(grandchild)
        os.close(writing)
        time.sleep(60)

    pid = fork(child)
    os.close(writing)
    assert os.read(reading, 6) == b"asleep"
    os.kill(pid, signal.SIGKILL)
    assert os.read(reading, 6) == b""
    os.waitpid(pid, 0)
    os.close(reading)


def test_it_ends_when_its_parent_ended_before():
    pid = fork(lambda: end_with_parent(os.getpid()))  # which is no parent of itself
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
