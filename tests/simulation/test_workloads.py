"""The state of a workload is reported, a wait for a ready workload ends when it can't become ready, and a VM stops with
its workload if it should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from tests.simulated import Answer, World
from tests.simulated.guest import MISSING_PROGRAM
from tests.simulation.kit import JSON, VMS, run_story


async def create(world: World, program: str, wait: str = "ready", on_exit: str = "keep", **fields: object) -> Answer:
    manifest = {"name": "site", "workload": {"entrypoint": [program], "on_exit": on_exit}}
    assert (await world.request("POST", "/api/v1/plugins", manifest, JSON)).status == 201
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "plugin": "site", "boot": "cold", **fields}
    answer = await world.request("POST", f"{VMS}?wait={wait}&timeout=60s", body, JSON)
    assert answer.status == 201, answer.body
    return answer


async def notes(world: World) -> list[str]:
    answer = await world.request("GET", f"{VMS}/demo/logs?stream=stderr")
    lines: list[dict[str, Any]] = [json.loads(line) for line in answer.body.splitlines()]
    return [line["line"] for line in lines]


def test_a_workload_that_can_not_start_is_reported_once_and_not_awaited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        began = trio.current_time()
        answer = await create(world, MISSING_PROGRAM)
        vm = answer.json()
        assert (answer.headers["volant-wait"], vm["status"]) == ("failed", "running")
        assert trio.current_time() - began < 20, "it was waited for all the same"
        failed = vm["workload"]
        assert (failed["state"], failed["exit_code"], failed["pid"]) == ("failed", None, None)
        assert failed["error"] == "there is no program nosuch"
        [listed] = (await world.request("GET", VMS)).json()
        inspected = (await world.request("GET", f"{VMS}/demo/inspect")).json()
        assert (listed["workload"], inspected["vm"]["workload"]) == (failed, failed)
        assert await notes(world) == ["volant: the workload has failed: there is no program nosuch"]

        # The next daemon asks again, and says nothing twice.
        await world.kill_daemon()
        await world.start_daemon()
        await trio.sleep(30)
        assert (await world.request("GET", f"{VMS}/demo")).json()["workload"] == failed
        assert len(await notes(world)) == 1
        await world.request("POST", f"{VMS}/demo/stop?wait=stopped")
        assert (await world.request("GET", f"{VMS}/demo")).json()["workload"] is None

    run_story(tmp_path, story, seed=1)


async def event_types(world: World) -> list[str]:
    """The types of all events."""
    found: list[str] = []
    async with world.stream("GET", "/api/v1/events/vms?since=0") as stream:
        with trio.move_on_after(5):
            while data := await stream.receive():
                found += [line[7:] for line in data.decode().splitlines() if line.startswith("event: ")]
    return found


BOOT = ["VM_CREATED", "VM_STARTING", "VM_RUNNING"]
STOP = ["VM_STOPPING", "VM_STOPPED"]
DELETED = ["VM_STOPPING", "VM_DELETED"]


def test_a_vm_stops_with_its_workload_and_keeps_its_state(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = (await create(world, "ends", on_exit="stop", wait="stopped")).json()
        assert (vm["status"], vm["desired"], vm["reason"]["code"]) == ("stopped", "stopped", "workload_exited")
        assert (vm["workload"]["state"], vm["workload"]["exit_code"]) == ("exited", 0)
        # A client that asks late gets the same answer, after a restart of the daemon too.
        await world.kill_daemon()
        await world.start_daemon()
        late = await world.request("GET", f"{VMS}/demo?wait=ready&timeout=60s")
        assert (late.headers["volant-wait"], late.json()["workload"]) == ("met", vm["workload"])
        [listed] = (await world.request("GET", VMS)).json()
        assert listed["workload"] == vm["workload"]
        assert await event_types(world) == [
            *BOOT, "WORKLOAD_STARTED", "WORKLOAD_READY", "WORKLOAD_EXITED", *STOP,
        ]  # fmt: skip

        # The next boot runs it again.
        again = await world.request("POST", f"{VMS}/demo/start?wait=running&timeout=60s")
        assert (again.json()["workload"]["state"], again.json()["reason"]) in (("starting", None), ("healthy", None))
        await world.request("GET", f"{VMS}/demo?wait=stopped&timeout=60s")
        assert (await event_types(world)).count("WORKLOAD_EXITED") == 2

    run_story(tmp_path, story, seed=3)


def test_a_vm_that_is_not_kept_is_deleted_with_its_workload(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, "ends", on_exit="delete", wait="running")
        late = await world.request("GET", f"{VMS}/demo?wait=deleted&timeout=60s")
        assert late.status == 404 or late.headers["volant-wait"] == "met"
        types = await event_types(world)
        assert types == [*BOOT, "WORKLOAD_STARTED", "WORKLOAD_READY", "WORKLOAD_EXITED", *DELETED]
        assert not world.machine.running()

    run_story(tmp_path, story, seed=3)


def test_a_workload_that_no_client_attaches_to_fails(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        world.machine.registry.push("app")
        body = {"name": "demo", "image": "app", "attach": True, "on_exit": "delete", "boot": "cold"}
        answer = await world.request("POST", f"{VMS}?wait=running&timeout=60s", body, JSON)
        assert (answer.status, answer.json()["workload"]["pid"]) == (201, None), answer.body
        await world.request("GET", f"{VMS}/demo?wait=deleted&timeout=300s")
        types = await event_types(world)
        assert "WORKLOAD_STARTED" not in types
        assert types[-3:] == ["WORKLOAD_FAILED", *DELETED]

    run_story(tmp_path, story, seed=3, client__stays_away=1.0)


def test_a_vm_whose_workload_fails_stops_with_the_reason(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = (await create(world, "fails", on_exit="stop", wait="stopped")).json()
        why = "the workload has failed: it ended with exit code 3"
        assert (vm["status"], vm["reason"]["code"], vm["reason"]["message"]) == ("stopped", "workload_failed", why)
        late = await world.request("GET", f"{VMS}/demo?wait=ready&timeout=60s")
        assert (late.headers["volant-wait"], late.json()["workload"]["exit_code"]) == ("failed", 3)
        assert "WORKLOAD_FAILED" in await event_types(world)
        assert await notes(world) == ["volant: the workload has failed: it ended with exit code 3"]

    run_story(tmp_path, story, seed=4)


def test_a_vm_whose_program_does_not_exist_stops_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        answer = await create(world, MISSING_PROGRAM, on_exit="stop")
        assert answer.headers["volant-wait"] == "failed"
        await world.request("GET", f"{VMS}/demo?wait=stopped&timeout=60s")
        assert await event_types(world) == [*BOOT, "WORKLOAD_FAILED", *STOP]
        vm = (await world.request("GET", f"{VMS}/demo")).json()
        assert vm["reason"]["message"] == "the workload has failed: there is no program nosuch"
        assert (vm["workload"]["state"], vm["workload"]["error"]) == ("failed", "there is no program nosuch")

    run_story(tmp_path, story, seed=5)


def test_a_failing_workload_is_started_again_with_its_vm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, "fails", on_exit="stop", wait="stopped", restart_policy="on-failure")
        await trio.sleep(40)
        vm = (await world.request("GET", f"{VMS}/demo")).json()
        assert vm["restarts"] >= 2, vm
        stopped = await world.request("POST", f"{VMS}/demo/stop?wait=stopped&timeout=60s")
        assert (stopped.json()["status"], stopped.json()["desired"]) == ("stopped", "stopped")

    run_story(tmp_path, story, seed=6)


def test_a_guest_that_reports_all_the_time_makes_few_events(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await create(world, "server", wait="running")
        [guest] = [qemu.guest for qemu in world.machine.running()]
        guest.flickers = True
        with trio.move_on_after(300):
            while True:
                guest.workload_changes()
                await trio.sleep(0.05)
        reported = [kind for kind in await event_types(world) if kind.startswith("WORKLOAD")]
        # Twenty in a row, one in ten seconds after that, and each has two events at most.
        assert 40 <= len(reported) <= 2 * (20 + 300 // 10 + 5), len(reported)

    run_story(tmp_path, story, seed=7)


def test_a_running_workload_is_ready(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        answer = await create(world, "server")
        assert (answer.headers["volant-wait"], answer.json()["workload"]["state"]) == ("met", "healthy")
        # Without one to wait for, a VM is ready when it runs.
        body = {"name": "bare", "cpu_cores": 1, "memory_mb": 128, "boot": "cold"}
        answer = await world.request("POST", f"{VMS}?wait=ready&timeout=60s", body, JSON)
        assert (answer.headers["volant-wait"], answer.json()["workload"]) == ("met", None)

    run_story(tmp_path, story, seed=2)
