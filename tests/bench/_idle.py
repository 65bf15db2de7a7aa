"""Measures what idle VMs cost: the processes of real ones, and a daemon with a thousand.

The thousand come from `_fleet.py`. What is measured is processor time, so both are measured at once.
"""

from __future__ import annotations

import time

import trio

from ._adoption import reach_all, start
from ._boot import cpu_s
from ._figure import Figure
from ._fleet import idle_daemon
from ._idle_vms import idle_vms
from ._world import Skipped

IDLE = 1000
IDLE_PERCENT = 1.0
_SETTLE_S = 45.0
"""Seconds until the daemon is idle: cancelled deadlines of its start stay in Trio's heap until they pass."""
_IDLE_S = 60.0


async def idle() -> list[Figure]:
    """Processor time and wake-ups of idle VMs; processor time of a daemon with a thousand, and its memory for each."""
    figures: list[Figure] = []

    async def of_vms() -> None:
        try:
            figures.extend(await idle_vms())
        except Skipped as why:
            print(f"idle_vm skipped: {why}", flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(of_vms)
        of_daemon = await _idle_daemon()
    return figures + of_daemon


async def _idle_daemon() -> list[Figure]:
    async with idle_daemon(0) as without, idle_daemon(IDLE) as daemon:
        for one in (without, daemon):
            await start(one)
        await trio.to_thread.run_sync(reach_all, daemon, IDLE)
        await trio.sleep(_SETTLE_S)
        began = time.monotonic()
        before = [cpu_s(one.pid) for one in (daemon, without)]
        await trio.sleep(_IDLE_S)
        took_s = time.monotonic() - began
        used, alone = (
            100 * (cpu_s(one.pid) - then) / took_s for one, then in zip((daemon, without), before, strict=True)
        )
        memory_kb = 1024 * (daemon.rss_mb() - without.rss_mb()) / IDLE
    return [
        Figure(
            f"idle_{IDLE}", used, "% of a processor", to=f"over {_IDLE_S:g} s; a daemon without VMs: {alone:.2g} %",
            within=IDLE_PERCENT,
        ),
        Figure(f"idle_{IDLE}_memory", memory_kb, "KiB a VM", to="resident, more than a daemon without VMs"),
    ]  # fmt: skip
