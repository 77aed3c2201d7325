"""Two hosts, simulated: two network namespaces, each with an end of a cable, and torchrun's rendezvous over it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from shop import TRAIN, assert_same_training

from scantling.run_directory import RunDirectory

pytestmark = pytest.mark.multiprocess

ADDRESSES = ("10.199.77.1", "10.199.77.2")


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Namespaces `names`, whose only way to each other is a pair of virtual network cards called `cable`."""

    cable = "cable"

    def __init__(self) -> None:
        self.names = [f"scantling-{os.getpid()}-{i}" for i in range(2)]

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ip(
                "-n",
                first,
                "link",
                "add",
                self.cable,
                "type",
                "veth",
                "peer",
                "name",
                self.cable,
                "netns",
                second,
            )
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", self.cable)
                for card in ("lo", self.cable):
                    ip("-n", name, "link", "set", card, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def received(self, name: str) -> int:
        """Bytes that came over the cable."""
        return int(ip("netns", "exec", name, "cat", f"/sys/class/net/{self.cable}/statistics/rx_bytes"))


@pytest.fixture(scope="module")
def hosts():
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed (Debian: iproute2)")
    try:
        with Hosts() as hosts:
            yield hosts
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no right to make network namespaces: {error.stderr.strip()}")


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_hosts_train_as_one_process(shop, alone, hosts, engine):
    runs = f"hosts-{engine}"
    before = [hosts.received(name) for name in hosts.names]
    options = shop.options(f"trainer={engine}", "trainer.devices=1", "trainer.nodes=2", "logger=wandb")
    processes = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *(
                    "--nnodes=2",
                    "--nproc-per-node=1",
                    f"--rdzv-id={runs}",
                    f"--rdzv-endpoint={ADDRESSES[0]}:29500",
                ),
                *("--rdzv-backend=c10d", f"--local-addr={address}", TRAIN, *options, f"paths.runs={runs}"),
            ],
            cwd=shop.path,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "WANDB_MODE": "offline",
                "GLOO_SOCKET_IFNAME": hosts.cable,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, address in zip(hosts.names, ADDRESSES, strict=True)
    ]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    folder = shop.path / runs / "default"
    (run,) = (path for path in folder.iterdir() if path.name != "wandb")
    directory = RunDirectory(run)
    assert_same_training(directory, alone)
    assert directory.environment["world_size"] == 2
    (segment,) = folder.glob("wandb/offline-run-*")
    assert segment.name.endswith(run.name)
    gradients = 20 * 4 * sum(directory.summary["parameters"].values())
    for name, earlier in zip(hosts.names, before, strict=True):
        assert hosts.received(name) - earlier > gradients / 2  # reduced in halves
