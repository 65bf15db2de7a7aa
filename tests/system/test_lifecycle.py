"""A VM's lifecycle: each change of status is one event, also when the guest or its `ttl` ends it."""

from __future__ import annotations

import pytest

from tests.system.kit import (
    BOOT_S,
    Daemon,
    Stopwatch,
    boot,
    event_of,
    is_alive,
    next_event,
    run,
    run_cut_off,
    spec,
    until,
)

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


async def test_a_guest_that_powers_off_is_stopped_and_one_that_reboots_comes_back(daemon: Daemon) -> None:
    async with daemon.client() as client:
        first = await boot(client, "demo")
        async with client.events(vm="demo") as feed:
            for boots, command in ((2, "reboot"), (3, "reboot -f")):
                await run_cut_off(client, "demo", f"{command}; sleep 60")
                events = [(await next_event(feed)).type for _ in range(4)]
                assert events == ["VM_STOPPING", "VM_STOPPED", "VM_STARTING", "VM_RUNNING"]
                again = await client.vms.get("demo")
                assert (again.boots, again.restarts) == (boots, 0)
                assert again.pid != first.pid
            await run_cut_off(client, "demo", "poweroff; sleep 60")
            assert [(await next_event(feed)).type for _ in range(2)] == ["VM_STOPPING", "VM_STOPPED"]
            stopped = await client.vms.get("demo")
            assert (stopped.status, stopped.desired) == ("stopped", "stopped")
            assert stopped.reason is not None
            assert stopped.reason.code == "guest_shutdown"
        assert daemon.hypervisors() == {}


async def test_a_vm_is_deleted_when_its_ttl_expires(daemon: Daemon) -> None:
    async with daemon.client() as client, client.events() as feed:
        watch = Stopwatch()
        await client.vms.create(spec("demo", ttl="2s"))
        await until(client, "demo", "deleted", timeout_s=30)
        assert watch.seconds >= 1.9
        await event_of(feed, "VM_DELETED", "demo", timeout_s=5)
    assert daemon.hypervisors() == {}
