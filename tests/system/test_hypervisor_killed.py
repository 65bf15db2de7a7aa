"""`kill -9` of a VM's QEMU is reported at once with its reason, affects no other VM, and `start` brings the VM back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, event_of, is_alive, patched, run, until
from volant.client import LogLine


async def test_a_killed_hypervisor_is_reported_and_affects_no_other_vm(daemon: Daemon) -> None:
    async with daemon.client() as client:
        victim = await boot(client, "victim", boot="cold")
        other = await boot(client, "other")
        assert victim.pid is not None
        lost: list[object] = []

        def on_retry(error: object, delay_s: float) -> None:
            lost.append(error)

        async with (
            client.events(on_retry=on_retry) as feed,
            client.vms.logs("other", tail=0, on_retry=on_retry) as log,
        ):
            os.kill(victim.pid, signal.SIGKILL)
            event = await event_of(feed, "VM_CRASHED", "victim", timeout_s=10)
            assert event.reason is not None
            assert event.reason.code == "hypervisor_killed"
            assert "signal 9" in event.reason.message
            assert event.reason.console

            crashed = await client.vms.get("victim")
            assert crashed.status == "crashed"
            assert crashed.reason == event.reason
            assert (await client.vms.get("other")).pid == other.pid

            # The open stream of the other VM still works.
            await run(client, "other", "sh", "-c", "echo still here >/dev/console")
            with trio.fail_after(10):
                line = await log.receive()
            assert isinstance(line, LogLine)
            assert line.line == "still here"

            started = await client.vms.apply_and_wait("victim", "start", ["running"], timeout_s=BOOT_S)
            assert started.outcome == "met"
            assert started.vm is not None
            assert (started.vm.reason, started.vm.boots) == (None, 2)
            assert await run(client, "victim", "echo", "back") == "back\n"
            # The other VM had no event.
            assert (await client.vms.get("other")).updated_at == other.updated_at
            assert lost == []


async def test_a_hypervisor_killed_while_its_guest_boots_is_a_crash_too(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http, client.events() as feed:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "boot": "cold"}
        assert (await http.post("/api/v1/vms?wait=starting", json=body)).headers["volant-wait"] == "met"
        with trio.fail_after(BOOT_S):
            while (pid := (await client.vms.get("demo")).pid) is None:
                await http.get("/api/v1/vms/demo?wait=running&timeout=100ms")
        os.kill(pid, signal.SIGKILL)
        crashed = await until(client, "demo", "crashed", timeout_s=10)
        assert crashed is not None
        assert crashed.reason is not None
        assert crashed.reason.code == "hypervisor_killed"
        event = await event_of(feed, "VM_CRASHED", "demo", timeout_s=10)
        assert event.reason == crashed.reason


async def test_a_hypervisor_that_is_stopped_can_still_be_deleted(daemon: Daemon) -> None:
    """A process that never answers (SIGSTOP) is killed after the guest's grace period."""
    async with daemon.client() as client:
        vm = await boot(client, "demo")
        assert vm.pid is not None
        os.kill(vm.pid, signal.SIGSTOP)
        stopped = await client.vms.apply_and_wait("demo", "stop", ["stopped"], grace_s=1, timeout_s=60)
        assert stopped.outcome == "met"
        await client.vms.delete("demo")


IMPATIENT = """
from volant.hypervisor.qemu import _machine
change(_machine, "PULSE_S", 1.0)
change(_machine, "PULSE_TOGETHER_S", 0.5)
change(_machine, "PULSE_ANSWER_S", 2.0)
"""


# A stop may take half a second longer than this one to be no hang.
@pytest.mark.full
@pytest.mark.alone
async def test_a_hypervisor_that_hangs_is_killed_and_reported_but_a_short_stop_is_not(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon(wrapper=patched(IMPATIENT))
    async with daemon.client() as client, client.events() as feed:
        vm = await boot(client, "demo", restart_policy="on-failure")
        assert vm.pid is not None
        os.kill(vm.pid, signal.SIGSTOP)
        await trio.sleep(1.5)
        os.kill(vm.pid, signal.SIGCONT)
        assert await run(client, "demo", "echo", "alive") == "alive\n"

        os.kill(vm.pid, signal.SIGSTOP)
        event = await event_of(feed, "VM_CRASHED", "demo", timeout_s=60)
        assert event.reason is not None
        assert event.reason.code == "hypervisor_error"
        assert f"process {vm.pid} did not answer" in event.reason.message
        again = await until(client, "demo", "running")
        assert again is not None
        assert (again.boots, again.restarts) == (2, 1)
        assert not is_alive(vm.pid)
