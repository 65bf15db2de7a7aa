"""Reads a VM's log: history from its segments, then a ring in memory that holds the newest lines."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
import trio

from actors import Gap, Log

from ._segments import Place, Segment, read

if TYPE_CHECKING:
    from ._log import VmLog

_BEFORE = Place(0, 0)
"""The place before the first line of a segment."""


class LogGap(msgspec.Struct, frozen=True):
    """Expired lines, from one number to another, both included."""

    first: int
    last: int

    @property
    def frame(self) -> bytes:
        """The JSON for clients."""
        return b'{"gap":{"from":%d,"to":%d}}' % (self.first, self.last)


class LogCursor(msgspec.Struct, eq=False):
    """A position in a VM's log. `VmLog.cursor` creates it."""

    _log: VmLog
    _ring: Log
    position: int
    """The number of the last line taken or skipped."""
    _heads: tuple[bytes, ...]
    _since_us: int
    _end: int | None
    _segment: Segment | None = None
    _place: Place = _BEFORE

    async def take(self, max_bytes: int = 256 * 1024) -> list[bytes] | LogGap:
        """Waits for lines and takes them encoded, at least one and about `max_bytes` at most.

        A `LogGap` says which lines are not stored any more; the next call continues after it. An empty list is the end:
        the VM is deleted, or the cursor does not follow and has reached the line that was newest at its start.

        :raises OSError: the disk can't be read.
        """
        await trio.lowlevel.checkpoint()
        while self._end is None or self.position < self._end:
            if self.position + 1 >= self._ring.oldest:
                found: list[bytes] | LogGap | None = await self._follow(max_bytes)
                if found is None:
                    return []
            else:
                found = await self._history(max_bytes)
            if found:
                return found
        return []

    async def _follow(self, max_bytes: int) -> list[bytes] | None:
        """Returns lines of the ring, possibly none of the wanted streams; None at the end."""
        taken = await self._ring.cursor(after=self.position).take(max_bytes)
        if isinstance(taken, Gap):
            return []
        if not taken:
            return None
        frames = []
        for seq, frame in taken:
            if self._end is not None and seq > self._end:
                break
            self.position = seq
            if self._heads and not frame.startswith(self._heads):
                continue
            if self._since_us:
                if _time_us(frame) < self._since_us:
                    continue
                self._since_us = 0
            frames.append(frame)
        return frames

    async def _history(self, max_bytes: int) -> list[bytes] | LogGap:
        log = self._log
        wanted = self.position + 1
        segment = log._segment_with(wanted)
        if segment is None:
            return self._gap(log._next_after(wanted))
        if segment is not self._segment:
            self._segment, self._place = segment, Place(segment.first - 1, 0)
        last = min(log._last_of(segment, log.newest), self._ring.oldest - 1)
        if self._end is not None:
            last = min(last, self._end)
        place, size, after, since_us = self._place, segment.size, self.position, self._since_us
        try:
            async with log._reading:
                found = await log._host.threads.run(
                    lambda: read(
                        log._host,
                        segment.path,
                        size,
                        place,
                        after=after,
                        up_to=last,
                        since_us=since_us,
                        heads=self._heads,
                        max_bytes=max_bytes,
                    )
                )
        except FileNotFoundError:
            # Retention has just removed it.
            self._segment = None
            return []
        self._place = found.place
        self.position = max(self.position, found.place.seq)
        if found.frames:
            self._since_us = 0
            return found.frames
        if found.end and self.position < last:
            return self._gap(last + 1)
        return []

    def _gap(self, up_to: int) -> LogGap:
        gap = LogGap(self.position + 1, up_to - 1)
        self.position = up_to - 1
        return gap


class _Stamp(msgspec.Struct):
    timestamp: datetime


def _time_us(frame: bytes) -> int:
    return int(msgspec.json.decode(frame, type=_Stamp).timestamp.timestamp() * 1_000_000)
