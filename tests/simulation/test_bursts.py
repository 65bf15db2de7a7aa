"""Many boots at once, after a burst of creations or a reboot of the host, take a limited number of boot slots.

No VM misses its deadline because it waited, and a VM that is stopped or deleted does not wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from volant.model import Status

VMS = 40
AT_ONCE = 3
DEADLINE_S = 8.0
"""A simulated guest takes up to 6 s; forty of them, three at a time, take a minute and more."""


def run(directory: Path, story: Callable[[World], Awaitable[None]], faults: dict[str, float] | None = None) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, directory) as world:
            # Turns are those of cold boots, and a clone is none.
            world.settings = msgspec.structs.replace(
                world.settings, agent_timeout_s=DEADLINE_S, max_boots=AT_ONCE, templates="off"
            )
            await world.start_daemon()
            await story(world)

    simulate(main, seed=1, faults=faults or {}, limit_steps=20_000_000)


async def create(world: World, *names: str) -> None:
    for name in names:
        answer = await world.request(
            "POST", "/api/v1/vms", {"name": name, "cpu_cores": 1, "memory_mb": 64}, {"content-type": "application/json"}
        )
        assert answer.status == 201, answer


async def all_run(world: World, count: int, timeout_s: float, *, boots: int = 1) -> int:
    """Wait until so many run, in that boot of theirs, and none has crashed; the most that booted at one moment."""
    most = 0
    with trio.fail_after(timeout_s):
        while True:
            rows = world.daemon.store.projection.rows()
            assert all(row.status is not Status.CRASHED for row in rows), rows
            booting = [qemu for qemu in world.machine.running() if not qemu.guest.up.is_set()]
            most = max(most, len(booting))
            if sum(row.status is Status.RUNNING and row.boots == boots for row in rows) == count:
                return most
            await trio.sleep(0.01)


def test_a_burst_of_creations_boots_some_at_a_time_and_none_is_late(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, *(f"vm{n}" for n in range(VMS)))
        inspected = (await world.request("GET", f"/api/v1/vms/vm{VMS - 1}/inspect")).json()
        assert inspected["vm"]["status"] == "starting"
        assert inspected["actor"]["actor"]["turn"]["state"] == "waiting"
        assert inspected["actor"]["actor"]["turn"]["ahead"] > VMS / 2
        assert await all_run(world, VMS, 600) == AT_ONCE
        assert world.daemon.vms.slots.cold.statistics() == {"limit": AT_ONCE, "booting": 0, "waiting": 0}

    run(tmp_path, story)


def test_vms_that_are_created_at_once_boot_in_order(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(VMS):
                nursery.start_soon(create, world, f"vm{number}")
        await all_run(world, VMS, 600)
        began = {row.id: row.process.start_time for row in world.daemon.store.projection.rows() if row.process}
        for vm_id, at in began.items():
            overtook = [other for other in began if other > vm_id and began[other] < at]
            assert len(overtook) <= AT_ONCE, (vm_id, overtook)

    run(tmp_path, story)


def test_after_a_reboot_of_the_host_vms_boot_some_at_a_time(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, *(f"vm{n}" for n in range(VMS)))
        await all_run(world, VMS, 600)
        await world.request("POST", "/api/v1/vms/vm0/stop?wait=stopped")
        await world.power_cut()
        await world.start_daemon()
        assert await all_run(world, VMS - 1, 600, boots=2) == AT_ONCE
        rows = world.daemon.store.projection.rows()
        assert [row.name for row in rows if row.status is Status.STOPPED] == ["vm0"]
        # A reboot is no crash, and counts for no restart policy.
        assert {(row.boots, row.restarts) for row in rows if row.name != "vm0"} == {(2, 0)}

    run(tmp_path, story)


def test_a_vm_that_waits_for_a_boot_slot_can_be_stopped_and_deleted_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, *(f"vm{n}" for n in range(10)))
        began = trio.current_time()
        answer = await world.request("POST", "/api/v1/vms/vm9/stop?wait=stopped")
        assert answer.json()["status"] == "stopped"
        assert (await world.request("DELETE", "/api/v1/vms/vm8")).status == 204
        assert trio.current_time() - began < 1.0
        await all_run(world, 8, 600)

    run(tmp_path, story)


def test_the_next_daemon_continues_a_burst(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, *(f"vm{n}" for n in range(VMS)))
        for _ in range(5):
            await trio.sleep(3.0)
            await world.kill_daemon()
            await world.start_daemon()
        # One that was let in just before the end has its turn beside the others.
        assert await all_run(world, VMS, 600) <= 2 * AT_ONCE

    run(tmp_path, story)


def test_guests_that_never_answer_delay_others_by_one_boot_slot_only(tmp_path: Path) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            world.settings = msgspec.structs.replace(
                world.settings, agent_timeout_s=600.0, max_boots=AT_ONCE, templates="off"
            )
            await world.start_daemon()
            await create(world, *(f"hangs{n}" for n in range(AT_ONCE)))
            await trio.sleep(10.0)
            sim.faults.turn_off()
            began = trio.current_time()
            await create(world, "well")
            answer = await world.request("GET", "/api/v1/vms/well?wait=running&timeout=2m")
            assert answer.json()["status"] == "running"
            assert 15.0 < trio.current_time() - began < 45.0
            assert (await world.request("GET", "/api/v1/vms/hangs0")).json()["status"] == "starting"

    simulate(main, seed=1, faults={"guest.never_answers": 1.0}, limit_steps=20_000_000)
