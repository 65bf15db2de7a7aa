"""An orphaned hypervisor is listed and not touched, until a client adopts or kills it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import trio

from actors.testing import allow_real
from tests.simulated import World
from tests.simulation.kit import JSON, run_story

ORPHANS = "/api/v1/system/orphans"


run = partial(run_story, seed=3, limit_s=3600)


async def boot(world: World, name: str, **fields: object) -> Any:
    body = {"name": name, "cpu_cores": 2, "memory_mb": 128, **fields}
    answer = await world.request("POST", "/api/v1/vms?wait=running&timeout=5m", body, JSON)
    assert answer.json()["status"] == "running", answer
    return answer.json()


async def lose_the_database(world: World) -> None:
    """The daemon begins anew and knows of nothing."""
    await world.kill_daemon()
    with allow_real("files"):
        for path in world.settings.state_dir.glob("volant.db*"):
            path.unlink()
    await world.start_daemon()
    while world.daemon.status.health() != "ok":  # noqa: ASYNC110 - it offers no wait
        await trio.sleep(0.1)


async def orphans(world: World) -> Any:
    answer = await world.request("GET", ORPHANS)
    assert answer.status == 200
    return answer.json()


def test_a_lost_database_costs_no_vm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await boot(world, "demo", kernel_cmdline="quiet loglevel=3")
        other = await boot(world, "other")
        await lose_the_database(world)
        assert [qemu.process.identity.pid for qemu in world.machine.running()] == [vm["pid"], other["pid"]]
        info = (await world.request("GET", "/api/v1/system/info")).json()
        found = await orphans(world)
        assert info["orphans"] == [{"pid": one["pid"], "tag": one["tag"]} for one in found]
        first = found[0]
        assert first == {
            "tag": first["tag"], "pid": vm["pid"], "vm_id": vm["id"], "name": "demo", "cpu_cores": 2,
            "memory_mb": 128, "adoptable": True, "obstacle": None,
        }  # fmt: skip

        # Its id is given to nobody else, so nothing of a new VM's is where its own is.
        new = await boot(world, "new")
        assert new["id"] > other["id"]

        answer = await world.request("POST", f"{ORPHANS}/{first['tag']}/adopt")
        assert answer.status == 201, answer
        adopted = answer.json()
        kept = ("id", "name", "pid", "cpu_cores", "memory_mb", "kernel_cmdline", "accelerator", "serial_socket")
        assert {key: adopted[key] for key in kept} == {key: vm[key] for key in kept}
        assert (adopted["status"], adopted["boots"], adopted["plugin"]) == ("running", 1, "base")
        assert [one["name"] for one in await orphans(world)] == ["other"]
        assert (await world.request("POST", f"{ORPHANS}/{first['tag']}/adopt")).status == 404

        # From now on it is a VM like any other: held over kills, asked to stop, booted again.
        await world.kill_daemon()
        await world.start_daemon()
        assert (await world.request("GET", "/api/v1/vms/demo?wait=running")).json()["pid"] == vm["pid"]
        stopped = await world.request("POST", "/api/v1/vms/demo/stop?wait=stopped")
        assert stopped.json()["status"] == "stopped"
        again = await world.request("POST", "/api/v1/vms/demo/start?wait=running&timeout=5m")
        assert (again.json()["status"], again.json()["boots"]) == ("running", 2)

    run(tmp_path, story)


def test_an_adopted_orphan_is_reported_as_a_new_vm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "demo")
        await lose_the_database(world)
        tag = (await orphans(world))[0]["tag"]
        assert (await world.request("POST", f"{ORPHANS}/{tag}/adopt")).status == 201
        async with world.stream("GET", "/api/v1/events/vms?since=0") as stream:
            told = b""
            while told.count(b"event: ") < 3:
                told += await stream.receive()
        types = [line.removeprefix(b"event: ") for line in told.splitlines() if line.startswith(b"event: ")]
        assert types == [b"VM_CREATED", b"VM_STARTING", b"VM_RUNNING"]

    run(tmp_path, story)


def test_an_adopted_orphan_gets_another_name_if_its_own_is_taken(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await boot(world, "demo")
        await lose_the_database(world)
        await boot(world, "demo")
        tag = (await orphans(world))[0]["tag"]
        refused = await world.request("POST", f"{ORPHANS}/{tag}/adopt")
        assert (refused.status, refused.json()["field"]) == (409, "name")
        assert (await world.request("POST", f"{ORPHANS}/{tag}/adopt?name=No.")).status == 400
        adopted = await world.request("POST", f"{ORPHANS}/{tag}/adopt?name=demo-2")
        assert (adopted.status, adopted.json()["id"], adopted.json()["pid"]) == (201, vm["id"], vm["pid"])
        assert adopted.headers["location"] == "/api/v1/vms/demo-2"

    run(tmp_path, story)


def test_a_killed_orphan_leaves_only_its_disk(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await boot(world, "demo")
        await lose_the_database(world)
        tag = (await orphans(world))[0]["tag"]
        assert (await world.request("POST", f"{ORPHANS}/{tag}/kill")).status == 204
        assert not world.machine.running()
        assert world.machine.files.names(world.settings.runtime_dir / "vms") == []
        assert not [path for path in world.machine.files.below(Path("/dev/shm")) if path.name == f"{vm['id']}.mem"]
        assert await orphans(world) == []
        assert (await world.request("GET", "/api/v1/system/info")).json()["orphans"] == []

    run(tmp_path, story)


def test_a_process_of_a_vm_is_no_orphan(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "demo")
        tag = world.machine.running()[0].tag
        assert await orphans(world) == []
        for action in ("kill", "adopt"):
            answer = await world.request("POST", f"{ORPHANS}/{tag}/{action}")
            assert (answer.status, answer.json()["type"]) == (404, "urn:volant:error:orphan-not-found")
        assert len(world.machine.running()) == 1

    run(tmp_path, story)


def test_an_orphan_that_can_not_be_adopted_is_left_running_with_a_reason(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await boot(world, "demo")
        await lose_the_database(world)
        qemu = world.machine.running()[0]
        world.machine.files.unlink(world.settings.runtime_dir / "vms" / "1" / "qmp.sock")
        refused = await world.request("POST", f"{ORPHANS}/{qemu.tag}/adopt")
        assert refused.status == 409, refused
        assert "can't be controlled" in refused.json()["detail"]
        world.machine.files.remove_tree(world.settings.runtime_dir / "vms" / "1")
        found = (await orphans(world))[0]
        assert (found["adoptable"], found["obstacle"]) == (False, "the directory with its sockets is gone")
        assert (await world.request("POST", f"{ORPHANS}/{qemu.tag}/adopt")).status == 409
        assert world.machine.running() == [qemu]
        assert world.daemon.store.projection.rows() == []

    run(tmp_path, story)
