"""What VMs use of the host is measured for those with a process; a tap's directions are the reverse of its VM's."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from volant.host import Host, ProcessGone, ProcessUsage
from volant.model import BASE, CreateVm, Lease, ProcessIdentity, VmRow, VmStats, new_row
from volant.vm._memory import measure_stats

LEASE = Lease(address="10.0.0.2", prefix=16, gateway="10.0.0.1", mac="02:00:00:00:00:01", tap="vt-one")


def row(vm_id: int, pid: int | None, lease: Lease | None = None) -> VmRow:
    request = CreateVm(name=f"vm{vm_id}", cpu_cores=2, memory_mb=256)
    made = new_row(request, BASE, vm_id=vm_id, now=datetime(2026, 1, 1, tzinfo=UTC))
    process = None if pid is None else ProcessIdentity(pid=pid, start_time=1, boot_id="boot", tag="volant-test-7.1")
    return msgspec.structs.replace(made, process=process, lease=lease)


async def test_the_figures_are_those_of_the_process_and_its_tap() -> None:
    def usage(identity: ProcessIdentity) -> ProcessUsage:
        if identity.pid == 9:
            raise ProcessGone("it has ended")
        return ProcessUsage(cpu_s=1.234, rss_kb=102400, read_bytes=5, written_bytes=6)

    host: Any = SimpleNamespace(
        proc=SimpleNamespace(usage=usage),
        clock=SimpleNamespace(monotonic=lambda: 7.0),
        machine=SimpleNamespace(interface_bytes=lambda: {"lo": (1, 2), "vt-one": (30, 40)}),
    )
    rows = [row(1, 7, LEASE), row(2, 8), row(3, None), row(4, 9)]
    one, two = await measure_stats(cast(Host, host), rows)
    assert one == VmStats(
        name="vm1", cpu_cores=2, memory_mb=256, clock_s=7.0, cpu_s=1.23, rss_mb=100.0, disk_read_bytes=5,
        disk_written_bytes=6, received_bytes=40, sent_bytes=30,
    )  # fmt: skip
    assert (two.name, two.received_bytes, two.sent_bytes) == ("vm2", None, None)
