"""A real SLURM of this machine alone, for tests: munged, slurmctld and slurmd in a folder, on loopback, on
ports of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scontrol")

CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={daemon_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def reason_not_to() -> str | None:
    """Why SLURM cannot be started here; None where it can."""
    if missing := [name for name in NEEDS if shutil.which(name, path=search_path()) is None]:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    return None


def search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which SLURM's commands find it. Two CPUs, one partition; everything ends with the
    block.
    """
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    ports = {"controller_port": free_port(), "daemon_port": free_port()}
    configuration.write_text(CONFIGURATION.format(folder=folder, host=host, **ports))
    environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(configuration)}
    munge = ("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket")
    munge += tuple(f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed"))
    daemons: list[subprocess.Popen] = []
    try:
        for command in (munge, ("slurmctld", "-D"), ("slurmd", "-D", "-N", host)):
            with (folder / f"{command[0]}.out").open("w") as out:
                # They end with this process however it ends.
                bound = ("setpriv", "--pdeathsig", "TERM", *command)
                daemons.append(subprocess.Popen(bound, env=environment, stdout=out, stderr=out, cwd=folder))
        wait_until_idle(environment, folder)
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(["scancel", "--me", "--full"], env=environment, capture_output=True, timeout=10)
            wait_until_idle(environment, folder, patience=10)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def wait_until_idle(environment: dict[str, str], folder: Path, patience: float = 60) -> None:
    """Until the node takes jobs and has none."""
    end = time.monotonic() + patience
    while True:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, timeout=30
        )
        if asked.stdout.strip() == "idle":
            return
        if time.monotonic() > end:
            logs = "".join(path.read_text() for path in folder.glob("*.log"))
            raise subprocess.SubprocessError(
                f"SLURM's node is {asked.stdout.strip()}\n{asked.stderr}\n{logs}"
            )
        time.sleep(0.2)
