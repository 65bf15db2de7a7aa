"""`kill -9` of a VM's QEMU is reported at once with its reason, affects no other VM, and `start` brings the VM back."""

from __future__ import annotations

import os
import signal

import trio

from tests.system.kit import BOOT_S, Daemon, boot, event_of, run
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
