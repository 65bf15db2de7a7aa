"""A guest with a NIC and each copy of it reach their gateway, with an address of their own.

Without a daemon: this tests guest, hypervisor and channel. QEMU runs in a network namespace of the test.
"""

from __future__ import annotations

import ctypes
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.kit import guest_spec, real_qemu
from tests.system.netns import Namespace
from tests.system.test_checkpoint import BOOT_S, Guest, running
from volant.host import Host
from volant.host._sockets import LinuxSockets
from volant.hypervisor import MachineSpec, Nic
from volant.hypervisor.qemu import QemuHypervisor

GATEWAY = "192.168.127.1"
_S = 20.0


class Net(Namespace):
    """A network namespace with a bridge, which has the gateway's address, and three taps."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.run("ip", "link", "add", "br0", "type", "bridge")
        self.run("ip", "address", "add", f"{GATEWAY}/24", "dev", "br0")
        self.run("ip", "link", "set", "br0", "up")
        for number in (1, 2, 3):
            self.run("ip", "tuntap", "add", f"tap{number}", "mode", "tap")
            self.run("ip", "link", "set", f"tap{number}", "master", "br0", "up")
        self.program = directory / "qemu"
        self.program.write_text(f'#!/bin/sh\nexec {" ".join(self.enter)} qemu-system-x86_64 "$@"\n')
        self.program.chmod(0o755)

    def enter_thread(self) -> None:
        """Moves the calling thread into the namespace for good."""
        with Path(f"/proc/{self.pid}/ns/net").open() as handle:
            assert ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0) == 0


class SocketsInside(LinuxSockets):
    """Finds taps in the namespace of QEMU."""

    def __init__(self, net: Net) -> None:
        self._net = net

    @contextmanager
    def open_tap(self, name: str) -> Iterator[int]:
        """Overrides `LinuxSockets`: each thread has a network namespace of its own."""
        with ThreadPoolExecutor(1, initializer=self._net.enter_thread) as inside:
            block = super().open_tap(name)
            yield inside.submit(block.__enter__).result()
            inside.submit(block.__exit__, None, None, None).result()


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    net = Net(tmp_path)
    yield net
    net.close()


@pytest.fixture
def host(net: Net) -> Host:
    host = Host()
    host.sockets = SocketsInside(net)
    return host


@pytest.fixture
def spec(host: Host, image_cache: Path, tmp_path: Path) -> MachineSpec:
    return guest_spec(host, image_cache, tmp_path / "vm", name="origin", memory_mb=160)


@pytest.fixture
async def qemu(host: Host, spec: MachineSpec, net: Net, tmp_path: Path) -> AsyncIterator[QemuHypervisor]:
    async with real_qemu(host, spec, tmp_path / "cache", str(net.program)) as hypervisor:
        yield hypervisor


def mac(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def address(number: int) -> str:
    return f"192.168.127.{number}"


def make_nic(number: int) -> Nic:
    """Returns the settings of a copy, which receives its address through the agent."""
    return Nic(mac=mac(number), tap=f"tap{number - 1}")


def told(number: int, **more: object) -> dict[str, Any]:
    """Returns the network settings of an `Identity`."""
    return {"address": address(number), "prefix": 24, "gateway": GATEWAY, "mac": mac(number), **more}


def booting(spec: MachineSpec, **more: Any) -> MachineSpec:
    nic = msgspec.structs.replace(make_nic(2), address=f"{address(2)}/24", gateway=GATEWAY, **more)
    return msgspec.structs.replace(spec, nic=nic)


async def is_on_the_network(guest: Guest, number: int) -> None:
    """Checks that the guest has only this address, and that the gateway answers."""
    said = (await guest.run("ip", "address", "show", "eth0")).decode()
    assert f"link/ether {mac(number)} " in said
    assert [line.split()[1] for line in said.splitlines() if "inet " in line] == [f"{address(number)}/24"]
    assert (await guest.run("ip", "route")).decode().count("default via") == 1
    assert b" 0% packet loss" in await guest.run("ping", "-c", "2", "-W", "5", GATEWAY)


async def test_a_guest_and_its_copy_are_both_on_the_network(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec
) -> None:
    with trio.fail_after(BOOT_S):
        async with running(host, qemu, booting(spec, nameservers=(GATEWAY,))) as guest:
            await is_on_the_network(guest, 2)
            assert await guest.run("cat", "/etc/resolv.conf") == b"nameserver 192.168.127.1\n"
            assert b"192.168.127.2 origin\n" in await guest.run("cat", "/etc/hosts")
            async with guest.fork("child", make_nic(3), network=told(3, hosts={"origin": address(2)})) as child:
                await is_on_the_network(child, 3)
                await is_on_the_network(guest, 2)
                assert b" 0% packet loss" in await child.run("ping", "-c", "2", "-W", "5", "origin")
                assert b"192.168.127.3" in await child.run("ping", "-c", "1", "-W", "5", "child")
                async with child.fork("grandchild", make_nic(4), network=told(4)) as grandchild:
                    await is_on_the_network(grandchild, 4)
                    assert b"origin" not in await grandchild.run("cat", "/etc/hosts")
