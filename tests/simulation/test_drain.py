"""While the daemon drains, nothing starts; running VMs continue or are stopped; an undrain restores everything."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulated import World
from tests.simulation.kit import JSON, run_story
from volant.vm._drain import AT_ONCE

SYSTEM = "/api/v1/system"


run = partial(run_story, seed=7, limit_s=3600)


async def create(world: World, name: str, **fields: object) -> Any:
    body = {"name": name, "cpu_cores": 1, "memory_mb": 128, **fields}
    return await world.request("POST", "/api/v1/vms", body, JSON)


async def boot(world: World, *names: str, **fields: object) -> None:
    for name in names:
        assert (await create(world, name, **fields)).status == 201
    for name in names:
        await until(world, name, "running")


async def until(world: World, name: str, status: str, timeout: str = "5m") -> None:
    answer = await world.request("GET", f"/api/v1/vms/{name}?wait={status}&timeout={timeout}")
    assert answer.json()["status"] == status, answer.body


async def post(world: World, path: str, expected: int = 200) -> Any:
    answer = await world.request("POST", path)
    assert answer.status == expected, answer.body
    return answer.json()


def statuses(world: World) -> dict[str, str]:
    return {row.name: row.status.value for row in world.daemon.store.projection.rows()}


def test_a_draining_daemon_creates_and_starts_nothing_across_restarts(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "up", "down")
        await post(world, "/api/v1/vms/down/stop?wait=stopped")
        drained = await post(world, f"{SYSTEM}/drain")
        assert drained["draining_since"].endswith("Z")
        # Again, the same.
        await trio.sleep(5)
        assert (await post(world, f"{SYSTEM}/drain"))["draining_since"] == drained["draining_since"]

        for restart in (world.stop_daemon, world.kill_daemon, None):
            for path in ("/api/v1/vms/down/start", "/api/v1/vms/down/restart", "/api/v1/vms/up/restart"):
                refused = await post(world, path, 503)
                assert refused["type"] == "urn:volant:error:draining"
                assert "undrain" in refused["hint"]
            refused_create = await create(world, "more")
            assert (refused_create.status, refused_create.json()["type"]) == (503, "urn:volant:error:draining")
            # What would start nothing is not refused.
            await post(world, "/api/v1/vms/up/start")
            status = (await world.request("GET", f"{SYSTEM}/status")).json()
            assert (status["status"], status["draining_since"]) == ("ok", drained["draining_since"])
            assert statuses(world) == {"up": "running", "down": "stopped"}
            if restart is not None:
                await restart()
                await world.start_daemon()
                await trio.sleep(5)

        assert (await post(world, f"{SYSTEM}/undrain"))["draining_since"] is None
        assert (await post(world, f"{SYSTEM}/undrain"))["draining_since"] is None
        await post(world, "/api/v1/vms/down/start?wait=running")
        await boot(world, "more")

    run(tmp_path, story)


def test_a_due_boot_waits_for_the_end_of_the_drain(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "faithful", restart_policy="always")
        await boot(world, "plain")
        await post(world, f"{SYSTEM}/drain")
        for qemu in world.machine.running():
            world.machine.signal(qemu.process, 9)
        await until(world, "faithful", "crashed")
        await trio.sleep(300)
        assert statuses(world) == {"faithful": "crashed", "plain": "crashed"}
        await post(world, f"{SYSTEM}/undrain")
        await until(world, "faithful", "running")
        assert statuses(world)["plain"] == "crashed"

    run(tmp_path, story)


def test_after_a_reboot_of_the_host_vms_wait_for_the_end_of_the_drain(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "one", "two")
        await post(world, f"{SYSTEM}/drain")
        await world.power_cut()
        await world.start_daemon()
        await trio.sleep(300)
        assert statuses(world) == {"one": "stopped", "two": "stopped"}
        assert not world.machine.running()
        await post(world, f"{SYSTEM}/undrain")
        await until(world, "one", "running")
        await until(world, "two", "running")

    run(tmp_path, story)


NAMES = [f"vm{number}" for number in range(12)]


@pytest.mark.parametrize("stubborn", [0.0, 1.0], ids=["polite", "stubborn"])
def test_vms_are_stopped_some_at_a_time_and_start_again_afterwards(tmp_path: Path, stubborn: float) -> None:
    async def story(world: World) -> None:
        await boot(world, *NAMES)
        most = 0

        async def watch() -> None:
            nonlocal most
            async with world.daemon.store.events.cursor(world.daemon.store.projection.last_event) as cursor:
                while await cursor.take():
                    most = max(most, sum(status == "stopping" for status in statuses(world).values()))

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await post(world, f"{SYSTEM}/drain?stop_vms=true&grace=20s")
            for name in NAMES:
                await until(world, name, "stopped")
            nursery.cancel_scope.cancel()
        assert 2 <= most <= AT_ONCE
        assert trio.current_time() - began < 3 * 30
        assert not world.machine.running()
        # Somebody wants these otherwise.
        await post(world, "/api/v1/vms/vm3/stop")
        assert (await world.request("DELETE", "/api/v1/vms/vm4")).status == 204
        # A drain that says nothing of VMs takes nothing back.
        await post(world, f"{SYSTEM}/drain")
        await trio.sleep(60)

        await post(world, f"{SYSTEM}/undrain")
        for name in NAMES:
            if name not in ("vm3", "vm4"):
                await until(world, name, "running")
        assert statuses(world)["vm3"] == "stopped"

    run(tmp_path, story, guest__ignores_shutdown=stubborn)


def test_the_next_daemon_continues_the_stops(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, *NAMES)
        await post(world, f"{SYSTEM}/drain?stop_vms=true&grace=20s")
        for _ in range(3):
            await trio.sleep(1)
            assert "running" in statuses(world).values()
            await world.kill_daemon()
            await world.start_daemon()
        for name in NAMES:
            await until(world, name, "stopped")
        await post(world, f"{SYSTEM}/undrain")
        for name in NAMES:
            await until(world, name, "running")

    run(tmp_path, story, guest__ignores_shutdown=1.0)


def test_an_undrain_in_the_middle_leaves_the_other_vms_running(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, *NAMES)
        pids = {row.name: row.process for row in world.daemon.store.projection.rows()}
        await post(world, f"{SYSTEM}/drain?stop_vms=true&grace=20s")
        await trio.sleep(1)
        await post(world, f"{SYSTEM}/undrain")
        for name in NAMES:
            await until(world, name, "running")
        await trio.sleep(120)
        untouched = [row for row in world.daemon.store.projection.rows() if row.process == pids[row.name]]
        assert len(untouched) >= len(NAMES) - AT_ONCE
        assert set(statuses(world).values()) == {"running"}

    run(tmp_path, story, guest__ignores_shutdown=1.0)


def test_a_malformed_drain_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for query, field in (("grace=soon", "grace"), ("stop_vms=perhaps", "stop_vms"), ("until=noon", "until")):
            assert (await post(world, f"{SYSTEM}/drain?{query}", 400))["field"] == field
        assert (await world.request("GET", f"{SYSTEM}/status")).json()["draining_since"] is None

    run(tmp_path, story)


@pytest.mark.parametrize("boot_mode", ["cold", "auto", "template"])
def test_a_vm_that_waits_for_a_boot_slot_does_not_boot_in_a_drain(tmp_path: Path, boot_mode: str) -> None:
    async def story(world: World) -> None:
        for name in NAMES:
            assert (await create(world, name, boot=boot_mode)).status == 201
        await trio.sleep(0.3)
        await post(world, f"{SYSTEM}/drain")
        await trio.sleep(1)
        booting = {qemu.tag for qemu in world.machine.running()}
        assert len(booting) < len(NAMES)
        await trio.sleep(300)
        assert {qemu.tag for qemu in world.machine.running()} <= booting
        held = [name for name, status in statuses(world).items() if status == "starting"]
        assert held
        for restart in (world.kill_daemon, world.stop_daemon):
            await restart()
            await world.start_daemon()
            await trio.sleep(60)
            assert {qemu.tag for qemu in world.machine.running()} <= booting
        assert not any("-t." in qemu.tag for qemu in world.machine.running())
        # Somebody may want it otherwise, and is heard at once.
        assert (await world.request("DELETE", f"/api/v1/vms/{held[0]}")).status == 204
        await post(world, f"{SYSTEM}/undrain")
        for name in NAMES:
            if name != held[0]:
                await until(world, name, "running")

    run(tmp_path, story)


def test_a_vm_that_waits_for_a_boot_slot_is_stopped_and_started_as_running_vms(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for name in NAMES:
            assert (await create(world, name, boot="cold")).status == 201
        await trio.sleep(0.3)
        await post(world, f"{SYSTEM}/drain")
        await trio.sleep(60)
        assert "starting" in statuses(world).values()
        await post(world, f"{SYSTEM}/drain?stop_vms=true&grace=20s")
        for name in NAMES:
            await until(world, name, "stopped")
        assert not world.machine.running()
        await post(world, f"{SYSTEM}/undrain")
        for name in NAMES:
            await until(world, name, "running")

    run(tmp_path, story)
