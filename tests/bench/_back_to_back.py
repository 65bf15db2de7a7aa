"""Measures VMs that are created one after the other, each once the one before has run a command and is deleted.

The warm pool must not slow them down: while it fills, it competes with them. Two daemons take turns, one with the pool
and one without. The first VMs of each round claim what the pool has by then.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

import httpx

from tests.system.kit import Daemon

from ._boot import BOOT_S, WANTED
from ._clones import until_pool_is_quiet
from ._figure import Figure, Pairs, percentile
from ._first_exec import execute
from ._template import first_template
from ._world import current_image, volantd

TARGET = 1.0
_COUNT = 12
_STANDBY = ("auto", "0")


async def back_to_back(rounds: int = 4) -> list[Figure]:
    """A series of creates with the warm pool, and one without, in turns."""
    current_image()
    series = Pairs()
    took: dict[str, list[float]] = {standby: [] for standby in _STANDBY}
    with ExitStack() as stack:
        daemons = {
            standby: stack.enter_context(volantd("--templates", "auto", "--standby", standby)) for standby in _STANDBY
        }
        for daemon in daemons.values():
            await first_template(daemon)
        for _ in range(rounds):
            for standby, daemon in daemons.items():
                await until_pool_is_quiet(daemons["auto"])
                took[standby] += await _series(daemon)
            series.add(*(sum(took[standby][-_COUNT:]) / _COUNT for standby in _STANDBY))
    with_s, without_s = (took[standby] for standby in _STANDBY)
    return [
        Figure(
            "back_to_back", 1000 * series.value, "ms", series.ratio,
            f"{1000 * series.other:.3g} ms without a warm pool, mean of {_COUNT} in a row, {rounds} rounds; medians "
            f"{1000 * median(with_s):.3g} and {1000 * median(without_s):.3g} ms, p95 "
            f"{1000 * percentile(with_s, 95):.3g} and {1000 * percentile(without_s, 95):.3g} ms",
            at_most=TARGET,
        )
    ]  # fmt: skip


async def _series(daemon: Daemon) -> list[float]:
    """Returns for each VM the seconds from its POST to the answer of a first command."""
    async with daemon.http() as http:
        return [await _first_exec(http, f"row{number}") for number in range(_COUNT)]


async def _first_exec(http: httpx.AsyncClient, name: str) -> float:
    body = {"name": name, "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb, "boot": "template"}
    began = time.perf_counter()
    made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=BOOT_S)
    if made.headers.get("volant-wait") != "met":
        raise RuntimeError(f"the VM did not come to run: {made.text}")
    await execute(http, name)
    took = time.perf_counter() - began
    (await http.delete(f"/api/v1/vms/{name}", timeout=BOOT_S)).raise_for_status()
    return took
