"""The event log: a ring in memory, with the database behind it.

A reader is a number. While the ring has the next events, the reader takes frames from it, which are encoded once for
all. A reader that is further behind reads pages of the database, in a thread and through a connection that can't write.
Pages are aligned and the last few stay in memory, so five hundred clients that come back after a restart cause one
read. A reader that is behind retention gets a gap.

The log outlives the journal's incarnations: an actor that restarts appends the events that were committed and not
published.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import apsw
import msgspec
import trio

from actors import Gap, Log
from volant.host import Host
from volant.model import Event, EventId, EventType, Problem

from ._errors import JournalBroken
from ._frames import EventFrame, EventPages

_PAGE = 256
_KEPT_PAGES = 16


class Frame(Protocol):
    """One entry of a log, encoded once for all readers."""

    @property
    def seq(self) -> int: ...

    @property
    def sse(self) -> bytes:
        """The block of the event stream, with its blank line."""


F = TypeVar("F", bound=Frame)
T = TypeVar("T")


class Pages(Protocol[F]):
    """Reads entries that are no longer in memory. Safe for several threads."""

    def read(self, epoch: str, after_seq: int, up_to_seq: int) -> list[F]:
        """Returns the stored entries after one number and up to another. :raises apsw.Error: the disk fails."""

    def close(self) -> None: ...


class EventGap(msgspec.Struct, frozen=True):
    """Events that a reader asked for are not stored any more, or never were. It continues with `oldest`.

    `oldest` is one more than `newest` when no event is stored.
    """

    requested: str
    oldest: EventId
    newest: EventId

    @property
    def data(self) -> bytes:
        """The JSON of a `STREAM_GAP` (contract: Events)."""
        return msgspec.json.encode(
            {
                "type": "STREAM_GAP",
                "requested": self.requested,
                "oldest": str(self.oldest),
                "newest": str(self.newest),
            }
        )

    @property
    def sse(self) -> bytes:
        """The block of the event stream. Its id is the one before `oldest`, so a reader that resumes misses nothing."""
        before = EventId(self.oldest.epoch, self.oldest.seq - 1)
        return f"id: {before}\nevent: STREAM_GAP\ndata: ".encode() + self.data + b"\n\n"


class EventLogStatistics(msgspec.Struct, frozen=True):
    """Figures of the `EventLog`. `slowest_lag` is in events; `pages_read` counts reads of the database."""

    oldest: int
    newest: int
    ring_oldest: int
    ring_bytes: int
    readers: int
    slowest_lag: int
    pages_read: int
    closed: bool


class FrameLog(Generic[F]):
    """Holds stored entries, such as events, and publishes new ones."""

    def __init__(self, host: Host, pages: Pages[F], *, ring_events: int = 8192, ring_bytes: int = 16 * 1024 * 1024):
        self._host = host
        self._pages = pages
        self._ring_events = ring_events
        self._ring_bytes = ring_bytes
        self._epoch = ""
        self._oldest = 1
        self._newest = 0
        self._ring = Log(max_frames=ring_events, max_bytes=ring_bytes)
        self._recent: dict[int, F] = {}
        self._recent_oldest = 1
        self._shared: tuple[tuple[int, int, int], list[F]] = (0, 0, 0), []
        """The last event that a reader took, its place, the newest event at that time, and the reader's limit."""
        self._kept: OrderedDict[int, list[F]] = OrderedDict()
        self._reading = trio.Lock()
        self._cursors: dict[FrameCursor[F], None] = {}
        self._pages_read = 0
        self._trimming: trio.Event | None = None
        self._closed = False

    @property
    def epoch(self) -> str:
        """Names this database in every event id. Empty until the journal has loaded."""
        return self._epoch

    @property
    def newest(self) -> EventId:
        """The id of the newest event. Its `seq` is 0 before the first one."""
        return EventId(self._epoch, self._newest)

    @property
    def oldest(self) -> EventId:
        """The id of the oldest stored event; one more than `newest` when there is none."""
        return EventId(self._epoch, self._oldest)

    def gap(self, after: EventId | str) -> EventGap | None:
        """Returns the gap that a reader gets first when it starts after this id."""
        if self._seq(after) is None:
            return EventGap(str(after), self.oldest, self.newest)
        return None

    @asynccontextmanager
    async def cursor(self, after: EventId | str | Literal["oldest"] | None) -> AsyncIterator[FrameCursor[F]]:
        """Reads from after an event, with None new events alone, with `"oldest"` from the oldest stored one.

        For an id that is malformed, of another epoch, not given out yet, or no longer stored, the reader gets an
        `EventGap` first and then the oldest events.
        """
        first: EventGap | None = None
        if after is None:
            seq = self._newest
        elif after == "oldest":
            seq = self._oldest - 1
        else:
            first = self.gap(after)
            seq = self._oldest - 1 if first is not None else self._seq(after) or 0
        cursor = FrameCursor(self, seq, first)
        self._cursors[cursor] = None
        try:
            yield cursor
        finally:
            del self._cursors[cursor]

    def close(self) -> None:
        """Ends the log, as the daemon stops: readers take the rest of the ring, then an empty list."""
        self._closed = True
        self._ring.close()
        self._pages.close()

    def statistics(self) -> EventLogStatistics:
        ring = self._ring.statistics()
        return EventLogStatistics(
            self._oldest,
            self._newest,
            ring.oldest,
            ring.bytes,
            len(self._cursors),
            max((self._newest - cursor.seq for cursor in self._cursors), default=0),
            self._pages_read,
            self._closed,
        )

    def _seq(self, after: EventId | str) -> int | None:
        event_id = EventId.parse(after) if isinstance(after, str) else after
        if event_id is None or event_id.epoch != self._epoch or not self._oldest - 1 <= event_id.seq <= self._newest:
            return None
        return event_id.seq

    def _next_frames(self, after: int, max_bytes: int) -> list[F]:
        """Returns the next events of the ring. As a rule all readers ask for the same ones at the same time."""
        place = after, self._newest, max_bytes
        if self._shared[0] != place:
            taken = self._ring.cursor(after=after).take_nowait(max_bytes)
            assert not isinstance(taken, Gap)
            self._shared = place, [self._recent[seq] for seq, _ in taken]
        return self._shared[1]

    async def _page(self, number: int, after: int) -> list[F]:
        """Returns the page that has the event after `after`, if the database has it."""
        async with self._reading:
            page = self._kept.get(number)
            # The newest page stays in memory too, although it grows: most readers resume in it.
            if page is None or page[-1].seq <= after:
                page = await self._host.threads.run(self._pages.read, self._epoch, number * _PAGE, (number + 1) * _PAGE)
                self._pages_read += 1
                if page:
                    self._kept[number] = page
            if page:
                self._kept.move_to_end(number)
            if len(self._kept) > _KEPT_PAGES:
                self._kept.popitem(last=False)
            return page

    # For the journal alone

    def attach(self, epoch: str, oldest: int, newest: int, unpublished: Sequence[F]) -> None:
        """Take over what was loaded. `unpublished`: the events after `newest` of this log, if it was attached before.

        :raises JournalBroken: the database is not the one of before.
        """
        if not self._epoch:
            self._newest = newest
            self._ring = Log(max_frames=self._ring_events, max_bytes=self._ring_bytes, next_seq=newest + 1)
            self._recent_oldest = newest + 1
            self._epoch = epoch
        elif epoch != self._epoch or newest != self._newest + len(unpublished):
            raise JournalBroken(
                f"the database ends with event {epoch}-{newest}, but readers have got {self._epoch}-{self._newest}"
            )
        self._oldest = oldest
        self.append(unpublished)

    def append(self, frames: Sequence[F]) -> None:
        """Publish events that are committed."""
        for frame in frames:
            if frame.seq != self._newest + 1:
                raise JournalBroken(f"event {frame.seq} would follow event {self._newest}")
            if not self._closed:
                self._ring.append(frame.sse)
                self._recent[frame.seq] = frame
            self._newest = frame.seq
        while self._recent_oldest < self._ring.oldest:
            self._recent.pop(self._recent_oldest, None)
            self._recent_oldest += 1

    @contextmanager
    def trimming(self) -> Iterator[None]:
        """Retention deletes events in this block, and calls `trimmed` before its end."""
        over = self._trimming = trio.Event()
        try:
            yield
        finally:
            self._trimming = None
            over.set()

    def trimmed(self, oldest: int) -> None:
        """Retention has deleted the events before `oldest`."""
        self._oldest = max(self._oldest, oldest)
        for number in [number for number in self._kept if (number + 1) * _PAGE < self._oldest]:
            del self._kept[number]


class FrameCursor(Generic[F]):
    """A place in the event log. `FrameLog.cursor` makes it."""

    def __init__(self, log: FrameLog[F], seq: int, gap: EventGap | None) -> None:
        self._log = log
        self._gap = gap
        self.seq = seq
        """The number of the last event that was taken."""

    @property
    def position(self) -> EventId:
        """The id of the last event that was taken."""
        return EventId(self._log.epoch, self.seq)

    async def take(self, max_bytes: int = 256 * 1024) -> list[F] | EventGap:
        """Waits for events and takes them in order, at least one and about `max_bytes` (of `sse`) at most. Readers at
        the same place share the list, so it must not be changed.

        An `EventGap` says that some are not stored any more; the next call continues with the oldest. An empty list is
        the end: the daemon stops. A cancelled call has taken nothing.

        :raises apsw.Error: the database can't be read.
        """
        log = self._log
        while True:
            if self._gap is not None or self.seq + 1 < log._oldest:
                await trio.lowlevel.checkpoint()
                return self._take_gap()
            ring = log._ring
            if self.seq + 1 >= ring.oldest:
                await ring.wait(after=self.seq)
                if self.seq + 1 < ring.oldest:
                    continue
                frames = log._next_frames(self.seq, max_bytes)
            elif log._closed:
                await trio.lowlevel.checkpoint()
                return []
            else:
                frames = self._cut(await log._page(self.seq // _PAGE, self.seq), max_bytes)
                if not frames:
                    if self.seq + 1 < log._oldest:
                        continue
                    if log._trimming is not None:
                        # Deleted already. How many, is known in a moment.
                        await log._trimming.wait()
                        continue
                    raise JournalBroken(f"event {self.seq + 1} should be in the database, and is not")
            if frames:
                self.seq = frames[-1].seq
            return frames

    def _take_gap(self) -> EventGap:
        log = self._log
        if self._gap is not None:
            gap, self._gap = self._gap, None
            return gap
        gap = EventGap(str(self.position), log.oldest, log.newest)
        self.seq = log._oldest - 1
        return gap

    def _cut(self, page: Sequence[F], max_bytes: int) -> list[F]:
        """Returns the next events of a page, without a hole. The disk also has events that are not published yet."""
        frames: list[F] = []
        size = 0
        for frame in page:
            if frame.seq <= self.seq:
                continue
            size += len(frame.sse)
            if (
                frame.seq != self.seq + len(frames) + 1
                or frame.seq > self._log._newest
                or (size > max_bytes and frames)
            ):
                break
            frames.append(frame)
        return frames


class EventLog(FrameLog[EventFrame]):
    """Holds the stored events, and publishes new ones."""

    def __init__(self, host: Host, path: Path, *, ring_events: int = 8192, ring_bytes: int = 16 * 1024 * 1024) -> None:
        self._events = EventPages(path)
        self._folding = trio.Lock()
        super().__init__(host, self._events, ring_events=ring_events, ring_bytes=ring_bytes)

    async def fold(self, types: Collection[EventType], up_to: EventId, use: Callable[[Iterator[Event]], T]) -> T:
        """Calls `use` in a worker thread with all stored events of some types up to one, in order, and returns its
        result. Only one call runs at a time: with very many events it takes a second. :raises Problem: 503, the events
        can't be read."""
        try:
            async with self._folding:
                return await self._host.threads.run(self._events.fold, types, up_to.seq, use)
        except (apsw.Error, msgspec.MsgspecError) as error:
            raise Problem(503, "events-unreadable", f"events can't be read: {error}", hint="check the disk") from error


EventCursor = FrameCursor[EventFrame]
