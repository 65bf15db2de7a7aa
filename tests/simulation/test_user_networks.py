"""A VM with the network `user` has one passt that its hypervisor is connected to, whatever is killed when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulated.passt import SimPasst
from tests.simulation.kit import JSON, VMS
from tests.simulation.test_kills_in_a_launch import COLD_BOOT_S, MOMENTS_S, SOON_S, wait_running
from volant.model.agent import PROTOCOL_VERSION

NEW = {"cpu_cores": 1, "memory_mb": 128, "network": "user"}
AGAIN_S = 30.0
"""In which a passt that has ended is started again, and one that lost its hypervisor by that again."""


@pytest.fixture(autouse=True)
def _user_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.daemon._guest_networks.passt_obstacle", lambda: None)
    # An older agent takes no network settings, so no copy of its guest has a network.
    monkeypatch.setattr("tests.simulated.guest.PROTOCOL_MIN", PROTOCOL_VERSION)


def passts_of(world: World, vm: Any) -> list[SimPasst]:
    return [
        passt
        for passt in world.machine.passts.values()
        if passt.process.alive and passt.process.identity.tag.endswith(f"-n.{vm['id']}")
    ]


def the_one(world: World, vm: Any) -> SimPasst:
    """The VM's passt, which its hypervisor is connected to."""
    (passt,) = passts_of(world, vm)
    assert passt.has_client
    (qemu,) = [one for one in world.machine.running() if one.process.identity.pid == vm["pid"]]
    assert qemu.netdevs == {"net0": "", "net3": "", "net2": "", "net1": "net2"}
    assert set(qemu._connections) == {"net2"}
    assert not qemu._handed
    return passt


async def launch(world: World, kind: str) -> None:
    """Creates the VM `new` as a copy of `first`, or in another way."""
    if kind == "fork":
        answer = await world.request("POST", f"{VMS}/first/fork", {"names": ["new"]}, JSON)
    else:
        body = {**NEW, "name": "new", **({"boot": "cold"} if kind == "cold" else {})}
        answer = await world.request("POST", VMS, body, JSON)
    assert answer.status == 201, answer.body


@pytest.mark.parametrize("kind", ["cold", "clone", "standby", "fork"])
def test_whenever_the_daemon_is_killed_the_hypervisor_is_connected(tmp_path: Path, kind: str) -> None:
    moments_s = MOMENTS_S[::2]

    async def main(sim: Simulation) -> None:
        moment_s = moments_s[sim.seed]
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            world.settings = msgspec.structs.replace(world.settings, standby=1 if kind == "standby" else 0)
            await world.start_daemon()
            await world.request("POST", VMS, {**NEW, "name": "first"}, JSON)
            first = await wait_running(world, "first", 60)
            if kind != "cold":
                await world.request("POST", "/api/v1/templates", {**NEW}, JSON)
            if kind == "standby":
                await world.request("POST", VMS, {**NEW, "name": "second"}, JSON)
                await wait_running(world, "second", 60)
                await trio.sleep(20)
                assert world.daemon.vms.warm_pool.tags
            kept = the_one(world, first)

            await launch(world, kind)
            await trio.sleep(moment_s)
            await world.kill_daemon()
            await world.start_daemon()
            vm = await wait_running(world, "new", COLD_BOOT_S if kind == "cold" else SOON_S)
            assert (vm["status"], vm["fallback"]) == ("running", None), (moment_s, vm)
            await trio.sleep(AGAIN_S)
            passt = the_one(world, vm)
            assert the_one(world, first) is kept, "a connection that holds is kept"

            # It is killed while a daemon runs, and while none does.
            passt.process.end(-9)
            await trio.sleep(AGAIN_S)
            passt = the_one(world, vm)
            await world.kill_daemon()
            passt.process.end(-9)
            await world.start_daemon()
            await trio.sleep(AGAIN_S)
            the_one(world, vm)
            assert the_one(world, first) is kept
            await world.request("DELETE", f"{VMS}/new", b"", {})
            await trio.sleep(AGAIN_S)
            assert passts_of(world, vm) == []

    for seed in range(len(moments_s)):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={})


@pytest.mark.parametrize("kind", ["cold", "clone", "standby", "fork"])
def test_a_launch_connects_once(tmp_path: Path, kind: str) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            world.settings = msgspec.structs.replace(world.settings, standby=1)
            await world.start_daemon()
            for name in ("first", "second"):
                await world.request("POST", VMS, {**NEW, "name": name}, JSON)
                await wait_running(world, name, 60)
                await trio.sleep(30)
            assert world.daemon.vms.warm_pool.tags
            if kind == "clone":
                # It takes over the process that waits, and the next one finds none.
                assert (await world.request("POST", VMS, {**NEW, "name": "taker"}, JSON)).status == 201
            await launch(world, kind)
            vm = await wait_running(world, "new", 60)
            (qemu,) = [one for one in world.machine.running() if one.process.identity.pid == vm["pid"]]
            assert ("-s." in qemu.tag) == (kind == "standby")
            began = the_one(world, vm)
            await trio.sleep(AGAIN_S)
            assert the_one(world, vm) is began

    (tmp_path / "1").mkdir()
    simulate(main, seed=1, faults={})
