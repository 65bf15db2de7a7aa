"""A guest with a NIC and each copy of it reach their gateway, with an address of their own.

Without a daemon: this tests guest, hypervisor and channel. QEMU runs in a network namespace of the test.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.kit import guest_spec, real_qemu
from tests.processes import read_line
from tests.system.netns import Namespace
from tests.system.rootfs import make_ext4
from tests.system.test_checkpoint import BOOT_S, Guest, adopted, running
from volant.channel import VirtioSerial, open_channel
from volant.host import Host
from volant.host._sockets import LinuxSockets
from volant.hypervisor import Disk, MachineSpec, Nic, Template
from volant.hypervisor.qemu import QemuHypervisor
from volant.model.agent import DAEMON_HOSTS, DAEMON_ROOT, DAEMON_SETTLE

GATEWAY = "192.168.127.1"
_S = 20.0
LISTEN = """
import socket
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("br0", 0))
print("listening", flush=True)
while True:
    frame = wire.recv(2000)
    arp = ".".join(map(str, frame[28:32])) if frame[12:14] == bytes((8, 6)) else ""
    print(frame[6:12].hex(":"), arp, flush=True)
"""
"""Prints the source of each frame on the bridge: its MAC, and in ARP its address."""


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
        self._listener = subprocess.Popen([*self.enter, "python3", "-c", LISTEN], stdout=subprocess.PIPE, text=True)
        assert read_line(self._listener) == "listening\n"

    def enter_thread(self) -> None:
        """Moves the calling thread into the namespace for good."""
        with Path(f"/proc/{self.pid}/ns/net").open() as handle:
            assert ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), 0) == 0

    def spoken(self) -> list[list[str]]:
        """Returns the senders so far, with their addresses; forgets them."""
        self._listener.terminate()
        said = self._listener.communicate(timeout=_S)[0]
        return [line.split() for line in said.splitlines()]

    def close(self) -> None:
        """Overrides `Namespace`: ends the listener, too."""
        self._listener.kill()
        self._listener.wait(_S)
        assert self._listener.stdout is not None
        self._listener.stdout.close()
        super().close()


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


@pytest.mark.full
async def test_clones_use_their_own_addresses_and_never_the_templates(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, net: Net, tmp_path: Path
) -> None:
    """It had a NIC that leads nowhere, and theirs can do what a tap can."""
    spec = msgspec.structs.replace(spec, name="", nic=Nic(mac=mac(0x70)))
    with trio.fail_after(2 * BOOT_S):
        template = await saved(host, qemu, spec, tmp_path / "state")
        async with (
            clone(host, qemu, spec, template, 2) as first,
            clone(host, qemu, spec, template, 3) as other,
        ):
            await is_on_the_network(first, 2)
            await is_on_the_network(other, 3)
            assert b" 0% packet loss" in await first.run("ping", "-c", "2", "-W", "5", address(3))
            features = (await first.run("sh", "-c", "cat /sys/bus/virtio/drivers/virtio_net/virtio*/features")).decode()
            assert features[0] == "1", "VIRTIO_NET_F_CSUM"
            # The daemon may send it again, with a deadline.
            await first.ask("PUT", DAEMON_HOSTS, {"hosts": {"other": address(3)}})
            assert b" 0% packet loss" in await first.run("ping", "-c", "2", "-W", "5", "other")
            await first.ask("PUT", DAEMON_HOSTS, {"hosts": {}})
            hosts = await first.run("cat", "/etc/hosts")
            assert b"other" not in hosts
            assert b"192.168.127.2 clone2\n" in hosts
    spoken = net.spoken()
    assert [mac(0x70)] not in [words[:1] for words in spoken]
    for number in (2, 3):
        assert {words[1] for words in spoken if words[0] == mac(number) and len(words) > 1} == {address(number)}


@pytest.mark.full
@pytest.mark.parametrize("behind", ["tap", "socket"])
async def test_a_machine_that_waited_is_given_what_is_behind_its_nic(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path, behind: str
) -> None:
    """When it was launched nobody knew whose it would be. Who is told to let it go on twice does so once."""
    nobody = Nic(mac=mac(0x70))
    spec = msgspec.structs.replace(spec, name="", nic=nobody)
    peer, path = Peer(), tmp_path / "net.sock"
    with trio.fail_after(2 * BOOT_S):
        template = await saved(host, qemu, spec, tmp_path / "state")
        waiting = clone_spec(msgspec.structs.replace(spec, start_paused=True), template, 2, nobody)
        identity = await qemu.launch(waiting)
        nic = make_nic(2) if behind == "tap" else Nic(mac=mac(2), socket=path)
        machine_spec = msgspec.structs.replace(waiting, nic=nic)
        async with trio.open_nursery() as nursery:
            await nursery.start(peer.serve, path)
            for _ in range(2):
                await qemu.resume_warm(machine_spec)
            async with adopted(host, qemu, machine_spec, identity) as guest:
                await guest.become("clone2", network=told(2))
                await is_on_the_network(guest, 2)
            nursery.cancel_scope.cancel()
    assert peer.heard == ({(mac(2), address(2))} if behind == "socket" else set())


async def saved(host: Host, qemu: QemuHypervisor, spec: MachineSpec, state: Path) -> Template:
    identity = await qemu.launch(spec)
    async with qemu.attach(spec, identity) as machine:
        async with open_channel(host, VirtioSerial(spec.agent_path)) as channel:
            await channel.ready()
            guest = Guest(host, qemu, spec, machine, channel)
            await guest.ask("GET", DAEMON_ROOT)
            assert b"eth0" not in await guest.run("ip", "link", "show")
            await guest.ask("POST", DAEMON_SETTLE)
        await machine.save(state)
        await machine.quit()
    return Template(spec.memory_file, state)


@asynccontextmanager
async def clone(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, template: Template, number: int
) -> AsyncIterator[Guest]:
    spec = clone_spec(spec, template, number, make_nic(number))
    async with running(host, qemu, spec) as guest:
        began = host.clock.monotonic()
        await guest.become(spec.name, network=told(number))
        print(f"told who it is in {(host.clock.monotonic() - began) * 1000:.0f} ms")
        yield guest


def clone_spec(spec: MachineSpec, template: Template, number: int, nic: Nic) -> MachineSpec:
    name = f"clone{number}"
    return msgspec.structs.replace(
        spec,
        name=name,
        directory=spec.directory.with_name(name),
        tag=f"{spec.tag}-{name}",
        template=template,
        nic=nic,
    )


@pytest.mark.full
async def test_a_root_filesystem_is_told_too_and_keeps_its_own_names(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, image_cache: Path, tmp_path: Path
) -> None:
    files = {"etc/hosts": "10.0.0.1 mine\n", "etc/resolv.conf": "nameserver 10.0.0.1\n"}
    base = make_ext4(tmp_path / "base.ext4", image_cache, files=files)
    root = Disk(base, tmp_path / "root.qcow2")
    spec = msgspec.structs.replace(booting(spec, nameservers=(GATEWAY,)), root=root)
    with trio.fail_after(BOOT_S):
        await qemu.make_layer(root)
        async with running(host, qemu, spec) as guest:
            while (await guest.ask("GET", DAEMON_ROOT))["state"] == "pending":
                pass  # the agent waits for this
            hosts = await guest.run("cat", "/etc/hosts")
            assert hosts.startswith(b"10.0.0.1 mine\n")
            assert b"\n192.168.127.2 origin\n" in hosts
            assert await guest.run("cat", "/etc/resolv.conf") == b"nameserver 192.168.127.1\n"
            await guest.ask("PUT", DAEMON_HOSTS, {"hosts": {"other": address(9)}})
            assert b"\n192.168.127.9 other\n" in await guest.run("cat", "/etc/hosts")
            async with guest.fork("child", make_nic(3), network=told(3, nameservers=[])) as child:
                hosts = await child.run("cat", "/etc/hosts")
                assert hosts.startswith(b"10.0.0.1 mine\n")
                assert b"\n192.168.127.3 child\n" in hosts
                assert b"other" not in hosts
                assert await child.run("cat", "/etc/resolv.conf") == b""


class Peer:
    """Who speaks for the guest behind a socket, as passt does: answers ARP for the gateway, and echoes."""

    def __init__(self) -> None:
        self.heard: set[tuple[str, str]] = set()
        """MACs and the addresses that they sent from."""

    async def serve(self, path: Path, *, task_status: trio.TaskStatus[Any]) -> None:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen()
        await trio.serve_listeners(self._answer, [trio.SocketListener(listener)], task_status=task_status)

    async def _answer(self, stream: trio.SocketStream) -> None:
        data = b""
        async for piece in stream:
            data += piece
            while len(data) >= 4 and len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
                answer, data = self._frame(data[4:end]), data[end:]
                if answer:
                    await stream.send_all(len(answer).to_bytes(4, "big") + answer)

    def _frame(self, frame: bytes) -> bytes:
        ours = bytes.fromhex("020000000001")
        back = frame[6:12] + ours + frame[12:14]
        if frame[12:14] == b"\x08\x06" and frame[38:42] == bytes(map(int, GATEWAY.split("."))):
            return back + frame[14:21] + b"\x02" + ours + frame[38:42] + frame[22:32]
        if frame[12:14] == b"\x08\x00" and frame[23] == 1:
            self.heard.add((frame[6:12].hex(":"), ".".join(map(str, frame[26:30]))))
            # The checksum of a reply grows by as much as its type shrinks.
            total = int.from_bytes(frame[36:38], "big") + 0x0800
            ping = b"\0\0" + ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big") + frame[38:]
            return back + frame[14:26] + frame[30:34] + frame[26:30] + ping
        return b""


@pytest.mark.full
async def test_a_nic_may_have_a_socket_behind_it_and_copies_one_of_their_own(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path
) -> None:
    def behind(number: int, **more: Any) -> Nic:
        return Nic(mac=mac(number), socket=tmp_path / f"net{number}.sock", **more)

    async def reaches_the_gateway(guest: Guest) -> None:
        assert b" 0% packet loss" in await guest.run("ping", "-c", "2", "-W", "5", GATEWAY)

    first, second = Peer(), Peer()
    nic = behind(2, address=f"{address(2)}/24", gateway=GATEWAY)
    with trio.fail_after(BOOT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(first.serve, tmp_path / "net2.sock")
            await nursery.start(second.serve, tmp_path / "net3.sock")
            async with running(host, qemu, msgspec.structs.replace(spec, nic=nic)) as guest:
                await reaches_the_gateway(guest)
                async with guest.fork("child", behind(3), network=told(3)) as child:
                    await reaches_the_gateway(child)
                    # A guest that began with a socket continues with a tap.
                    async with child.fork("grandchild", make_nic(4), network=told(4)) as grandchild:
                        await is_on_the_network(grandchild, 4)
            nursery.cancel_scope.cancel()
    assert first.heard == {(mac(2), address(2))}
    assert second.heard == {(mac(3), address(3))}
