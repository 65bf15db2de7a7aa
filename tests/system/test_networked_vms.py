"""VMs on the bridge of a daemon: each has an address of its own, however it came to be, and meets those that it should.

The daemon runs in a network namespace of its own. What the bridge lets through is the matter of `tests/network`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, run, until
from tests.system.netns import IN_ITS_OWN
from tests.system.test_snapshots import fork
from tests.system.test_standby import count, filled
from tests.system.test_templates import template
from volant.client import Client
from volant.model import RestoreVm, TakeSnapshot, VmView

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root makes bridges"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="nftables is not installed"),
]
GATEWAY = "192.168.127.1"


@pytest.fixture(scope="module")
def bridged(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    """A daemon that has a template of a machine with a card, and a process that waits."""
    flags = ("--network", "bridge", "--templates", "auto", "--standby", "1")
    daemon = Daemon(image_cache, *flags, wrapper=IN_ITS_OWN, ephemeral=False)
    daemon.command += ["--listen", f"unix:{daemon.root}/api"]
    _running.append(daemon)

    async def prepare() -> None:
        async with daemon.client() as client:
            await boot(client, "first")
            await template(daemon)
            # Nobody waited for this one.
            second = await boot(client, "second")
            assert second.booted_from == "template"
            await is_on_the_network(client, second)
            await filled(daemon)

    try:
        daemon.start()
        trio.run(prepare)
        daemon.delete_vms()
        yield daemon
    finally:
        _running.remove(daemon)
        daemon.dispose()


@pytest.fixture
def daemon(bridged: Daemon) -> Iterator[Daemon]:
    yield bridged
    bridged.delete_vms()


async def is_on_the_network(client: Client, vm: VmView) -> None:
    """What the daemon says of it is what it is, and the gateway answers."""
    said = await run(client, vm.name, "ip", "address", "show", "eth0")
    assert f"link/ether {vm.mac_address} " in said
    assert [line.split()[1] for line in said.splitlines() if "inet " in line] == [f"{vm.ip_address}/24"]
    assert await reaches(client, vm.name, GATEWAY)
    assert f"{vm.ip_address} {vm.name}\n" in await run(client, vm.name, "cat", "/etc/hosts")


async def reaches(client: Client, name: str, other: str) -> bool:
    script = f"ping -c 1 -W 3 {other} >/dev/null 2>&1 && echo yes || echo no"
    return await run(client, name, "sh", "-c", script) == "yes\n"


async def test_each_is_somebody_however_it_came_to_be(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await filled(daemon)
        claims = await count(daemon, "claims_total")
        vms = [await boot(client, "waited")]
        assert await count(daemon, "claims_total") == claims + 1
        vms += await fork(client, "waited")
        vms.append(await boot(client, "cold", boot="cold"))
        assert [vm.booted_from for vm in vms] == ["template", "fork", "cold"]
        assert all(vm.fallback is None for vm in vms)
        assert len({vm.ip_address for vm in vms}) == len({vm.mac_address for vm in vms}) == len(vms)
        for vm in vms:
            await is_on_the_network(client, vm)
        for vm in vms[1:]:
            assert not await reaches(client, "waited", vm.ip_address), "they have no network in common"


async def test_a_vm_that_goes_on_from_a_snapshot_has_an_address_of_its_own(daemon: Daemon) -> None:
    async with daemon.client() as client:
        original = await boot(client, "original")
        await client.snapshots.take("original", TakeSnapshot(name="kept"))
        restored = await client.vms.create(RestoreVm(name="restored", from_snapshot="kept"))
        restored = await until(client, "restored", "running") or restored
        assert restored.ip_address not in ("", original.ip_address)
        for vm in (original, restored):
            await is_on_the_network(client, vm)
        await client.snapshots.remove("kept")


async def test_those_of_one_named_network_know_each_other_by_name(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.networks.create("blue")
        await boot(client, "one", network="blue")
        await boot(client, "two", network="blue")
        await boot(client, "other")
        assert await reaches(client, "two", "one"), "it was told as it began"
        with trio.fail_after(BOOT_S):
            while not await reaches(client, "one", "two"):  # noqa: ASYNC110 - and this one hears of it
                await trio.sleep(0.1)
        assert not await reaches(client, "one", "other")
        await client.vms.delete("two")
        with trio.fail_after(BOOT_S):
            while "two" in await run(client, "one", "cat", "/etc/hosts"):  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert await reaches(client, "one", GATEWAY)
        await client.vms.delete("one")
        await client.networks.remove("blue")
