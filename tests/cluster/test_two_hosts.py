"""Two hosts, simulated: two network namespaces, each with an end of a cable, and torchrun's rendezvous over
it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from functools import partial

import pytest
from shop import TRAIN, assert_same_training
from warm import Command

from scantling.runs.directory import RunDirectory

pytestmark = pytest.mark.multiprocess

ADDRESSES = ("10.199.77.1", "10.199.77.2")


class Hosts:
    """Two processes in network namespaces of their own, which end with them, and `cable`, a pair of virtual
    network cards.
    """

    cable = "cable"

    def __init__(self) -> None:
        hold = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity")
        self.holders = [subprocess.Popen(hold, stderr=subprocess.PIPE, text=True) for _ in ADDRESSES]
        try:
            for holder in self.holders:
                self.wait_for_namespace(holder)
            first, second = self.holders
            self.run(
                first,
                *f"ip link add {self.cable} type veth peer name {self.cable} netns {second.pid}".split(),
            )
            for holder, address in zip(self.holders, ADDRESSES, strict=True):
                self.run(holder, *f"ip address add {address}/24 dev {self.cable}".split())
                for card in ("lo", self.cable):
                    self.run(holder, *f"ip link set {card} up".split())
        except BaseException:
            self.close()
            raise

    @staticmethod
    def wait_for_namespace(holder: subprocess.Popen) -> None:
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            if holder.poll() is not None:
                raise subprocess.CalledProcessError(
                    holder.returncode, "unshare", stderr=holder.communicate()[1]
                )
            time.sleep(0.01)

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.communicate()

    @staticmethod
    def inside(holder: subprocess.Popen) -> tuple[str, ...]:
        """What a command that runs on this host begins with."""
        return ("nsenter", "--net", f"--target={holder.pid}")

    def run(self, holder: subprocess.Popen, *command: str) -> str:
        inside = (*self.inside(holder), *command)
        return subprocess.run(inside, check=True, capture_output=True, text=True).stdout

    def received(self) -> list[int]:
        """Bytes that came to each over the cable."""
        lines = [self.run(holder, "cat", "/proc/net/dev").splitlines() for holder in self.holders]
        cards = [line.split() for (line,) in ([x for x in of if self.cable in x] for of in lines)]
        return [int(card[1]) for card in cards]


def enter_network(pid: int) -> None:
    """That of another process, for this one and those it starts."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0


@pytest.fixture(scope="module")
def hosts():
    if missing := [name for name in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: iproute2, util-linux)")
    try:
        hosts = Hosts()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")
    yield hosts
    hosts.close()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_hosts_train_as_one_process(shop, alone, hosts, engine):
    runs = f"hosts-{engine}"
    before = hosts.received()
    options = shop.options(f"trainer={engine}", "trainer.devices=1", "trainer.nodes=2", "logger=wandb")
    rendezvous = (f"--rdzv-id={runs}", f"--rdzv-endpoint={ADDRESSES[0]}:29500", "--rdzv-backend=c10d")
    processes = [
        Command(
            [str(TRAIN), *options, f"paths.runs={runs}"],
            shop.path,
            torchrun=(
                *("--nnodes=2", "--nproc-per-node=1", f"--local-addr={address}"),
                *(*rendezvous, f"--rdzv-conf=is_host={address == ADDRESSES[0]}"),
            ),
            environment={"WANDB_MODE": "offline", "GLOO_SOCKET_IFNAME": hosts.cable},
            first=partial(enter_network, holder.pid),
        )
        for holder, address in zip(hosts.holders, ADDRESSES, strict=True)
    ]
    said = ["".join(process.communicate(timeout=400)) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    folder = shop.path / runs / "default"
    (run,) = (path for path in folder.iterdir() if path.name != "wandb")
    directory = RunDirectory(run)
    assert_same_training(directory, alone)
    assert directory.environment["world_size"] == 2
    (segment,) = folder.glob("wandb/offline-run-*")
    assert segment.name.endswith(directory.wandb_id)
    gradients = 20 * 4 * sum(directory.summary["parameters"].values())
    for now, earlier in zip(hosts.received(), before, strict=True):
        assert now - earlier > gradients / 2  # reduced in halves
