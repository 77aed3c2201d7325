"""Leases: they settle which of several launchers over one folder runs a job.

A lease is `lease-N.json` in the run's directory, made with O_EXCL; its age is its last heartbeat. A stale one
is not removed but outnumbered: of those who take a job over only one can make `lease-N+1.json`, and a holder
who was only asleep sees it at its next heartbeat.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import tempfile
from pathlib import Path


class Lease:
    """The right to run one job, held until `release`. `beat` renews it."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token

    @classmethod
    def take(cls, folder: Path, seconds: float) -> Lease | None:
        """The right to run the job of a folder; None where another holds it.

        It holds it if it renewed the lease within so many `seconds` and is not known to be dead.
        """
        folder.mkdir(parents=True, exist_ok=True)
        before = lease_files(folder)
        if any(is_held(path, seconds) for path in before):
            return None
        path = folder / f"lease-{max(map(lease_number, before), default=0) + 1}.json"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        os.close(descriptor)
        lease = cls(path, secrets.token_hex(8))
        lease.put([os.getpid()])
        # Since the look at the folder another lease may have come and gone, and a third have come.
        if any(is_held(other, seconds) for other in lease_files(folder) if other != path):
            lease.release()
            return None
        for stale in before:
            stale.unlink(missing_ok=True)
        return lease

    def write(self, pids: list[int]) -> bool:
        """Renew, and note the processes whose death ends the lease; False where another has the job now."""
        if not self.beat():
            return False
        self.put(pids)
        return True

    def put(self, pids: list[int]) -> None:
        """Write who holds it and by which processes, whole or not at all."""
        holder = {
            "token": self.token,
            "host": host_name(),
            "processes": {str(pid): process_start(pid) for pid in pids},
        }
        partial = self.path.with_name(f"{self.path.name}.{self.token}")
        partial.write_text(json.dumps(holder))
        os.replace(partial, self.path)

    def beat(self) -> bool:
        """Renew; False where another has taken the job over."""
        if not self.is_there() or any(
            lease_number(path) > lease_number(self.path) for path in lease_files(self.path.parent)
        ):
            return False
        os.utime(self.path)
        return True

    def is_there(self) -> bool:
        """Whether its file is still its own: once all are released, numbers begin anew."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return False
        return bool(text) and json.loads(text)["token"] == self.token

    def release(self) -> None:
        """Give it up, unless another has taken its place."""
        if self.is_there():
            self.path.unlink(missing_ok=True)


def lease_files(folder: Path) -> list[Path]:
    """The leases in a folder, those under way included."""
    return list(folder.glob("lease-*.json"))


def lease_number(path: Path) -> int:
    """N of `lease-N.json`."""
    return int(path.stem.removeprefix("lease-"))


def is_held(path: Path, seconds: float) -> bool:
    """Whether a heartbeat is recent and, on this host, one of the processes lives."""
    try:
        age = folder_time(path.parent) - path.stat().st_mtime
        text = path.read_text()
    except FileNotFoundError:
        return False
    if age > seconds:
        return False
    if not text:  # being written
        return True
    holder = json.loads(text)
    if holder["host"] != host_name():
        return True
    return any(
        start is not None and process_start(int(pid)) == start for pid, start in holder["processes"].items()
    )


def folder_time(folder: Path) -> float:
    """The time of the machine that keeps the folder's files: those of two hosts may differ."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def host_name() -> str:
    """A name of this machine, or inside a container of the container."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {os.readlink(space) if space.exists() else ''}".strip()


def process_start(pid: int) -> str | None:
    """When a process started, which with its number identifies it for good; None where it has ended."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return "unknown"
    try:
        state, *_, start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:20]
    except OSError:
        return None
    return None if state == "Z" else start
