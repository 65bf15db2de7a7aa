"""Measures the start of a daemon that adopts many VMs.

The VMs come from `_fleet.py`: real processes, rows and sockets, with an unmodified daemon on the real host.
"""

from __future__ import annotations

import time

import trio

from tests.system.kit import Daemon

from ._figure import Figure, Pairs
from ._fleet import idle_daemon
from ._http import get_once

ADOPTED = 50
ROUNDS = 5
ADOPTION_S = 1.0

_START_S = 120.0
_POLL_S = 0.002


async def adoption() -> list[Figure]:
    """Time from `exec` of `volantd` after `kill -9` to `/healthz` 200, and to the last agent's answer, with 50 VMs."""
    started, reached = Pairs(), Pairs()
    async with idle_daemon(0) as without, idle_daemon(ADOPTED) as daemon:
        for _ in range(ROUNDS):
            alone = await start(without)
            began = time.perf_counter()
            took = await start(daemon)
            await trio.to_thread.run_sync(reach_all, daemon, ADOPTED)
            started.add(took, alone)
            reached.add(time.perf_counter() - began, alone)
            daemon.kill()
            without.kill()
    to = f"the {started.other:.3g} s of a daemon without VMs"
    return [
        Figure(f"adoption_{ADOPTED}", started.value, "s", started.ratio, to, within=ADOPTION_S),
        Figure(f"adoption_{ADOPTED}_agents", reached.value, "s", reached.ratio, f"{to}; until all agents answered"),
    ]


async def start(daemon: Daemon) -> float:
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


def reach_all(daemon: Daemon, count: int) -> None:
    """Waits until the agent of each VM has answered through the daemon."""
    until = time.perf_counter() + _START_S
    for number in range(count):
        while get_once(daemon.base_url, f"/api/v1/vms/vm{number}/agent/healthz") != 200:
            if time.perf_counter() > until:
                raise RuntimeError(f"the agent of vm{number} can't be reached: {daemon.log()}")
            time.sleep(_POLL_S)
