"""Admission counts the memory that VMs may take, and what stays free for it."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from volant.model import BASE, CreateVm, Problem, Status, VmRow, new_row
from volant.vm._capacity import IDLE_MB, OVERHEAD_MB, Capacity, memory_need, promised_mb
from volant.vm._layout import VmSettings

HOST_MB = 512
UP: dict[str, Any] = {"status": Status.RUNNING, "tag": "volant-test", "process": object()}


def row(vm_id: int, memory_mb: int, **fields: Any) -> VmRow:
    request = CreateVm(name=f"vm{vm_id}", cpu_cores=1, memory_mb=memory_mb)
    made = new_row(request, BASE, vm_id=vm_id, now=datetime(2026, 1, 1, tzinfo=UTC))
    return msgspec.structs.replace(made, **fields)


def test_running_and_starting_vms_count_in_full() -> None:
    assert promised_mb([]) == 0
    assert promised_mb([row(1, 256)]) == 256 + OVERHEAD_MB, "it will boot"
    assert promised_mb([row(1, 256, status=Status.STOPPED), row(2, 64, status=Status.CRASHED)]) == 0
    assert promised_mb([row(1, 256, **UP), row(2, 512, **UP, template="digest")]) == 768 + 2 * OVERHEAD_MB
    assert promised_mb([row(1, 256, **{**UP, "status": Status.PAUSED})]) == 256 + OVERHEAD_MB
    assert promised_mb([row(1, 256, **{**UP, "status": Status.STOPPING})]) == 256 + OVERHEAD_MB


def test_the_checkpoint_of_a_fork_counts_once() -> None:
    """A fork's lies in memory; a snapshot's on the disk."""
    copies = [row(1, 256, checkpoint="fork-a"), row(2, 256, **UP, template="fork-a")]
    assert promised_mb(copies) == 3 * 256 + 2 * OVERHEAD_MB
    assert promised_mb([*copies, row(3, 64, **UP, template="fork-b")]) == 3 * 256 + 2 * 64 + 3 * OVERHEAD_MB
    assert promised_mb([row(1, 256, **UP, template="snapshot-a")]) == 256 + OVERHEAD_MB
    assert promised_mb([row(1, 256, status=Status.STOPPED, template="fork-a")]) == 0


class Machine:
    """A host's memory, in MiB."""

    def __init__(self, total_mb: int) -> None:
        self.total_mb = self.available_mb = total_mb
        self.returned_mb = 0
        self.pressure = 0.0

    def memory_total_mb(self) -> int:
        return self.total_mb

    def memory_available_mb(self) -> int:
        return self.available_mb

    def spare_memory_mb(self, directory: Path) -> int:
        return self.available_mb - self.returned_mb

    def memory_pressure(self) -> float:
        return self.pressure

    def is_short_of_memory(self) -> bool:
        return self.pressure > 0


class Vms:
    """Admits VMs to a host of `total_mb`. `templates`: whether VMs are clones."""

    def __init__(self, total_mb: int, *, ratio: float = 4, templates: bool = True, max_vms: int | None = None) -> None:
        self.machine = Machine(total_mb)
        self.all: list[VmRow] = []
        self.pool = SimpleNamespace(tags=frozenset[str]())
        none = Path("/nonexistent")
        settings = VmSettings(
            state_dir=none, runtime_dir=none, cache_dir=none, memory_dir=none, disk_dir=none, template_dir=none,
            snapshot_dir=none, volume_dir=none,
            memory_overcommit=ratio, max_vms=max_vms,
        )  # fmt: skip
        host: Any = SimpleNamespace(machine=self.machine)
        projection: Any = SimpleNamespace(rows=lambda: self.all)
        store: Any = SimpleNamespace(has=lambda plugin, cpu_cores, memory_mb: templates)
        pool: Any = self.pool
        self.capacity = Capacity(host, projection, store, pool, settings)

    def admit(self, memory_mb: int, *, clone: bool = True) -> None:
        with self.capacity.reserve(memory_need(memory_mb, clone=clone)):
            pass

    def refusal(self, memory_mb: int, *, clone: bool = True) -> Problem:
        with pytest.raises(Problem) as caught:
            self.admit(memory_mb, clone=clone)
        assert (caught.value.status, caught.value.code) == (503, "no-capacity")
        return caught.value

    def start(self, memory_mb: int, *, taken_mb: int, **fields: Any) -> None:
        self.all.append(row(len(self.all) + 1, memory_mb, **UP, **fields))
        self.machine.available_mb -= taken_mb

    def fill(self, memory_mb: int, *, taken_mb: int, most: int) -> int:
        """Starts idle clones until one is refused; returns how many."""
        for count in range(most):
            try:
                self.admit(memory_mb)
            except Problem:
                return count
            self.start(memory_mb, taken_mb=taken_mb, template="digest")
        return most


def test_a_vm_with_volumes_counts_as_a_cold_boot() -> None:
    capacity = Vms(16384).capacity
    plain = CreateVm(name="a", cpu_cores=1, memory_mb=256)
    with_volume = msgspec.structs.replace(plain, volumes=("data:/d",))
    assert capacity.need_of_request(plain, BASE) == memory_need(256, clone=True)
    assert capacity.need_of_request(with_volume, BASE) == memory_need(256, clone=False)
    mounts = new_row(with_volume, BASE, vm_id=1, now=datetime(2026, 1, 1, tzinfo=UTC)).volumes
    assert capacity._need_of(row(1, 256, volumes=mounts)) == memory_need(256, clone=False)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
@pytest.mark.parametrize("memory_mb", [64, 128, 1024])
def test_no_more_is_promised_than_the_ratio_allows(ratio: float, memory_mb: int) -> None:
    vms = Vms(16384, ratio=ratio)
    count = vms.fill(memory_mb, taken_mb=IDLE_MB, most=2000)
    promised = promised_mb(vms.all)
    assert count >= (16384 - HOST_MB) // (memory_mb + OVERHEAD_MB)
    assert promised <= ratio * (16384 - HOST_MB)
    assert vms.machine.available_mb >= HOST_MB


def test_idle_clones_leave_room_for_more_and_busy_ones_do_not() -> None:
    idle, busy = Vms(16384), Vms(16384)
    in_full = 16384 // (128 + OVERHEAD_MB)
    assert idle.fill(128, taken_mb=IDLE_MB, most=2000) > 2 * in_full
    assert busy.fill(128, taken_mb=128 + OVERHEAD_MB, most=2000) <= in_full


def test_one_vm_may_always_take_all_that_it_was_promised() -> None:
    vms = Vms(HOST_MB + 4096 + OVERHEAD_MB)
    vms.start(4096, taken_mb=0, template="digest")
    its_growth = 4096 + OVERHEAD_MB - IDLE_MB
    vms.machine.available_mb = HOST_MB + its_growth + IDLE_MB
    vms.admit(64)
    vms.machine.available_mb -= 1
    vms.refusal(64)


def test_a_vm_that_boots_cold_needs_all_of_its_memory() -> None:
    vms = Vms(8192)
    vms.machine.available_mb = 2048
    vms.admit(1024, clone=False)
    vms.refusal(2048, clone=False)


def test_a_refusal_has_all_that_was_counted() -> None:
    vms = Vms(2048, templates=False)
    vms.start(256, taken_mb=0, template="digest")
    vms.all.append(row(2, 256))
    vms.machine.available_mb, vms.machine.returned_mb = 900, 100
    growth = 2 * (256 + OVERHEAD_MB - IDLE_MB) + OVERHEAD_MB - IDLE_MB
    start, reserve = 256 + IDLE_MB, 256 + OVERHEAD_MB - IDLE_MB
    left = 900 - 100 - HOST_MB - start - reserve
    assert vms.refusal(256).detail == (
        f"the VM takes {IDLE_MB} MiB when it starts, up to {256 + OVERHEAD_MB} later, and {max(0, left)} MiB can be "
        f"had: 900 of the host's 2048 MiB are available; of these 512 are kept for the host, {start} for VMs that "
        f"start, 100 for guests that gave memory back, and {reserve} in reserve for what VMs may take later, up to "
        f"{growth} with this one (memory_overcommit 4)"
    )


def test_once_means_that_every_promise_fits() -> None:
    vms = Vms(1000, ratio=1)
    vms.machine.available_mb = 900
    vms.admit(128)
    vms.start(128, taken_mb=0, template="digest")
    assert vms.refusal(128).detail == (
        "the VM needs 320 MiB, and 168 of the host's 1000 MiB are not promised yet: 320 MiB are promised to VMs that "
        "are up or about to be, and 512 MiB are kept for the host (900 MiB are available now, as VMs do not use all "
        "that is promised to them)"
    )
    vms.all.clear()
    vms.machine.available_mb = 300
    assert " 300 of the host's 1000 MiB can be had now" in vms.refusal(128).detail


@pytest.mark.parametrize("seed", range(200))
def test_the_free_memory_is_the_most_that_is_admitted(seed: int) -> None:
    """Other hosts of a fleet choose by it: a host that says too much is asked in vain, or gets all VMs of a burst."""
    chance = random.Random(seed)
    vms = Vms(chance.choice([1024, 16384]), ratio=chance.choice([1, 1.5, 2, 4]))
    for number in range(chance.randrange(40)):
        state: Any = UP if chance.random() < 0.5 else {}
        vms.all.append(row(number + 1, chance.choice([64, 128, 1024]), template="digest", **state))
    vms.machine.available_mb = chance.randrange(vms.machine.total_mb)
    vms.machine.returned_mb = chance.randrange(200)
    vms.pool.tags = frozenset(map(str, range(chance.randrange(3))))
    free_mb = vms.capacity.free_memory_mb()
    vms.refusal(free_mb + 1)
    if free_mb:
        vms.admit(free_mb)


def test_vms_that_start_have_their_share_of_the_free_memory() -> None:
    vms = Vms(16384, templates=False)
    before_mb = vms.capacity.free_memory_mb()
    vms.all += [row(number, 1024) for number in range(1, 9)]
    assert vms.capacity.free_memory_mb() < before_mb - 8 * 1024


def test_memory_of_the_warm_pool_can_be_had() -> None:
    vms = Vms(1000, ratio=1)
    vms.machine.available_mb = 320 - IDLE_MB
    vms.refusal(128)
    vms.pool.tags = frozenset({"volant-test-s.1"})
    vms.admit(128)


def test_no_vm_is_admitted_while_programs_wait_for_memory() -> None:
    vms = Vms(16384)
    vms.machine.pressure, vms.machine.available_mb = 0.23, 4000
    problem = vms.refusal(64)
    assert problem.retry_after_s == 10
    assert "waited for it for 23% of the last ten seconds, and 4000 of 16384 MiB are available" in problem.detail


def test_a_vm_counts_as_what_it_will_boot_from() -> None:
    vms, cold = Vms(16384), Vms(16384, templates=False)

    def to_start(where: Vms, one: VmRow) -> int:
        return where.capacity._need_of(one).at_start

    assert (to_start(vms, row(1, 128)), to_start(cold, row(1, 128))) == (IDLE_MB, IDLE_MB + 128)
    assert to_start(vms, row(1, 128, boot="cold")) == IDLE_MB + 128
    assert to_start(cold, row(1, 128, boot="template")) == IDLE_MB
    assert to_start(vms, row(1, 128, **UP)) == IDLE_MB + 128, "it runs, and booted cold"
    assert to_start(vms, row(1, 128, layer="a-1", boots=1)) == IDLE_MB + 128, "its disk does not fit a template"
    assert to_start(cold, row(1, 128, checkpoint="fork-a")) == IDLE_MB


def test_no_more_vms_are_admitted_than_the_operator_allows() -> None:
    vms = Vms(8192, max_vms=1)
    vms.admit(64)
    vms.start(64, taken_mb=8)
    assert "VOLANT_MAX_VMS allows 1" in vms.refusal(64).detail
