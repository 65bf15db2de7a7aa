"""Figures of a VM: whatever the guest answers, it delays those of the host for a moment at most."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock

from volant.channel import AgentAnswer, AgentClient, AgentProtocolError, AgentUnreachable
from volant.host import Host, MemoryUsage, ProcessGone, ProcessUsage
from volant.host._process_memory import LinuxProcessMemory
from volant.model import (
    BASE,
    CreateVm,
    GuestMemory,
    HostMemory,
    Lease,
    Problem,
    ProcessIdentity,
    VmRow,
    VmStats,
    new_row,
)
from volant.vm._memory import GUEST_S, HOST_S, measure, measure_stats

PROCESS = ProcessIdentity(pid=7, start_time=1, boot_id="boot", tag="volant-test-7.1")
ROW = msgspec.structs.replace(
    new_row(CreateVm(name="demo", cpu_cores=1, memory_mb=256), BASE, vm_id=7, now=datetime(2026, 1, 1, tzinfo=UTC)),
    process=PROCESS,
)
TAKEN = MemoryUsage(rss_kb=307200, pss_kb=102400, private_kb=51200, shared_kb=256000)
SHOWN = HostMemory(300.0, 100.0, 50.0, 250.0)

LEASE = Lease(address="10.0.0.2", prefix=16, gateway="10.0.0.1", mac="02:00:00:00:00:01", tap="vt-one")


class Kernel(Host, LinuxProcessMemory):
    """Answers for a process what the test sets."""

    def __init__(self, says: MemoryUsage | Exception = TAKEN) -> None:
        super().__init__()
        self.process_memory = self
        self.says = says

    async def usage(self, identity: ProcessIdentity, timeout_s: float) -> MemoryUsage:
        assert (identity, timeout_s) == (PROCESS, HOST_S)
        await trio.lowlevel.checkpoint()
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Agent:
    """Answers `/v1/info`, or never."""

    def __init__(self, says: object) -> None:
        self.says = says

    async def request_json(self, method: str, path: str, *, timeout_s: float) -> AgentAnswer:
        assert (method, path) == ("GET", "/v1/info")
        if self.says is None:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if isinstance(self.says, Exception):
            raise self.says
        return AgentAnswer(200, self.says)


def agent(says: object) -> AgentClient:
    return cast(AgentClient, Agent(says))


async def refused(row: VmRow, host: Host) -> Problem:
    with pytest.raises(Problem) as caught:
        await measure(host, row, agent({"memory": {"total_mb": 200, "available_mb": 100}}))
    return caught.value


async def test_guest_and_host_both_report_memory(autojump_clock: MockClock) -> None:
    found = await measure(Kernel(), ROW, agent({"memory": {"total_mb": 213, "available_mb": 147}, "more": 1}))
    assert (found.memory_mb, found.guest, found.host) == (256, GuestMemory(213, 147), SHOWN)
    assert (await measure(Kernel(), ROW, None)).guest is None


async def test_a_guest_that_hangs_delays_the_hosts_figures_for_a_moment_only(autojump_clock: MockClock) -> None:
    began = trio.current_time()
    found = await measure(Kernel(), ROW, agent(None))
    assert (found.guest, found.host) == (None, SHOWN)
    assert trio.current_time() - began == pytest.approx(GUEST_S)


@pytest.mark.parametrize(
    "says",
    [
        AgentUnreachable("its channel is closed"),
        AgentProtocolError("it is no JSON"),
        [],
        {},
        {"memory": None},
        {"memory": {"total_mb": 213}},
        {"memory": {"total_mb": 0, "available_mb": 0}},
        {"memory": {"total_mb": "213", "available_mb": 147}},
        {"memory": {"total_mb": True, "available_mb": True}},
        {"memory": {"total_mb": -1, "available_mb": 147}},
        {"memory": {"total_mb": 10**30, "available_mb": 147}},
        {"memory": {"total_mb": 213, "available_mb": 1.5}},
        {"memory": {"total_mb": 213, "available_mb": 214}},
    ],
)
async def test_a_guests_nonsense_is_ignored(says: Any, autojump_clock: MockClock) -> None:
    found = await measure(Kernel(), ROW, agent(says))
    assert (found.guest, found.host) == (None, SHOWN)


async def test_a_vm_without_a_process_takes_no_memory(autojump_clock: MockClock) -> None:
    for row, kernel in (
        (msgspec.structs.replace(ROW, process=None), Kernel()),
        (ROW, Kernel(ProcessGone("it has ended"))),
    ):
        problem = await refused(row, kernel)
        assert (problem.status, problem.code) == (409, "vm-not-running")


@pytest.mark.parametrize("why", [PermissionError(13, "Permission denied"), trio.TooSlowError()])
async def test_a_kernel_that_does_not_tell_is_reported(why: Exception, autojump_clock: MockClock) -> None:
    problem = await refused(ROW, Kernel(why))
    assert (problem.status, problem.code, problem.vm) == (503, "memory-unknown", "demo")


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
