"""Measures the use of the host by VMs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentUnreachable
from volant.host import Host, ProcessGone
from volant.model import GuestMemory, HostMemory, Problem, ProcessIdentity, VmMemory, VmRow, VmStats
from volant.model.agent import INFO


async def measure_stats(host: Host, rows: Iterable[VmRow]) -> list[VmStats]:
    """Returns the figures of VMs; those without a process are left out."""
    interfaces = host.machine.interface_bytes()
    found = []
    for row in rows:
        if row.process is None:
            continue
        # Reading takes a tenth of a millisecond for each VM, and there may be hundreds.
        await trio.lowlevel.checkpoint()
        try:
            used = host.proc.usage(row.process)
        except ProcessGone:
            continue
        # The tap receives the data that the guest sends.
        sent, received = interfaces.get(row.lease.tap, (None, None)) if row.lease is not None else (None, None)
        found.append(
            VmStats(
                name=row.name,
                cpu_cores=row.cpu_cores,
                memory_mb=row.memory_mb,
                clock_s=round(host.clock.monotonic(), 3),
                cpu_s=round(used.cpu_s, 2),
                rss_mb=round(used.rss_kb / 1024, 1),
                disk_read_bytes=used.read_bytes,
                disk_written_bytes=used.written_bytes,
                received_bytes=received,
                sent_bytes=sent,
            )
        )
    return found


HOST_S = 5.0
GUEST_S = 2.0
"""Deadlines. The host's figures do not wait for a guest that is too busy to answer."""
_MAX_MB = 2**32


async def measure(host: Host, row: VmRow, agent: AgentClient | None) -> VmMemory:
    """Returns the memory of a VM. Without `agent`, the guest's own figures are left out.

    :raises Problem: 409, it has no process; 503, the kernel reports no figures.
    """
    if row.process is None:
        raise _no_process(row)
    found: list[GuestMemory | None] = []

    async def ask() -> None:
        found.append(None if agent is None else await _guest(agent))

    problem: Problem | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        try:
            taken = await _host(host, row, row.process)
        except Problem as error:
            problem = error
            nursery.cancel_scope.cancel()
    if problem is not None:
        raise problem
    return VmMemory(row.memory_mb, found[0], taken)


async def _host(host: Host, row: VmRow, identity: ProcessIdentity) -> HostMemory:
    try:
        taken = await host.process_memory.usage(identity, HOST_S)
    except ProcessGone:
        raise _no_process(row) from None
    except (OSError, trio.TooSlowError) as error:
        why = str(error) or f"it did not answer within {HOST_S:g} s"
        raise Problem(
            503, "memory-unknown", f"the kernel does not say what VM {row.name!r} takes of memory: {why}", vm=row.name
        ) from error
    return HostMemory(_mb(taken.rss_kb), _mb(taken.pss_kb), _mb(taken.private_kb), _mb(taken.shared_kb))


async def _guest(agent: AgentClient) -> GuestMemory | None:
    try:
        with trio.fail_after(GUEST_S):
            answer = await agent.request_json("GET", INFO, timeout_s=GUEST_S)
    except (AgentUnreachable, AgentProtocolError, trio.TooSlowError):
        return None
    said = answer.body.get("memory") if answer.status == 200 and isinstance(answer.body, dict) else None
    if not isinstance(said, dict):
        return None
    total, available = _figure(said, "total_mb"), _figure(said, "available_mb")
    # An agent that does not know sends zeros.
    return GuestMemory(total, available) if total and available is not None and available <= total else None


def _figure(said: dict[str, Any], name: str) -> int | None:
    value = said.get(name)
    return value if type(value) is int and 0 <= value < _MAX_MB else None


def _mb(kb: int) -> float:
    return round(kb / 1024, 1)


def _no_process(row: VmRow) -> Problem:
    return Problem(
        409, "vm-not-running", f"VM {row.name!r} is {row.status.value}, and takes no memory", vm=row.name,
        hint=f"`volar vms start {row.name}` starts it",
    )  # fmt: skip
