"""Sets a guest's clock as exactly as the round trip of a request allows.

A request takes time to arrive, so the lead of the guest's clock is only known to half of the round trip. Setting the
clock by that lead may then take any time. Of all attempts, the one with the shortest round trip counts: a measurement
with a long round trip never changes a clock that is known more exactly.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from volant.channel import AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff
from volant.host import Host
from volant.model.agent import DAEMON_CLOCK

from ._connection import AgentConnection, NoSuchRoute

_EXACT_NS = 25_000_000
"""The tolerance: a clock with a smaller error is exact."""
_MAX_LEAD_NS = 20_000_000
"""The maximum lead to add. A clock set ahead by this much is exact even if the request then takes no time."""
_TRIES = 5
"""Attempts per correction. On a busy host, one of some requests is short enough."""
FIRST_TRIES = 2
"""Attempts for a clone, which a client waits for. `repair` follows if they are not enough."""
_REPAIR_S, _REPAIR_MAX_S = 1.0, 60.0
_REPAIRS = 12
_REACHABLE_S = 20.0
"""The deadline for the agent of a paused guest to answer again and to set its clock."""


class GuestClock:
    """The wall clock of one guest."""

    def __init__(self, host: Host, connection: AgentConnection) -> None:
        self._host = host
        self._connection = connection
        self._lock = trio.Lock()
        self._is_exact = True
        self._unsure_ns = math.inf
        """The maximum error of the clock, as far as known."""
        self._may_be_repaired = trio.Event()

    def now_ns(self) -> int:
        """Returns the host's time, in nanoseconds since 1970."""
        return int(self._host.clock.now().timestamp() * 1e6) * 1000

    async def set(self) -> None:
        """Sets the clock of a guest that was paused. Does nothing if the agent is too old for that.

        :raises AgentUnreachable: it can't be reached in time.
        :raises AgentProtocolError: it refuses.
        """
        await self._once_reachable(self._set)

    def doubt(self) -> None:
        """Lets `repair` set the clock of a guest that has booted: the hardware's clock has whole seconds."""
        self._is_exact, self._unsure_ns = False, math.inf
        self._may_be_repaired.set()

    async def step(self, behind_s: float) -> None:
        """Moves the clock of a guest that was paused for `behind_s` seconds, in one request. Raises as `set`."""

        async def step() -> None:
            async with self._lock:
                await self._connection.put(DAEMON_CLOCK, {"step_ns": int(behind_s * 1e9)})

        await self._once_reachable(step)

    async def check(self, shown_ns: int) -> None:
        """Sets the clock of a clone if it is wrong.

        :param shown_ns: the clone's time, which the daemon sent with the request that was just answered

        :raises AgentUnreachable: :raises AgentProtocolError:
        """
        behind_ns = self.now_ns() - shown_ns
        if not 0 <= behind_ns <= _EXACT_NS:
            # The guest has run the code on the way by now, so the next way takes a third of the first.
            await self._set(FIRST_TRIES, behind_ns // 6)
        self._may_be_repaired.set()

    async def repair(self, limiter: trio.CapacityLimiter) -> bool:
        """Corrects the clock of a guest that has begun to run, until it is exact: at first, the host may be too busy.

        One guest at a time, and with growing pauses, so that this does not keep the host busy. Returns whether the
        clock is exact; it gives up after a dozen tries.
        """
        await self._may_be_repaired.wait()
        backoff = Backoff(_REPAIR_S, _REPAIR_MAX_S)
        for _ in range(_REPAIRS):
            if self._is_exact:
                break
            await backoff.pause()
            with suppress(AgentUnreachable, AgentProtocolError):
                async with self._connection.limited(limiter):
                    await self._correct()
        return self._is_exact

    async def _once_reachable(self, send: Callable[[], Awaitable[None]]) -> None:
        with trio.move_on_after(_REACHABLE_S):
            await self._connection.ready()
            with suppress(NoSuchRoute):
                await send()
            return
        raise AgentUnreachable(f"the agent did not take the time within {_REACHABLE_S:g} s")

    async def _set(self, tries: int = _TRIES, lead_ns: int = 0) -> None:
        """`lead_ns` is the expected duration of the way there."""
        async with self._lock:
            time_ns = self.now_ns() + max(0, min(lead_ns, _MAX_LEAD_NS))
            self._is_exact = await self._measure(tries, {"time_ns": time_ns})

    async def _correct(self) -> None:
        async with self._lock:
            self._is_exact = await self._measure(_TRIES, {"step_ns": 0})

    async def _measure(self, tries: int, request: dict[str, int]) -> bool:
        """Whether the clock is exact afterwards. `request`: the first one."""
        after_ns = self._unsure_ns if "step_ns" in request else math.inf
        for _ in range(tries):
            sent_ns = self.now_ns()
            try:
                shown_ns = (await self._connection.put(DAEMON_CLOCK, request))["time_ns"]
            except AgentProtocolError:
                if "step_ns" not in request:
                    raise
                return True  # the agent is too old to step
            self._unsure_ns = after_ns
            unsure_ns = (self.now_ns() - sent_ns) // 2
            ahead_ns = shown_ns - sent_ns - unsure_ns
            if abs(ahead_ns) + unsure_ns <= _EXACT_NS:
                self._unsure_ns = abs(ahead_ns) + unsure_ns
                return True
            # A program in the guest may have set it, too.
            if unsure_ns < self._unsure_ns or abs(ahead_ns) > unsure_ns + self._unsure_ns:
                request, after_ns = {"step_ns": -ahead_ns}, unsure_ns
            else:
                request, after_ns = {"step_ns": 0}, self._unsure_ns
        if request["step_ns"]:
            await self._connection.put(DAEMON_CLOCK, request)
            self._unsure_ns = after_ns
        return self._unsure_ns <= _EXACT_NS
