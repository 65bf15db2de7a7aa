"""Memory figures of a VM: whatever the guest answers, it delays the host's figures for a moment at most."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock

from volant.channel import AgentAnswer, AgentClient, AgentProtocolError, AgentUnreachable
from volant.host import Host, MemoryUsage, ProcessGone
from volant.host._process_memory import LinuxProcessMemory
from volant.model import BASE, CreateVm, GuestMemory, HostMemory, Problem, ProcessIdentity, VmRow, new_row
from volant.vm._memory import GUEST_S, HOST_S, measure

PROCESS = ProcessIdentity(pid=7, start_time=1, boot_id="boot", tag="volant-test-7.1")
ROW = msgspec.structs.replace(
    new_row(CreateVm(name="demo", cpu_cores=1, memory_mb=256), BASE, vm_id=7, now=datetime(2026, 1, 1, tzinfo=UTC)),
    process=PROCESS,
)
TAKEN = MemoryUsage(rss_kb=307200, pss_kb=102400, private_kb=51200, shared_kb=256000)
SHOWN = HostMemory(300.0, 100.0, 50.0, 250.0)


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
