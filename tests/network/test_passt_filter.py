"""passt's user reaches the world and the clients of published ports, and nothing of the host, in real kernels.

The attacker is any program of that user, as a guest may control passt.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio

from tests.attackers.exposed_host import LOOPBACK_PORT, METADATA, MULTICAST_GROUPS, PORT, exposed_host
from tests.network import peer
from tests.network.kit import (
    INSTANCE,
    PASST_USER,
    SETTINGS,
    UPLINK,
    VM_USERS,
    WORLD,
    World,
    a_world,
    address,
    answered,
    having,
    keeper,
    nft,
    ruleset,
    stopped,
    user_vm,
    vm,
)
from tests.processes import read_line
from volant.host import Host
from volant.network import HostNetwork, Networks, NetworkSettings, Passt, passt_user
from volant.network.messages import Confine

pytestmark = pytest.mark.usefixtures("namespace")

OTHER = NetworkSettings(instance="9876543210", subnet=SETTINGS.subnet)


_SERVE = """
import socket
with socket.create_server(("0.0.0.0", 8080)) as server:
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"from a guest")
"""


async def networks_of(world: World, root: Path, settings: NetworkSettings = SETTINGS) -> Networks:
    """Returns the networks of a daemon that checked what the host supports."""
    passt = Passt(Host(), root, settings.instance, PASST_USER)
    networks = Networks(HostNetwork(Host()), settings, lambda: world.rows, passt)
    assert await networks.passt_filter.obstacle() is None
    return networks


async def test_a_guest_behind_passt_reaches_the_world_and_nothing_of_the_host(tmp_path: Path) -> None:
    with a_world(forwarding=True) as world:
        on_bridge, _ = world.rows = [vm(1, "bridge", "0.0.0.0:8081:80"), user_vm(2)]
        networks = await networks_of(world, tmp_path)
        await having(networks, on_bridge)
        guest = world.guest(on_bridge)
        guest("serve", "tcp", address(on_bridge), 80, "another guest")
        world.world("serve", "tcp", WORLD, 80, "world")
        for metadata in METADATA:
            world.world("add_address", "eth0", f"{metadata}/32")
            for protocol in ("tcp", "udp"):
                world.world("serve", protocol, metadata, 80, "secrets")
        world.world("serve", "udp", "168.63.129.16", 53, "names")
        closed = [
            *((host, PORT) for host in (UPLINK, "127.0.0.2", "0.0.0.0", "198.51.100.255", *MULTICAST_GROUPS)),
            *((host, LOOPBACK_PORT) for host in ("127.0.0.1", "0.0.0.0")),
            *((metadata, 80) for metadata in METADATA),
            (address(on_bridge), 80),
            (UPLINK, 8081),
        ]
        with exposed_host([UPLINK]) as services:
            assert len(answered(PASST_USER, *closed)) >= len(METADATA) + 4, "without it they are reached"
            assert services.received()

            await networks.passt_filter.ensure()

            assert answered(PASST_USER, *closed) == []
            assert services.received() == []
        world_and_names = ((WORLD, 80), ("168.63.129.16", 53))
        assert answered(PASST_USER, *world_and_names) == [[WORLD, 80, "tcp"], ["168.63.129.16", 53, "udp"]]
        # Other users of the host are not filtered.
        assert peer.ask("tcp", METADATA[0], 80) != ""


async def test_a_published_port_of_a_guest_behind_passt_answers(tmp_path: Path) -> None:
    with a_world() as world:
        world.rows = [user_vm(1)]
        networks = await networks_of(world, tmp_path)
        await networks.passt_filter.ensure()
        passt = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs here
            ["/usr/bin/python3", "-I", "-c", _SERVE],
            user=PASST_USER, group=65534, extra_groups=(), cwd="/", stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert read_line(passt) == "ready\n"
            for host in ("127.0.0.1", UPLINK):
                assert peer.ask("tcp", host, 8080) == "from a guest"
            assert world.world("ask", "tcp", UPLINK, 8080) == "from a guest"
        finally:
            passt.kill()
            passt.communicate()


async def test_the_filter_is_loaded_before_passt_restored_and_removed(tmp_path: Path) -> None:
    with a_world() as world:
        async with keeper(await networks_of(world, tmp_path)) as network:
            assert f"skuid {PASST_USER}" not in ruleset(), "nobody needs it"
            world.rows = [user_vm(1)]
            await network.ask(Confine(1), timeout_s=60)
            assert f"skuid {PASST_USER}" in ruleset()
            nft("flush ruleset")
            with trio.fail_after(20):
                while f"skuid {PASST_USER}" not in ruleset():  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.05)
        assert f"skuid {PASST_USER}" in ruleset(), "a VM runs"

        nft("flush ruleset")
        async with keeper(await networks_of(world, tmp_path)) as network:
            # The next daemon puts it back before anybody asks for it.
            with trio.fail_after(20):
                while f"skuid {PASST_USER}" not in ruleset():  # noqa: ASYNC110 - nothing tells
                    await trio.sleep(0.05)
            world.rows = [stopped(user_vm(1))]
        assert ruleset() == ""


async def test_two_daemons_do_not_disturb_each_other(tmp_path: Path) -> None:
    with a_world() as world:
        world.rows = [user_vm(1)]
        first, second = await networks_of(world, tmp_path), await networks_of(world, tmp_path, OTHER)
        await first.passt_filter.ensure()
        alone = ruleset()
        await second.passt_filter.ensure()
        world.rows = [stopped(user_vm(1))]
        await second.passt_filter.remove_unused()

        assert ruleset() == alone


async def test_passt_runs_where_the_host_cannot_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert passt_user(VM_USERS) is None
    with a_world() as world:
        world.rows = [user_vm(1)]
        networks = Networks(HostNetwork(Host()), SETTINGS, lambda: world.rows, Passt(Host(), tmp_path, INSTANCE, None))
        assert await networks.passt_filter.obstacle() == "volantd does not run as root"
        async with keeper(networks) as network:
            await network.ask(Confine(1), timeout_s=60)
        assert ruleset() == ""
