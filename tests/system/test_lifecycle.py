"""A VM's lifecycle: each change of status is one event, commands are durable, and nothing is left at the end."""

from __future__ import annotations

import httpx
import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, is_alive, next_event, run, spec, until
from volant.client import ClientProblem

pytestmark = pytest.mark.cold


async def test_each_change_of_status_is_one_event_and_the_ids_have_no_holes(daemon: Daemon) -> None:
    async with daemon.client() as client, client.events() as feed:
        vm = await boot(client, "demo", labels={"team": "red"})
        assert vm.pid is not None
        assert is_alive(vm.pid)
        assert (vm.hypervisor, vm.accelerator, vm.boots) == ("qemu", "tcg", 1)
        assert await run(client, "demo", "hostname") == "demo\n"

        stopped = await client.vms.apply_and_wait("demo", "stop", ["stopped"])
        assert stopped.outcome == "met"
        assert stopped.vm is not None
        assert stopped.vm.pid is None
        assert not is_alive(vm.pid)
        assert daemon.files() == []

        started = await client.vms.apply_and_wait("demo", "start", ["running"], timeout_s=BOOT_S)
        assert started.outcome == "met"
        assert started.vm is not None
        assert started.vm.boots == 2
        again = await client.vms.apply_and_wait("demo", "restart", ["stopped"], timeout_s=BOOT_S)
        assert again.outcome == "met"
        third = await until(client, "demo", "running")
        assert third is not None
        assert third.boots == 3
        assert third.id == vm.id

        # These change nothing, so they cause no event.
        await client.vms.start("demo")
        await client.vms.delete("demo")

        events = [await next_event(feed) for _ in range(13)]
        assert [event.type.removeprefix("VM_") for event in events] == [
            *("CREATED", "STARTING", "RUNNING"),
            *("STOPPING", "STOPPED", "STARTING", "RUNNING"),
            *("STOPPING", "STOPPED", "STARTING", "RUNNING"),
            *("STOPPING", "DELETED"),
        ]
        assert {(event.name, event.vm_id) for event in events} == {("demo", vm.id)}
        assert events[-2].status == "deleting"
        numbers = [int(event.id.rpartition("-")[2]) for event in events]
        assert numbers == list(range(numbers[0], numbers[0] + len(events)))
    assert daemon.hypervisors() == {}
    assert daemon.files() == []


async def test_events_resume_after_an_id(daemon: Daemon) -> None:
    async with daemon.client() as client:
        before = await client.newest_event()
        await client.vms.create(spec("demo"))
        await client.vms.delete("demo")
        async with client.events(after=before) as feed:
            first = await next_event(feed)
            second = await next_event(feed)
        async with client.events(after=first.id) as feed:
            assert await next_event(feed) == second
        assert first.type == "VM_CREATED"


@pytest.mark.full
async def test_a_second_delete_joins_the_first(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        await boot(client, "demo")
        answers: list[int] = []

        async def delete() -> None:
            answers.append((await http.delete("/api/v1/vms/demo")).status_code)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(delete)
            nursery.start_soon(delete)
        assert answers in ([204, 204], [204, 404])
        assert daemon.hypervisors() == {}
        assert daemon.files() == []


@pytest.mark.full
async def test_a_client_that_leaves_does_not_cancel_its_delete(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        vm = await boot(client, "demo")
        with pytest.raises(httpx.ReadTimeout):
            await http.delete("/api/v1/vms/demo", timeout=httpx.Timeout(30, read=0.05))
        await until(client, "demo", "deleted")
        assert vm.pid is not None
        assert not is_alive(vm.pid)


async def test_a_name_can_be_reused_but_an_id_cannot(daemon: Daemon) -> None:
    async with daemon.client() as client:
        first = await client.vms.create(spec("demo"))
        with pytest.raises(ClientProblem) as taken:
            await client.vms.create(spec("demo"))
        assert (taken.value.status, taken.value.vm) == (409, "demo")
        await client.vms.delete("demo")
        second = await client.vms.create(spec("demo"))
        assert second.id > first.id


async def test_a_wait_says_whether_it_was_met(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
        slow = await http.post("/api/v1/vms?wait=stopped&timeout=100ms", json=body)
        assert (slow.status_code, slow.headers["volant-wait"]) == (201, "timeout")
        assert slow.headers["location"] == "/api/v1/vms/demo"
        # A stop kills it during its boot, so it settles in a state that the wait did not name.
        failed = await http.post("/api/v1/vms/demo/stop?wait=crashed&timeout=60s")
        assert (failed.status_code, failed.headers["volant-wait"]) == (200, "failed")
        assert failed.json()["status"] == "stopped"
        # A state that it only passed through counts, too.
        met = await http.post("/api/v1/vms/demo/start?wait=starting&timeout=60s")
        assert met.headers["volant-wait"] == "met"
        await client.vms.delete("demo")
        gone = await http.get("/api/v1/vms/demo?wait=running")
        assert gone.status_code == 404
