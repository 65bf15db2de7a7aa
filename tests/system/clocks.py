"""Compares a guest's clocks with the host's, and measures its timers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from tests.system.clones import Lines
from volant.client import Client, ExecSession

_ASK_S = 60.0
_TRIES = 10
_SCRIPT = """
import sys, time
for line in sys.stdin:
    what, _, seconds = line.partition(" ")
    began = time.monotonic_ns()
    if what == "sleep":
        time.sleep(float(seconds))
    print(began, time.monotonic_ns(), time.time_ns(), flush=True)
"""


@dataclass(frozen=True)
class Reading:
    """Seconds that a guest's clocks show, at a time of the host."""

    host_wall: float
    host_monotonic: float
    wall: float
    monotonic: float
    error_s: float
    """Half of the round trip: by that the host's times may be earlier or later."""

    @property
    def wall_ahead_s(self) -> float:
        """Returns by how much the guest's wall clock is ahead of the host's."""
        return self.wall - self.host_wall

    @property
    def monotonic_ahead_s(self) -> float:
        """Returns likewise for the monotonic clocks, which began at different times."""
        return self.monotonic - self.host_monotonic


class GuestClocks:
    """A program in a guest that reads its clocks."""

    def __init__(self, session: ExecSession) -> None:
        self._session = session
        self._lines = Lines(session)

    async def read(self, tries: int = _TRIES) -> Reading:
        """Reads the clocks; of some round trips the shortest counts."""
        found = [await self._read() for _ in range(tries)]
        return min(found, key=lambda reading: reading.error_s)

    async def sleep(self, seconds: float) -> float:
        """Sleeps in the guest; returns the seconds that its monotonic clock went on."""
        with trio.fail_after(_ASK_S + seconds):
            began, ended, _ = await self._ask(f"sleep {seconds}")
        return ended - began

    async def _read(self) -> Reading:
        with trio.fail_after(_ASK_S):
            wall, monotonic = time.time(), time.monotonic()
            _, guest_monotonic, guest_wall = await self._ask("read")
            error_s = (time.monotonic() - monotonic) / 2
        return Reading(wall + error_s, monotonic + error_s, guest_wall, guest_monotonic, error_s)

    async def _ask(self, what: str) -> list[float]:
        await self._session.send(what.encode() + b"\n")
        return [int(word) / 1e9 for word in (await self._lines.next()).split()]


@asynccontextmanager
async def guest_clocks(client: Client, name: str) -> AsyncIterator[GuestClocks]:
    """Runs a program in a guest that reads its clocks."""
    async with client.vms.exec_session(name, ["python3.13", "-c", _SCRIPT]) as session:
        yield GuestClocks(session)
