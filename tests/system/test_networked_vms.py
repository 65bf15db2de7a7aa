"""VMs with networks: each has its own address, whatever its origin, and reaches the peers that it should.

The daemon's host is a network namespace, with a link to another one, which plays the internet. `tests/network` tests
the rules of the bridge in detail; this file tests real guests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kept, reachable, run, until
from tests.system.lab import HOST, WORLD, Lab
from tests.system.test_standby import filled
from tests.system.test_templates import template
from volant.client import Client
from volant.model import ForkVm, VmView

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes bridges"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="nftables is not installed"),
]
GATEWAY = "192.168.127.1"
PORT = 7000
_S = 30.0
SERVE = f"""
import socket
listener = socket.create_server(("{WORLD}", {PORT}))
print("ready", flush=True)
while True:
    connection, address = listener.accept()
    connection.sendall(address[0].encode())
    connection.close()
"""
"""The internet: answers with the address of the client."""
FETCH = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as stream:
    while data := stream.recv(4096):
        sys.stdout.write(data.decode())
"""


class NetworkLab(Lab):
    """A lab with the server."""

    def __init__(self) -> None:
        super().__init__()
        self.start("-c", SERVE)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with closing(NetworkLab()) as lab:
        yield lab


@pytest.fixture(scope="module")
def bridged(image_cache: Path, lab: Lab, _running: list[Daemon]) -> Iterator[Daemon]:
    """A daemon that has a template of a machine with a NIC, and a process that waits."""
    flags = ("--network", "auto", "--templates", "auto", "--standby", "1")
    daemon = Daemon(image_cache, *flags, wrapper=lab.host.enter, ephemeral=False)
    daemon.command += ["--listen", f"unix:{daemon.root}/api"]

    async def prepare() -> None:
        async with daemon.client() as client:
            await boot(client, "first")
            await template(daemon)
            # This VM was not claimed from the warm pool.
            second = await boot(client, "second")
            assert second.booted_from == "template"
            await is_on_the_network(client, second)
            await filled(daemon)

    with kept(daemon, _running):
        trio.run(prepare)
        daemon.delete_vms()
        yield daemon


@pytest.fixture
def daemon(bridged: Daemon, lab: Lab) -> Iterator[Daemon]:
    yield bridged
    bridged.delete_vms()
    assert len(lab.host.links()) == len({"lo", "up0", "the bridge"})


async def is_on_the_network(client: Client, vm: VmView) -> None:
    """Checks that the guest has the address that the daemon reports, and that the gateway answers."""
    said = await run(client, vm.name, "ip", "address", "show", "eth0")
    assert f"link/ether {vm.mac_address} " in said
    assert [line.split()[1] for line in said.splitlines() if "inet " in line] == [f"{vm.ip_address}/24"]
    assert await reaches(client, vm.name, GATEWAY)
    assert f"{vm.ip_address} {vm.name}\n" in await run(client, vm.name, "cat", "/etc/hosts")


async def reaches(client: Client, name: str, other: str) -> bool:
    script = f"ping -c 1 -W 3 {other} >/dev/null 2>&1 && echo yes || echo no"
    return await run(client, name, "sh", "-c", script) == "yes\n"


async def test_vms_of_one_named_network_reach_each_other_by_name(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.networks.create("blue")
        await boot(client, "one", network="blue")
        await boot(client, "two", network="blue")
        await boot(client, "other")
        before = {each.name: each for each in await client.vms.stats()}
        assert await reaches(client, "two", "one"), "it was told as it began"
        now = {each.name: each for each in await client.vms.stats()}
        for name in ("one", "two"):
            assert (now[name].received_bytes or 0) > (before[name].received_bytes or 0)
            assert (now[name].sent_bytes or 0) > (before[name].sent_bytes or 0)
        with trio.fail_after(BOOT_S):
            while not await reaches(client, "one", "two"):  # noqa: ASYNC110 - the guest offers no wait
                await trio.sleep(0.1)
        assert not await reaches(client, "one", "other")
        await client.vms.delete("two")
        with trio.fail_after(BOOT_S):
            while "two" in await run(client, "one", "cat", "/etc/hosts"):  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert await reaches(client, "one", GATEWAY)
        await client.vms.delete("one")
        await client.networks.delete("blue")


async def tells_from_where(client: Client, name: str) -> str:
    """Returns the address from which a connection of the guest arrives."""
    return await run(client, name, "python3", "-c", FETCH, WORLD, str(PORT))


async def serve(client: Client, name: str) -> None:
    """Starts a server in the guest, on port 80, which answers with the guest's name."""
    script = "while :; do hostname | nc -l -p 80; done"
    await run(client, name, "sh", "-c", f"({script}) </dev/null >/dev/null 2>&1 &")


async def fetch(lab: Lab, port: int) -> str:
    """Returns the answer of a port of the host to the internet, once there is one."""
    said = ""
    with trio.fail_after(_S):
        while not said:
            # passt accepts a connection before its guest does, and closes it if nothing listens there.
            with suppress(subprocess.CalledProcessError):
                said = lab.world.run(sys.executable, "-c", FETCH, HOST, str(port))
            await trio.sleep(0.1)
    return said


async def test_networks_outlive_a_killed_daemon_and_end_with_their_vms(daemon: Daemon, lab: Lab) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "stays", ports=["0.0.0.0:8080:80"])
        await boot(client, "goes")
        await client.vms.fork("stays", ForkVm(names=["copy"]))
        await until(client, "copy", "running")
        await is_on_the_network(client, await client.vms.get("copy"))
        assert await tells_from_where(client, "stays") == HOST
        await serve(client, "stays")
        assert await fetch(lab, 8080) == "stays\n"
    with_both = lab.host.links()
    daemon.kill()
    # Existing networks work without the daemon.
    assert await fetch(lab, 8080) == "stays\n"
    async with daemon.started() as client:
        assert lab.host.links() == with_both
        assert await fetch(lab, 8080) == "stays\n"
        await reachable(client, "stays")
        await is_on_the_network(client, vm)
        assert await tells_from_where(client, "stays") == HOST
        await client.vms.delete("goes")
        assert len(with_both - lab.host.links()) == 1
        await client.vms.delete("stays")
        with pytest.raises(subprocess.CalledProcessError):
            lab.world.run(sys.executable, "-c", FETCH, HOST, "8080")
