"""Measures a daemon with many VMs: their adoption at its start, and its cost while they are idle.

The VMs come from `_fleet.py`: real processes, rows and sockets, with an unmodified daemon on the real host.
"""

from __future__ import annotations

import time

import trio

from tests.system.kit import Daemon

from ._boot import cpu_s
from ._figure import Figure, Pairs
from ._fleet import idle_daemon
from ._http import get_once

ADOPTED = 50
IDLE = 1000
ROUNDS = 5
ADOPTION_S = 1.0
IDLE_PERCENT = 1.0

_START_S = 120.0
_POLL_S = 0.002
_SETTLE_S = 45.0
"""Seconds until the daemon is idle: cancelled deadlines of its start stay in Trio's heap until they pass."""
_IDLE_S = 60.0
"""A minute, so that work done once a minute counts, too."""


async def adoption() -> list[Figure]:
    """Time from `exec` of `volantd` after `kill -9` to `/healthz` 200, and to the last agent's answer, with 50 VMs."""
    started, reached = Pairs(), Pairs()
    async with idle_daemon(0) as without, idle_daemon(ADOPTED) as daemon:
        for _ in range(ROUNDS):
            alone = await _start(without)
            began = time.perf_counter()
            took = await _start(daemon)
            await trio.to_thread.run_sync(_reach_all, daemon, ADOPTED)
            started.add(took, alone)
            reached.add(time.perf_counter() - began, alone)
            daemon.kill()
            without.kill()
    to = f"the {started.other:.3g} s of a daemon without VMs"
    return [
        Figure(f"adoption_{ADOPTED}", started.value, "s", started.ratio, to, within=ADOPTION_S),
        Figure(f"adoption_{ADOPTED}_agents", reached.value, "s", reached.ratio, f"{to}; until all agents answered"),
    ]


async def idle() -> list[Figure]:
    """Processor time of a daemon with a thousand idle VMs, and its memory for each."""
    async with idle_daemon(0) as without, idle_daemon(IDLE) as daemon:
        for one in (without, daemon):
            await _start(one)
        await trio.to_thread.run_sync(_reach_all, daemon, IDLE)
        await trio.sleep(_SETTLE_S)
        before = [cpu_s(one.pid) for one in (daemon, without)]
        await trio.sleep(_IDLE_S)
        used, alone = (
            100 * (cpu_s(one.pid) - then) / _IDLE_S for one, then in zip((daemon, without), before, strict=True)
        )
        memory_kb = 1024 * (daemon.rss_mb() - without.rss_mb()) / IDLE
    return [
        Figure(
            f"idle_{IDLE}", used, "% of a processor", to=f"over {_IDLE_S:g} s; a daemon without VMs: {alone:.2g} %",
            within=IDLE_PERCENT,
        ),
        Figure(f"idle_{IDLE}_memory", memory_kb, "KiB a VM", to="resident, more than a daemon without VMs"),
    ]  # fmt: skip


async def _start(daemon: Daemon) -> float:
    """Returns the seconds until it is healthy."""

    def start() -> float:
        began = time.perf_counter()
        daemon.start()
        while get_once(daemon.base_url, "/healthz") != 200:
            if time.perf_counter() - began > _START_S:
                raise RuntimeError(f"the daemon is not well after {_START_S:g} s: {daemon.log()}")
            time.sleep(_POLL_S)
        return time.perf_counter() - began

    return await trio.to_thread.run_sync(start)


def _reach_all(daemon: Daemon, count: int) -> None:
    """Waits until the agent of each VM has answered through the daemon."""
    until = time.perf_counter() + _START_S
    for number in range(count):
        while get_once(daemon.base_url, f"/api/v1/vms/vm{number}/agent/healthz") != 200:
            if time.perf_counter() > until:
                raise RuntimeError(f"the agent of vm{number} can't be reached: {daemon.log()}")
            time.sleep(_POLL_S)
