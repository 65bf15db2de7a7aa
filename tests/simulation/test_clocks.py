"""A hanging guest does not delay updates of clocks and hosts entries in other guests."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulated.guest import SimGuest
from tests.simulated.qemu import SimQemu
from tests.simulation.kit import JSON, VMS, run_story
from volant.session._peers import HOSTS_AT_ONCE

SOON_S = 6.0


async def machine_of(world: World, name: str) -> SimQemu:
    vm = (await world.request("GET", f"{VMS}/{name}?wait=running&timeout=30s")).json()
    assert vm["status"] == "running", vm
    return next(qemu for qemu in world.machine.running() if qemu.process.identity.pid == vm["pid"])


def test_a_hanging_guest_does_not_delay_the_clocks_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(world: World) -> None:
        body = {"name": "first", "cpu_cores": 1, "memory_mb": 128, "boot": "cold"}
        assert (await world.request("POST", f"{VMS}?wait=running", body, JSON)).status == 201
        # On a busy host no clock is set well enough by the first tries.
        monkeypatch.setattr(SimGuest, "way_s", 0.2)
        machines: dict[str, SimQemu] = {}
        for name in ("hangs", "other"):
            assert (await world.request("POST", f"{VMS}/first/fork", {"names": [name]}, JSON)).status == 201
            machines[name] = await machine_of(world, name)
            if name == "hangs":
                machines[name].guest.pause()
        monkeypatch.setattr(SimGuest, "way_s", 0.0)
        runs_since = trio.current_time()
        await trio.sleep(SOON_S)
        assert not [at for at in machines["hangs"].guest.clock_set_at if at > runs_since]
        assert [at for at in machines["other"].guest.clock_set_at if at > runs_since], "nobody came to its clock"

    run_story(tmp_path, story, seed=1)


def test_hanging_guests_do_not_keep_others_from_knowing_their_peers(tmp_path: Path) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            await world.start_daemon()
            assert (await world.request("POST", "/api/v1/networks", {"name": "blue"}, JSON)).status == 201
            names = [f"hangs-{number}" for number in range(2 * HOSTS_AT_ONCE)] + ["other"]
            machines: dict[str, SimQemu] = {}
            for name in names:
                body = {"name": name, "cpu_cores": 1, "memory_mb": 64, "boot": "cold", "network": "blue"}
                assert (await world.request("POST", VMS, body, JSON)).status == 201
                machines[name] = await machine_of(world, name)
                machines[name].guest.protocol = 99
            await trio.sleep(30)
            for name in names[:-1]:
                machines[name].guest.pause()
            body = {"name": "comes", "cpu_cores": 1, "memory_mb": 64, "boot": "cold", "network": "blue"}
            assert (await world.request("POST", VMS, body, JSON)).status == 201
            await trio.sleep(SOON_S)
            assert "comes" in machines["other"].guest.hosts

    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={})
