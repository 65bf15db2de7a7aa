"""A real guest boots however late QEMU is."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.hypervisor.kit import guest_spec
from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import QemuHypervisor
from volant.model.agent import HEALTHZ

BOOT_S = 120.0


@pytest.fixture
def spec(host: Host, image_cache: Path, tmp_path: Path) -> MachineSpec:
    return guest_spec(host, image_cache, tmp_path / "vm", name="boot", memory_mb=128, cmdline="")


@pytest.mark.full
async def test_a_guest_boots_while_qemu_gets_no_turn(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    """QEMU's main thread raises the interrupts of the guest's first timer. When they came late, the kernel panicked:
    'IO-APIC + timer doesn't work'."""
    identity = await qemu.launch(spec)
    cpu = min(os.sched_getaffinity(0))
    async with qemu.attach(spec, identity) as machine, open_channel(host, VirtioSerial(spec.agent_path)) as channel:
        # Only this thread, not those of the virtual processors.
        os.sched_setaffinity(identity.pid, {cpu})
        os.sched_setscheduler(identity.pid, os.SCHED_IDLE, os.sched_param(0))
        hog = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"]
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.run_process, hog))
                raise AssertionError(await machine.ended())
        await AgentClient(channel).request_json("GET", HEALTHZ, timeout_s=BOOT_S)
        await machine.kill()
