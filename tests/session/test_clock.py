"""The clock of a guest is set as well as the ways to it allow, and never worse than it was."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
import trio

from volant.host import Host
from volant.host._host import LinuxClock
from volant.session._clock import GuestClock
from volant.session._connection import AgentConnection

EXACT_S = 0.026


class VirtualClock(LinuxClock):
    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=trio.current_time())


class Guest:
    """A guest to which each way takes as long as the test says, there and back."""

    def __init__(self, ways: Iterable[tuple[float, float]], ahead_s: float = 0.0) -> None:
        self.ahead_s = ahead_s
        self.worst_s = 0.0
        """By so much the clock was off at most, after the first request."""
        self._ways: Iterator[tuple[float, float]] = iter(ways)
        self._host = Host()
        self._host.clock = VirtualClock()
        self.clock = GuestClock(self._host, cast("AgentConnection", self))

    def now_ns(self) -> int:
        return self.clock.now_ns() + int(self.ahead_s * 1e9)

    async def put(self, path: str, body: dict[str, int]) -> dict[str, Any]:
        """As of `AgentConnection`: the requests of `GuestClock`."""
        del path
        there_s, back_s = next(self._ways)
        await trio.sleep(there_s)
        to_ns = body["time_ns"] if "time_ns" in body else self.now_ns() + body["step_ns"]
        self.ahead_s = (to_ns - self.clock.now_ns()) / 1e9
        self.worst_s = max(self.worst_s, abs(self.ahead_s))
        shown = {"time_ns": self.now_ns()}
        await trio.sleep(back_s)
        return shown

    @asynccontextmanager
    async def limited(self, limiter: trio.CapacityLimiter) -> AsyncIterator[None]:
        async with limiter:
            yield

    async def repair(self) -> bool:
        return await self.clock.repair(trio.CapacityLimiter(1))


async def test_a_clone_on_a_busy_host_is_exact_once_a_way_is_short(autojump_clock: object) -> None:
    del autojump_clock
    guest = Guest([(11.7, 0.1), (0.2, 5.0), (0.0, 0.2), (0.01, 0.01), (0.01, 0.01)])
    await guest.clock.check(guest.now_ns() - 10**9)
    assert guest.ahead_s != 0
    await guest.repair()
    assert abs(guest.ahead_s) <= EXACT_S


async def test_a_long_way_moves_no_clock_that_is_known_better(autojump_clock: object) -> None:
    del autojump_clock
    short, long = (0.03, 0.03), (14.0, 0.0)
    guest = Guest([short, short, short, *[long] * 5, (0.001, 0.001)])
    await guest.clock.check(guest.now_ns() - 10**9)
    assert abs(guest.ahead_s) <= 0.03
    guest.worst_s = 0.0
    await guest.repair()
    assert guest.worst_s <= 0.03


async def test_a_clock_that_was_set_in_the_guest_is_set_again(autojump_clock: object) -> None:
    del autojump_clock
    guest = Guest([(0.03, 0.03)] * 3 + [(0.05, 0.05), (0.001, 0.001)])
    await guest.clock.check(guest.now_ns() - 10**9)
    guest.ahead_s = 3600.0
    await guest.repair()
    assert abs(guest.ahead_s) <= EXACT_S


async def test_a_clock_that_can_not_be_set_exactly_is_reported(autojump_clock: object) -> None:
    del autojump_clock
    guest = Guest([(0.05, 0.05)] * 100)
    guest.clock.doubt()
    assert not await guest.repair()
    guest = Guest([(0.001, 0.001)] * 2)
    guest.clock.doubt()
    assert await guest.repair()


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_the_ways_a_clock_is_off_by_half_of_the_shortest_at_most(
    seed: int, autojump_clock: object
) -> None:
    del autojump_clock
    rng = random.Random(seed)
    ways = [(rng.uniform(0, 2) ** 4, rng.uniform(0, 2) ** 4) for _ in range(100)]
    used: list[float] = []

    def recorded() -> Iterator[tuple[float, float]]:
        for way in ways:
            used.append(sum(way))
            yield way

    guest = Guest(recorded(), ahead_s=rng.uniform(-1000, 1000))
    guest.clock.doubt()
    await guest.repair()
    # The last request may be the step that the one before has asked for.
    shortest_s = min(used[:-1], default=math.inf)
    assert abs(guest.ahead_s) <= max(EXACT_S, shortest_s / 2 + 0.001)
