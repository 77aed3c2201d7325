"""A job's process: forked from this one, which has imported PyTorch and Lightning, or started afresh."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scantling.config.mistakes import Failed, Mistake
from scantling.config.options import ROOT
from scantling.runs.parent_process import end_with_parent

TAKEN_OVER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGTSTP)
"""Signals that a launcher may have handlers for."""


class Process:
    """A child in a process group of its own, so that the terminal's Ctrl-C goes to the launcher alone."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, the signal's number with a minus where one killed it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def ask_to_stop(self) -> None:
        """Send SIGTERM: a run answers with a checkpoint, and so do the ranks that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill it with all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def fork_job(task: Callable[[], int], log: Path, environment: dict[str, str]) -> Process:
    """Call `task` in a child, whose output goes to `log` and whose exit code is what `task` returns."""
    parent = os.getpid()
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Hold signals back until the child has its own handlers: this process's would do nothing there.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN_OVER)
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(child, child)  # in both: whoever comes first
        return Process(child)
    code = 1
    try:
        become_a_job(parent, mask, log, environment)
        code = task()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def become_a_job(parent: int, mask: Iterable[int], log: Path, environment: dict[str, str]) -> None:
    """Give this fresh child its own group, signals, output and environment; it dies with its launcher."""
    os.setpgid(0, 0)
    for which in TAKEN_OVER:
        signal.signal(which, signal.default_int_handler if which == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    end_with_parent(parent)  # the launcher, who alone renews the job's lease
    redirect_output(log)
    # Whatever stood in their place, a test's or a terminal's.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)


def redirect_output(log: Path) -> None:
    """Append the standard output and error of this process and its children to a file; input is empty."""
    source = os.open(os.devnull, os.O_RDONLY)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for ours, standard in ((source, 0), (target, 1), (target, 2)):
        os.dup2(ours, standard)


def run_afresh(overrides: Sequence[str]) -> NoReturn:
    """Become `python src/train.py` with these overrides, which starts ranks by the same command."""
    command = [sys.executable, str(ROOT / "src" / "train.py"), *overrides, "hydra.mode=RUN"]
    os.execv(sys.executable, command)


def ask_child(question: Callable[[], Any]) -> Any:
    """What `question` returns, as JSON, asked in a child, which leaves nothing behind here.

    It may compute, and look for GPUs. A Mistake that it raises is raised here.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.close(reading)
            try:
                answer = {"answer": question()}
            except Mistake as mistake:
                answer = {"mistake": str(mistake)}
            with open(writing, "w") as file:
                json.dump(answer, file)
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if not text:
        raise Failed(f"the look ahead at the jobs ended with code {os.waitstatus_to_exitcode(status)}")
    answer = json.loads(text)
    if "mistake" in answer:
        raise Mistake(answer["mistake"])
    return answer["answer"]
