"""Limits how many streams into a guest are open at once."""

from __future__ import annotations

import trio

from volant.model.agent import MAX_STREAMS, RESERVED_STREAMS


class Slot:
    """The right to one stream. `release` may be called more than once."""

    __slots__ = ("_limiter",)

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter: trio.CapacityLimiter | None = limiter

    def release(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.release_on_behalf_of(self)


class Slots:
    """Slots for clients' streams, and a few for the daemon's own, so that clients can't lock it out."""

    def __init__(self) -> None:
        self._common = trio.CapacityLimiter(MAX_STREAMS)
        self._reserved = trio.CapacityLimiter(RESERVED_STREAMS)

    @property
    def taken(self) -> int:
        return int(self._common.borrowed_tokens + self._reserved.borrowed_tokens)

    async def acquire(self, *, reserved: bool) -> Slot:
        """Waits for a slot, in the order of the calls."""
        limiter = self._reserved if reserved else self._common
        slot = Slot(limiter)
        await limiter.acquire_on_behalf_of(slot)
        return slot
