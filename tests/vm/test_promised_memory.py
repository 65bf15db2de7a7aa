"""Admission counts all the memory that VMs may take, whatever they take now."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from volant.model import BASE, CreateVm, Status, VmRow, new_row
from volant.vm._capacity import OVERHEAD_MB, promised_mb


def row(vm_id: int, memory_mb: int, **fields: Any) -> VmRow:
    request = CreateVm(name=f"vm{vm_id}", cpu_cores=1, memory_mb=memory_mb)
    made = new_row(request, BASE, vm_id=vm_id, now=datetime(2026, 1, 1, tzinfo=UTC))
    return msgspec.structs.replace(made, **fields)


def test_running_and_starting_vms_count_in_full() -> None:
    up = {"status": Status.RUNNING, "tag": "volant-test"}
    assert promised_mb([]) == 0
    assert promised_mb([row(1, 256)]) == 256 + OVERHEAD_MB, "it will boot"
    assert promised_mb([row(1, 256, status=Status.STOPPED), row(2, 64, status=Status.CRASHED)]) == 0
    assert promised_mb([row(1, 256, **up), row(2, 512, **up, template="digest")]) == 768 + 2 * OVERHEAD_MB
    assert promised_mb([row(1, 256, **{**up, "status": Status.PAUSED})]) == 256 + OVERHEAD_MB
    assert promised_mb([row(1, 256, **{**up, "status": Status.STOPPING})]) == 256 + OVERHEAD_MB


def test_the_checkpoint_of_a_fork_counts_once() -> None:
    """A fork's lies in memory; a snapshot's on the disk."""
    up = {"status": Status.RUNNING, "tag": "volant-test"}
    copies = [row(1, 256, checkpoint="fork-a"), row(2, 256, **up, template="fork-a")]
    assert promised_mb(copies) == 3 * 256 + 2 * OVERHEAD_MB
    assert promised_mb([*copies, row(3, 64, **up, template="fork-b")]) == 3 * 256 + 2 * 64 + 3 * OVERHEAD_MB
    assert promised_mb([row(1, 256, **up, template="snapshot-a")]) == 256 + OVERHEAD_MB
    assert promised_mb([row(1, 256, status=Status.STOPPED, template="fork-a")]) == 0
