"""Measures how far the clocks of idle guests drift from the host's, and how late their timers are.

A guest measures the rate of its time stamp counter while it boots. So each cold VM has an error of its own, and a clone
has that of its template. The daemon sets a clock at the start and after a pause, and not in between.
"""

from __future__ import annotations

from statistics import median

import trio

from tests.system.clocks import Reading, guest_clocks
from tests.system.kit import Daemon

from ._clones import create
from ._figure import Figure
from ._template import first_template
from ._world import current_image, volantd

DRIFT_PPM = 50.0
"""4 s a day."""
LATE_MS = 20.0
_VMS = {"cold0": "cold", "cold1": "cold", "clone": "template"}
_TRIES = 20
_CALM_S = 20.0
"""Until the daemon has corrected the clocks, and the guests have finished deferred work."""
_SLEEPS, _SLEEP_S = 10, 0.5


async def clock_drift(idle_s: float = 60.0) -> list[Figure]:
    """Compares the clocks of idle guests with the host's, before and after `idle_s`."""
    current_image()
    with volantd("--templates", "auto") as daemon:
        await first_template(daemon)
        async with daemon.http() as http:
            for name, boot in _VMS.items():
                await create(http, name, boot)
        await trio.sleep(_CALM_S)
        first = {name: await _read(daemon, name) for name in _VMS}
        await trio.sleep(idle_s)
        last = {name: await _read(daemon, name) for name in _VMS}
        late_ms = [1000 * late for name in _VMS for late in await _late_s(daemon, name)]
    return [
        *(_drift(name, first[name], last[name]) for name in _VMS),
        Figure(
            "clock_drift_timers", median(late_ms), "ms", within=LATE_MS,
            to=f"lateness of {len(late_ms)} sleeps of {_SLEEP_S:g} s in these guests, at most {max(late_ms):.3g}",
        ),
    ]  # fmt: skip


def _drift(name: str, first: Reading, last: Reading) -> Figure:
    took_s = last.host_monotonic - first.host_monotonic
    wall_s = last.wall_ahead_s - first.wall_ahead_s
    monotonic_s = last.monotonic_ahead_s - first.monotonic_ahead_s
    return Figure(
        f"clock_drift_{name}", 1e6 * abs(wall_s) / took_s, "ppm", within=DRIFT_PPM,
        to=f"ahead of the host by {1000 * first.wall_ahead_s:.3g} ms and {took_s:.0f} s later by "
        f"{1000 * last.wall_ahead_s:.3g} ms, ±{1000 * (first.error_s + last.error_s):.2g} ms; the monotonic clock: "
        f"{1e6 * monotonic_s / took_s:+.3g} ppm",
    )  # fmt: skip


async def _read(daemon: Daemon, name: str) -> Reading:
    async with daemon.client() as client, guest_clocks(client, name) as clocks:
        return await clocks.read(_TRIES)


async def _late_s(daemon: Daemon, name: str) -> list[float]:
    async with daemon.client() as client, guest_clocks(client, name) as clocks:
        return [await clocks.sleep(_SLEEP_S) - _SLEEP_S for _ in range(_SLEEPS)]
