"""Directories that are there whole or not at all, whoever else is making the same one."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def under_construction(target: Path) -> Iterator[Path]:
    """A new directory beside `target` to build it in; removed afterwards unless published.

    Raises PermissionError where it cannot be made. What killed processes left is removed first.
    """
    site = f"{target.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.building"
    building = target.parent / site
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building.mkdir()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise PermissionError(
            f"cannot write to {target.parent}: {error.strerror}; choose another cache directory"
        ) from None
    remove_abandoned(target)
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def publish(building: Path, target: Path, *, is_usable: Callable[[], bool]) -> None:
    """Rename `building` to `target`, or leave `target` where another process was faster.

    A `target` that `is_usable` rejects is damaged: it is moved aside first and removed.
    """
    while True:
        try:
            building.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_usable():
            return
        damaged = Path(tempfile.mkdtemp(suffix=".damaged", dir=target.parent))
        try:
            target.rename(damaged / target.name)
        except FileNotFoundError:
            pass  # another process moved it first
        finally:
            shutil.rmtree(damaged, ignore_errors=True)


def remove_abandoned(target: Path) -> None:
    """Remove building sites of this target that a process on this host left when it died."""
    host = socket.gethostname()
    for site in target.parent.glob(f"{target.name}.*.building"):
        # A host's name may hold dots, so the parts are taken from the right.
        name, pid, _, _ = site.name.removeprefix(f"{target.name}.").rsplit(".", 3)
        if name == host and pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(site, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether a process of this number runs on this machine, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's process
    return True
