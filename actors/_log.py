"""One log for many readers: a bounded ring of frames with sequence numbers, and cursors into it.

A queue for each subscriber costs memory for each that does not read, and makes the publisher wait for slow readers or
drop their frames. Here a subscriber is a number. It wakes up, takes all frames since its number at once, and sleeps.
The publisher writes once and never waits; a reader that does not read costs nothing. A reader that was too slow gets a
`Gap`, and decides what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import final

import trio
from trio.lowlevel import ParkingLot, cancel_shielded_checkpoint, checkpoint_if_cancelled


@dataclass(frozen=True, slots=True)
class Gap:
    """Reports that frames have expired: those after `after` and before `oldest`.

    `newest` is the newest frame. `oldest` is `newest + 1` when the ring is empty.
    """

    after: int
    oldest: int
    newest: int


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """Figures of a `Log`. `slowest_lag` counts frames; `tasks_waiting` counts readers that have read everything."""

    oldest: int
    newest: int
    frames: int
    bytes: int
    appended: int
    cursors: int
    slowest_lag: int
    tasks_waiting: int
    closed: bool


@final
class Log:
    """A bounded ring of frames. It drops the oldest beyond `max_frames` frames or `max_bytes` bytes.

    Sequence numbers begin with `next_seq` and have no holes.

    :raises ValueError: a bound is below 1.
    """

    __slots__ = (
        "_bytes",
        "_closed",
        "_cursors",
        "_first",
        "_frames",
        "_lot",
        "_next",
        "_origin",
        "max_bytes",
        "max_frames",
    )

    def __init__(self, *, max_frames: int, max_bytes: int, next_seq: int = 1) -> None:
        if max_frames < 1 or max_bytes < 1:
            raise ValueError("max_frames and max_bytes must be at least 1")
        self.max_frames = max_frames
        self.max_bytes = max_bytes
        self._origin = self._first = self._next = next_seq
        self._frames: dict[int, bytes] = {}
        self._bytes = 0
        self._closed = False
        self._lot = ParkingLot()
        self._cursors: dict[Cursor, None] = {}

    @property
    def oldest(self) -> int:
        """The number of the oldest frame; `newest + 1` when there is none."""
        return self._first

    @property
    def newest(self) -> int:
        """The number of the newest frame; `next_seq - 1` before the first."""
        return self._next - 1

    def append(self, frame: bytes) -> int:
        """Adds a frame and returns its number. Never waits.

        :raises ValueError: the frame alone is larger than `max_bytes`.
        :raises trio.ClosedResourceError: the log is closed.
        """
        if self._closed:
            raise trio.ClosedResourceError("the log is closed")
        size = len(frame)
        if size > self.max_bytes:
            raise ValueError(f"a frame of {size} bytes does not fit into a log of {self.max_bytes}")
        frames = self._frames
        seq = self._next
        frames[seq] = frame
        self._next = seq + 1
        self._bytes += size
        while self._bytes > self.max_bytes or len(frames) > self.max_frames:
            self._bytes -= len(frames.pop(self._first))
            self._first += 1
        if self._lot:
            self._lot.unpark_all()
        return seq

    def cursor(self, *, after: int) -> Cursor:
        """Returns a reader that begins with the frame after this number. Use it with `async with`.

        `log.cursor(after=log.newest)` reads the frames that come from now on.

        :raises ValueError: `after` is beyond the newest frame.
        """
        if after > self.newest:
            raise ValueError(f"after={after} lies ahead of the newest frame, {self.newest}")
        return Cursor(self, after)

    async def wait(self, *, after: int) -> None:
        """Waits until a reader at `after` can take frames, a gap or the end. It is always a checkpoint."""
        await checkpoint_if_cancelled()
        if self._has(after):
            await cancel_shielded_checkpoint()
        while not self._has(after):
            await self._lot.park()

    def _has(self, after: int) -> bool:
        """Returns whether a reader at `after` can take frames, a gap or the end."""
        return self._closed or after < self._next - 1

    def close(self) -> None:
        """Ends the log: readers take the remaining frames, then the end. May be called again."""
        self._closed = True
        self._lot.unpark_all()

    def statistics(self) -> LogStatistics:
        """Returns figures for monitoring."""
        return LogStatistics(
            oldest=self.oldest,
            newest=self.newest,
            frames=len(self._frames),
            bytes=self._bytes,
            appended=self._next - self._origin,
            cursors=len(self._cursors),
            slowest_lag=max((self.newest - cursor.after for cursor in self._cursors), default=0),
            tasks_waiting=len(self._lot),
            closed=self._closed,
        )


@final
class Cursor:
    """A position in a `Log`. It has no public constructor: `Log.cursor` makes it."""

    __slots__ = ("_log", "after")

    def __init__(self, log: Log, after: int) -> None:
        self._log = log
        #: The number of the last frame taken.
        self.after = after

    async def __aenter__(self) -> Cursor:
        self._log._cursors[self] = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._log._cursors.pop(self, None)

    async def take(self, max_bytes: int) -> list[tuple[int, bytes]] | Gap:
        """Waits for frames, and returns them with their numbers, in order, `max_bytes` at most.

        At least one frame comes, however large. An empty list is the end of a closed log. A `Gap` says that frames are
        gone; the next call goes on with the oldest that is left. It is always a checkpoint; a cancelled call has taken
        nothing.
        """
        await self._log.wait(after=self.after)
        return self.take_nowait(max_bytes)

    def take_nowait(self, max_bytes: int) -> list[tuple[int, bytes]] | Gap:
        """Takes frames like `take`, without waiting.

        :raises trio.WouldBlock: everything is read, and the log is open.
        """
        log = self._log
        if self.after + 1 < log._first:
            gap = Gap(self.after, log._first, log.newest)
            self.after = log._first - 1
            return gap
        if not log._has(self.after):
            raise trio.WouldBlock
        taken: list[tuple[int, bytes]] = []
        size = 0
        frames = log._frames
        for seq in range(self.after + 1, log._next):
            frame = frames[seq]
            size += len(frame)
            if size > max_bytes and taken:
                break
            taken.append((seq, frame))
        if taken:
            self.after = taken[-1][0]
        return taken
