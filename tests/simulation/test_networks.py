"""Guests of a named network know their peers whatever is killed; a tap exists as long as its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.names import named
from tests.simulated import World
from tests.simulated.qemu import SimQemu
from tests.simulation.kit import JSON, VMS, run_story
from volant.model.agent import IDENTITY_NETWORK_SINCE

PATIENCE_S = 200.0
"""Longer than the longest pause before somebody is told again."""


async def make(world: World, name: str, network: str, *, boot: str = "cold") -> Any:
    body = {"name": name, "cpu_cores": 1, "memory_mb": 64, "network": network, "boot": boot}
    answer = await world.request("POST", f"{VMS}?wait=running,crashed&timeout=5m", body, JSON)
    assert answer.status == 201, answer.body
    return answer.json()


async def make_networks(world: World, *names: str) -> None:
    for name in names:
        assert (await world.request("POST", "/api/v1/networks", {"name": name}, JSON)).status == 201


def machine_of(world: World, name: str) -> SimQemu:
    row = world.daemon.store.projection.get(named(name))
    assert row is not None
    (qemu,) = [each for each in world.machine.running() if each.tag == row.tag]
    return qemu


def knows(world: World, name: str) -> dict[str, str] | None:
    """Whom a guest knows; None: its agent is too old to know anybody."""
    guest = machine_of(world, name).guest
    return guest.hosts if guest.protocol >= IDENTITY_NETWORK_SINCE else None


async def all_know(world: World, *names: str) -> None:
    """Wait until each of these knows all of them, and nobody else."""
    addresses = {name: world.daemon.store.projection.get(named(name)) for name in names}
    wanted = {name: row.ip_address for name, row in addresses.items() if row is not None}
    assert set(wanted) == set(names)
    with trio.fail_after(PATIENCE_S):
        while any(knows(world, name) not in (wanted, None) for name in names):  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.1)


@pytest.mark.parametrize("seed", range(6))
def test_guests_know_their_peers_while_vms_come_and_go(tmp_path: Path, seed: int) -> None:
    async def story(world: World) -> None:
        await make_networks(world, "blue", "green")
        for name in ("a", "b"):
            await make(world, name, "blue")
        await make(world, "c", "green")
        await make(world, "alone", "bridge")
        await make(world, "d", "blue")
        await all_know(world, "a", "b", "d")
        await all_know(world, "c")
        assert knows(world, "alone") in ({}, None)
        assert (await world.request("DELETE", f"{VMS}/a")).status == 204
        await all_know(world, "b", "d")
        # One that is restarted hears of it again, and one whose daemon dies in the middle of telling.
        await world.request("POST", f"{VMS}/b/restart?wait=running", None, JSON)
        await make(world, "e", "blue")
        await world.kill_daemon()
        await world.start_daemon()
        await all_know(world, "b", "d", "e")

    run_story(tmp_path, story, seed=seed, **{"agent.refuses_hosts": 0.3, "agent.slow": 0.05, "channel.is_cut": 0.05})


@pytest.mark.parametrize("seed", [7, 8, 12, 24])
def test_an_older_update_of_hosts_does_not_win(tmp_path: Path, seed: int) -> None:
    """A daemon that begins anew tells the guest while it makes itself known to its agent, and others come meanwhile."""

    async def story(world: World) -> None:
        await make_networks(world, "blue")
        for name in ("a", "b", "c"):
            await make(world, name, "blue")
        for _ in range(4):
            await world.kill_daemon()
            await world.start_daemon()
            await trio.sleep(world.sim.rng.uniform(0, 2))
            await world.request("POST", VMS, {"name": "d", "cpu_cores": 1, "memory_mb": 64, "network": "blue"}, JSON)
            await trio.sleep(PATIENCE_S)
            await all_know(world, "a", "b", "c", "d")
            assert (await world.request("DELETE", f"{VMS}/d")).status == 204

    run_story(tmp_path, story, seed=seed, **{"agent.slow": 0.15})


@pytest.mark.parametrize("seed", [1, 2, 3, 5, 7])
def test_a_late_update_of_hosts_includes_deleted_peers(tmp_path: Path, seed: int) -> None:
    """A guest that is paused, for instance while it is copied, reads an update after the request was given up."""

    async def story(world: World) -> None:
        await make_networks(world, "blue")
        for name in ("a", "b", "c"):
            await make(world, name, "blue")
        await all_know(world, "a", "b", "c")
        guests = [machine_of(world, name).guest for name in ("a", "b", "c")]
        for guest in guests:
            guest.pause()
        await make(world, "d", "blue")
        await trio.sleep(6)
        assert (await world.request("DELETE", f"{VMS}/d")).status == 204
        await trio.sleep(world.sim.rng.uniform(0, 20))
        for guest in guests:
            guest.resume()
        await trio.sleep(PATIENCE_S)
        await all_know(world, "a", "b", "c")

    run_story(tmp_path, story, seed=seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("boot", ["cold", "auto"])
def test_a_guest_knows_its_peers_before_it_is_running(tmp_path: Path, boot: str, seed: int) -> None:
    async def story(world: World) -> None:
        await make_networks(world, "blue")
        await make(world, "a", "blue", boot=boot)
        # Of the second there is a template then.
        await trio.sleep(60)
        vm = await make(world, "b", "blue", boot=boot)
        assert vm["status"] == "running", vm
        assert knows(world, "b") in ({"a": "192.168.127.2", "b": "192.168.127.3"}, None)

    run_story(tmp_path, story, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_receives_an_address_of_its_own(tmp_path: Path, seed: int) -> None:
    async def story(world: World) -> None:
        await make_networks(world, "blue")
        await make(world, "demo", "blue")
        answer = await world.request("POST", f"{VMS}/demo/fork?wait=running,crashed", {"names": ["copy"]}, JSON)
        (copy,) = answer.json()
        assert (copy["network"], copy["ip_address"]) == ("blue", "192.168.127.3")
        guest = machine_of(world, "demo").guest
        if guest.protocol < IDENTITY_NETWORK_SINCE:
            # As itself it would speak with its original's address.
            assert (copy["status"], copy["reason"]["code"]) == ("crashed", "clone_refused")
            return
        assert copy["status"] == "running", copy
        told = machine_of(world, "copy").guest.network
        assert told is not None
        assert (told["address"], told["prefix"], told["gateway"], told["mac"]) == (
            copy["ip_address"], 24, "192.168.127.1", copy["mac_address"],
        )  # fmt: skip
        await all_know(world, "demo", "copy")

    run_story(tmp_path, story, seed=seed)


@pytest.mark.parametrize("boot", ["cold", "auto"])
def test_a_tap_exists_as_long_as_its_process(tmp_path: Path, boot: str) -> None:
    async def story(world: World) -> None:
        taps: dict[str, bool] = {}

        def look() -> None:
            for qemu in world.machine.running():
                if qemu.directory.parent.name == "standby":
                    # It is paused, and has no VM's tap before it is claimed.
                    continue
                for row in world.daemon.store.projection.rows():
                    if row.tag == qemu.tag and row.lease is not None:
                        assert row.lease.tap in world.machine.links.links, f"{row.name} runs without its tap"
                        taps[row.name] = True

        async def watch() -> None:
            while True:
                look()
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            for name in ("a", "b", "c"):
                assert (await make(world, name, "bridge", boot=boot))["status"] == "running"
                await trio.sleep(30)
            await world.request("POST", f"{VMS}/a/stop?wait=stopped", None, JSON)
            lease = world.daemon.store.projection.get(named("a"))
            assert lease is not None
            assert lease.lease is not None
            assert lease.lease.tap not in world.machine.links.links
            for name in ("a", "b", "c"):
                assert (await world.request("DELETE", f"{VMS}/{name}")).status == 204
            nursery.cancel_scope.cancel()
        assert set(taps) == {"a", "b", "c"}
        assert not [name for name, link in world.machine.links.links.items() if link.kind == "tun"]

    run_story(tmp_path, story, seed=3)


def test_without_a_tap_no_process_starts_and_the_reason_says_so(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await make(world, "demo", "bridge")
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "tap")
        assert "Device or resource busy" in vm["reason"]["message"]
        assert not world.machine.running()
        assert (await make(world, "other", "none"))["status"] == "running"

    run_story(tmp_path, story, seed=5, **{"network.refuses": 1.0})


def test_a_tap_that_can_not_be_removed_delays_only_its_vm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for name in ("a", "b", "c", "d"):
            await make(world, name, "bridge")
            await world.request("POST", f"{VMS}/{name}/start?wait=running,crashed&timeout=5m", None, JSON)
            await world.request("POST", f"{VMS}/{name}/stop?grace=0s&wait=stopped,crashed&timeout=5m", None, JSON)
        tree = (await world.request("GET", "/api/v1/system/tree")).json()
        (vms,) = [child for child in tree["children"] if child["name"] == "vms"]
        assert {child["name"]: child["restarts"] for child in vms["children"]} == dict.fromkeys("abcd", 0)

    run_story(tmp_path, story, seed=7, **{"network.refuses": 0.3})
