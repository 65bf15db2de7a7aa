"""A guest powers off, reboots or dies; the VM's restart policy and `ttl` decide what follows."""

from __future__ import annotations

from tests.system.kit import (
    Daemon,
    Stopwatch,
    boot,
    event_of,
    kill_hypervisor,
    next_event,
    run,
    run_cut_off,
    spec,
    until,
)
from volant.client import Client


async def leave(client: Client, name: str, command: str) -> None:
    """Runs a command that ends the guest."""
    await run_cut_off(client, name, f"{command}; sleep 60")


async def test_a_guest_that_powers_off_is_stopped_and_one_that_reboots_comes_back(daemon: Daemon) -> None:
    async with daemon.client() as client:
        first = await boot(client, "demo")
        async with client.events(vm="demo") as feed:
            for boots, command in ((2, "reboot"), (3, "reboot -f")):
                await leave(client, "demo", command)
                events = [(await next_event(feed)).type for _ in range(4)]
                assert events == ["VM_STOPPING", "VM_STOPPED", "VM_STARTING", "VM_RUNNING"]
                again = await client.vms.get("demo")
                assert (again.boots, again.restarts) == (boots, 0)
                assert again.pid != first.pid
            await leave(client, "demo", "poweroff")
            assert [(await next_event(feed)).type for _ in range(2)] == ["VM_STOPPING", "VM_STOPPED"]
            stopped = await client.vms.get("demo")
            assert (stopped.status, stopped.desired) == ("stopped", "stopped")
            assert stopped.reason is not None
            assert stopped.reason.code == "guest_shutdown"
        assert daemon.hypervisors() == {}


async def test_a_restart_policy_starts_it_again_after_a_crash_and_not_after_a_stop(daemon: Daemon) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "demo", restart_policy="on-failure")
        async with client.events(vm="demo") as feed:
            kill_hypervisor(vm)
            for kind in ("VM_CRASHED", "VM_STARTING", "VM_RUNNING"):
                assert (await next_event(feed)).type == kind
            again = await client.vms.get("demo")
            assert (again.restarts, again.boots, again.reason) == (1, 2, None)
            await leave(client, "demo", "poweroff -f")
            for kind in ("VM_STOPPING", "VM_STOPPED"):
                assert (await next_event(feed)).type == kind
            assert (await client.vms.get("demo")).desired == "stopped"


async def test_a_policy_of_always_starts_it_again_after_a_power_off(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo", restart_policy="always")
        async with client.events(vm="demo") as feed:
            await leave(client, "demo", "poweroff")
            for kind in ("VM_STOPPING", "VM_STOPPED", "VM_STARTING", "VM_RUNNING"):
                assert (await next_event(feed)).type == kind
        assert (await client.vms.get("demo")).restarts == 1
        assert (await client.vms.apply_and_wait("demo", "stop", ["stopped"])).outcome == "met"


async def test_a_vm_is_deleted_when_its_ttl_expires(daemon: Daemon) -> None:
    async with daemon.client() as client, client.events() as feed:
        watch = Stopwatch()
        await client.vms.create(spec("demo", ttl="2s"))
        await until(client, "demo", "deleted", timeout_s=30)
        assert watch.seconds >= 1.9
        await event_of(feed, "VM_DELETED", "demo", timeout_s=5)
    assert daemon.hypervisors() == {}


async def test_a_guest_that_does_not_stop_when_asked_is_killed_after_its_grace(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await boot(client, "demo")
        await run(
            client, "demo", "sh", "-c", "setsid sh -c 'trap \"\" TERM; while :; do sleep 1; done' >/dev/null 2>&1 &"
        )
        assert (await client.vms.apply_and_wait("demo", "stop", ["stopped"], grace_s=2, timeout_s=60)).outcome == "met"
