"""A training command in a forked child, for the scripts that cut it short."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scantling.cli.train import train
from scantling.config.command_line import run_entry
from scantling.sweep.processes import Process


class Child(Process):
    """`train.py` with these overrides; what it prints goes to `log`, and `before` runs in it first."""

    def __init__(self, log: Path, *overrides: str, before: Callable[[], object] = lambda: None):
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            code = 1
            try:
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.dup2(out, 2)
                before()
                sys.argv = ["train.py", *overrides]
                run_entry(train, config_name="train")
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stdout.flush()
                os._exit(code if isinstance(code, int) else 1)
        super().__init__(pid)
        self.log = log

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code
