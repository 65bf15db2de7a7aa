"""Measures how soon a client hears that a VM's process was killed."""

from __future__ import annotations

import os
import signal
import time

import trio

from tests.system.kit import boot, event_of

from ._figure import Figure, Pairs
from ._world import current_image, volantd

TURNS = 5
_WITHIN_S = 30.0


async def vm_crashed() -> list[Figure]:
    """From SIGKILL of a VM's process until a reader of events has VM_CRASHED, and until the kernel reports its end."""
    current_image()
    took = Pairs()
    with volantd("--standby", "0") as daemon:
        async with daemon.client() as client:
            for turn in range(TURNS):
                name = f"victim-{turn}"
                vm = await boot(client, name)
                assert vm.pid is not None
                process = os.pidfd_open(vm.pid)
                try:
                    async with client.events(vm=name) as feed, trio.open_nursery() as nursery:
                        ended: list[float] = []
                        nursery.start_soon(_watch, process, ended)
                        began = time.monotonic()
                        os.kill(vm.pid, signal.SIGKILL)
                        await event_of(feed, "VM_CRASHED", name, timeout_s=_WITHIN_S)
                        heard_s = time.monotonic() - began
                finally:
                    os.close(process)
                took.add(heard_s, ended[0] - began)
                await client.vms.delete(name)
    return [Figure("vm_crashed", took.value * 1000, "ms", took.ratio, "the end of the process")]


async def _watch(process: int, ended: list[float]) -> None:
    with trio.fail_after(_WITHIN_S):
        await trio.lowlevel.wait_readable(process)
    ended.append(time.monotonic())
