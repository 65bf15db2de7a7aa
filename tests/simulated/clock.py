"""The clock, random numbers and worker threads of the simulated host."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

import apsw
import trio

from actors import fault
from actors.testing import allow_real
from volant.host import Clock, Random, Threads

from .calls import Calls
from .machine import Machine

T = TypeVar("T")


class SimClock(Clock):
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def now(self) -> datetime:
        return self._machine.wall_clock()

    def boottime(self) -> float:
        return self.monotonic()

    def monotonic(self) -> float:
        return trio.current_time()


class SimRandom(Random):
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def new_id(self) -> str:
        return self._machine.new_id()

    def token_bytes(self, size: int) -> bytes:
        return self._machine.rng.randbytes(size)


class SimThreads(Threads):
    """Runs calls inline."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def run(self, call: Callable[..., T], *args: object) -> T:
        def run() -> T:
            writes = getattr(call, "__qualname__", "") == "Database.write"
            if writes and (self._calls.machine.disk_full or fault("database.fails")):
                raise apsw.FullError("database or disk is full")
            with allow_real("files"):
                return call(*args)

        return await self._calls.run(run)
