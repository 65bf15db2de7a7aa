"""Measures what idle VMs cost: the processes of real ones, and a daemon with a thousand.

The thousand come from `_fleet.py`. The real VMs booted cold or are clones, and idle during the same minute.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import trio

from tests.system.kit import Daemon
from volant.host._procfs import wakeups

from ._adoption import reach_all, start
from ._boot import cpu_s
from ._clones import cpu_ns, create
from ._figure import Figure
from ._fleet import idle_daemon
from ._template import first_template
from ._world import Skipped, current_image, volantd

IDLE = 1000
IDLE_PERCENT = 1.0
VM_PERCENT = 0.1
_EACH = 2
"""Real VMs of each origin."""
_SETTLE_S = 45.0
"""Seconds until the daemon is idle: cancelled deadlines of its start stay in Trio's heap until they pass."""
_IDLE_S = 60.0
"""A minute, so that work done once a minute counts, too."""


async def idle() -> list[Figure]:
    """Processor time and wake-ups of idle VMs; processor time of a daemon with a thousand, and its memory for each."""
    with ExitStack() as stack:
        pids: Mapping[str, Sequence[int]] = {}
        try:
            current_image()
            pids = await _real_vms(stack.enter_context(volantd("--templates", "auto")))
        except Skipped as why:
            print(f"idle_cold and idle_clone skipped: {why}", flush=True)
        async with idle_daemon(0) as without, idle_daemon(IDLE) as daemon:
            for one in (without, daemon):
                await start(one)
            await trio.to_thread.run_sync(reach_all, daemon, IDLE)
            await trio.sleep(_SETTLE_S)
            began = time.monotonic()
            before = [cpu_s(one.pid) for one in (daemon, without)]
            vms_before = {pid: (cpu_ns(pid), wakeups(pid)) for each in pids.values() for pid in each}
            await trio.sleep(_IDLE_S)
            took_s = time.monotonic() - began
            used, alone = (
                100 * (cpu_s(one.pid) - then) / took_s for one, then in zip((daemon, without), before, strict=True)
            )
            figures = [_of_vms(name, each, vms_before, took_s) for name, each in pids.items()]
            memory_kb = 1024 * (daemon.rss_mb() - without.rss_mb()) / IDLE
    return [
        *figures,
        Figure(
            f"idle_{IDLE}", used, "% of a processor", to=f"over {_IDLE_S:g} s; a daemon without VMs: {alone:.2g} %",
            within=IDLE_PERCENT,
        ),
        Figure(f"idle_{IDLE}_memory", memory_kb, "KiB a VM", to="resident, more than a daemon without VMs"),
    ]  # fmt: skip


async def _real_vms(daemon: Daemon) -> dict[str, list[int]]:
    """Creates VMs; returns the processes of each kind."""
    await first_template(daemon)
    found: dict[str, list[int]] = {}
    async with daemon.http() as http:
        for kind in ("cold", "template"):
            vms = [await create(http, f"{kind}{number}", kind) for number in range(_EACH)]
            found[kind] = [vm["pid"] for vm in vms]
    return found


def _of_vms(kind: str, pids: Sequence[int], before: Mapping[int, tuple[int, int]], took_s: float) -> Figure:
    used = sum(cpu_ns(pid) - before[pid][0] for pid in pids) / 1e9 / took_s / len(pids)
    woken = sum(wakeups(pid) - before[pid][1] for pid in pids) / took_s / len(pids)
    name = "clone" if kind == "template" else kind
    return Figure(
        f"idle_{name}", 100 * used, "% of a processor a VM", within=VM_PERCENT,
        to=f"{woken:.3g} wake-ups a second each, {len(pids)} VMs, over {took_s:.0f} s",
    )  # fmt: skip
