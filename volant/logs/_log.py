"""The log of one VM: the lines of its console and of its workload.

A line is encoded once, for the disk and for all readers. `append` writes in place, without a worker thread: that is a
copy into the page cache of a few microseconds, and a thread would cost a hundred. Nothing is synced: the page cache
survives the daemon, and a power cut ends the VM as well. Reading history and removing files block, so they run in
threads.

A reader is a number (`_log_cursor`). While it is behind it reads segments, then it follows a ring (`actors.Log`), which
exists only while there are readers. So a log without readers has no line in memory.

When the disk is full, lines are lost: the numbers continue, and a reader gets a gap. The alternative is to hold the
guest back, and a VM must not stop because of its log.
"""

from __future__ import annotations

import bisect
import logging
import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec
import trio

from actors import Log, check_fence
from volant.concurrency import FairShare
from volant.host import Host
from volant.model import Key, utf8_boundary

from ._cursor import LogCursor
from ._segments import (
    CHECKPOINT_BYTES,
    MAX_SOURCES,
    Segment,
    checkpoint_line,
    count_back,
    recover,
    remember,
)
from ._throttle import Throttle

LogStream = Literal["stdout", "stderr", "console"]

MAX_LINE_BYTES = 64 * 1024
"""Longer lines are split (contract: Logs)."""

_RING_FRAMES = 4096
_RING_BYTES = 1024 * 1024
_FLUSH_BYTES = 512 * 1024
_TAIL_BYTES = 256 * 1024
_SOURCE_CHARACTERS = 200

_encode = msgspec.json.Encoder().encode
_logger = logging.getLogger("volant.journal")


class LogEntry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line for the log.

    `source` names what the line was read from, within one boot. `position` is where to continue in it after this line.
    `partial`: more of the same line follows.
    """

    stream: LogStream
    line: bytes
    timestamp: datetime
    source: str
    position: int
    partial: bool = False


class LogStatistics(msgspec.Struct, frozen=True):
    """Statistics of a `VmLog`. `lost` counts lines that could not be written since the daemon's start."""

    oldest: int
    newest: int
    bytes: int
    segments: int
    readers: int
    lost: int
    ended: bool


class VmLog:
    """The log of one VM. `VmLogs` creates one object for each VM."""

    def __init__(
        self,
        host: Host,
        directory: Path,
        vm_id: int,
        segments: list[Segment],
        *,
        max_bytes: int,
        segment_bytes: int,
        drop: Callable[[Path], None],
        share: FairShare,
        reading: trio.Lock,
    ) -> None:
        self._host = host
        self._directory = directory
        self._segments = sorted(segments, key=lambda segment: (segment.first, segment.at_us))
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._drop = drop
        self.vm_id = vm_id
        self._throttle = Throttle(share, vm_id)
        self._reading = reading
        """Shared by all logs, so that readers search the history one after the other: with a thread each, they would
        leave the event loop a fraction of the interpreter's time."""
        self._key = Key("", "")
        self._newest = 0
        self._resume: dict[str, int] = {}
        self._last_us = 0
        self._fd = -1
        self._next_checkpoint = 0
        self._roll = True
        self._lost = 0
        self._failing = False
        self._ended = False
        self._readers = 0
        self._ring: Log | None = None
        self._heads: dict[str, bytes] = {}
        self._tokens: dict[str, tuple[str, bytes]] = {}
        self._recover()

    def _recover(self) -> None:
        while self._segments:
            last = self._segments[-1]
            found = recover(self._host, last) if last.size else None
            if found is None:
                self._drop(self._segments.pop().path)
                # Only its name is of use.
                self._newest = max(self._newest, last.first - 1)
                continue
            self._newest = max(self._newest, found.newest)
            self._resume = found.resume
            self._key = found.vm
            # The lines may have a guest's time. The segment has the daemon's.
            self._last_us = max(last.at_us, min(found.last_us, self._now_us()))
            self._roll = not found.whole or self._newest != found.newest
            self._next_checkpoint = last.size + CHECKPOINT_BYTES
            break
        # A crash between the creation of a segment and its first record leaves two that begin with the same number.
        for earlier, later in zip(self._segments[:-1], self._segments[1:], strict=True):
            if earlier.first == later.first:
                self._segments.remove(earlier)
                self._drop(earlier.path)

    @property
    def name(self) -> str:
        """The VM's name, empty until its pump has opened the log."""
        return self._key.name

    @property
    def key(self) -> Key:
        """The VM's project and name, both empty until its pump has opened the log."""
        return self._key

    @property
    def newest(self) -> int:
        """The number of the newest line, 0 before the first."""
        return self._newest

    @property
    def oldest(self) -> int:
        """The number of the oldest stored line; `newest + 1` if there is none."""
        return self._segments[0].first if self._segments else self._newest + 1

    @property
    def ended(self) -> bool:
        """Whether the VM is deleted."""
        return self._ended

    def statistics(self) -> LogStatistics:
        return LogStatistics(
            self.oldest,
            self._newest,
            sum(segment.size for segment in self._segments),
            len(self._segments),
            self._readers,
            self._lost,
            self._ended,
        )

    # Writing

    def resume_position(self, source: str) -> int:
        """Returns the position at which to continue in `source`, so that each line is logged exactly once; 0 if
        unknown."""
        return self._resume.get(self._token(source)[0], 0)

    async def throttle(self, lines: int, size: int) -> None:
        """Waits after an append of this number of lines, with `size` bytes in total; longer after many. Always a
        checkpoint."""
        await self._throttle.spend(lines, size)

    def append(self, entries: Sequence[LogEntry]) -> None:
        """Numbers, encodes and writes lines, and wakes readers up. Never waits, and ignores a failing disk.

        A line over 64 KiB is split. Bytes that are no UTF-8 become U+FFFD.

        :raises trio.ClosedResourceError: the VM is deleted.
        :raises Fenced: the caller's incarnation was killed.
        """
        check_fence()
        if self._ended:
            raise trio.ClosedResourceError(f"the log of VM {self.vm_id} has ended")
        records: list[bytes] = []
        frames: list[bytes] = []
        marks: dict[str, int] = {}
        size = 0
        stamp: datetime | None = None
        stamp_us, stamp_text = 0, b""
        for entry in entries:
            line = entry.line
            if entry.timestamp is not stamp:
                stamp = entry.timestamp
                stamp_us = int(stamp.timestamp() * 1_000_000)
                stamp_text = b',"timestamp":' + _encode(stamp) + b',"seq":'
            head = self._heads.get(entry.stream) or self._head(entry.stream)
            source, token = self._tokens.get(entry.source) or self._token(entry.source)
            while len(line) > MAX_LINE_BYTES:
                cut = utf8_boundary(line, MAX_LINE_BYTES)
                text = _encode(line[:cut].decode("utf-8", "replace"))
                line = line[cut:]
                self._newest += 1
                frame = b'%b%b%b%d,"partial":true}' % (head, text, stamp_text, self._newest)
                frames.append(frame)
                records.append(b"%b - %d %b\n" % (token, stamp_us, frame))
                size += len(frame)
            self._newest += 1
            text = _encode(line.decode("utf-8", "replace"))
            end = b',"partial":true}' if entry.partial else b"}"
            frame = b"%b%b%b%d%b" % (head, text, stamp_text, self._newest, end)
            frames.append(frame)
            records.append(b"%b %d %d %b\n" % (token, entry.position, stamp_us, frame))
            size += len(frame)
            marks[source] = entry.position
            # Only between entries, as a pump can't continue within one.
            if size >= _FLUSH_BYTES:
                self._flush(records, frames, marks)
                records, frames, marks, size = [], [], {}, 0
        if records:
            self._flush(records, frames, marks)
        # Not the time of the lines, which may be a guest's.
        self._last_us = self._now_us()

    def _flush(self, records: list[bytes], frames: list[bytes], marks: dict[str, int]) -> None:
        try:
            kept = self._write(self._newest - len(records) + 1, b"".join(records), marks)
        except OSError as error:
            kept = 0
            self._fail(error)
        else:
            self._failing = self._failing and kept < len(records)
        self._lost += max(0, len(records) - kept)
        ring = self._ring
        if ring is not None:
            for frame in frames:
                ring.append(frame)

    def _write(self, first: int, data: bytes, marks: dict[str, int]) -> int:
        """Write data to the newest segment. Returns how many of its records are stored.

        :raises OSError: none is stored.
        """
        segment = self._segments[-1] if self._segments else None
        try:
            if self._roll or segment is None or segment.size + len(data) > self._segment_bytes:
                segment = self._begin(first)
            elif self._fd < 0:
                self._fd = self._host.descriptors.open(segment.path, os.O_WRONLY | os.O_APPEND)
        finally:
            # Not before, as the checkpoint at the beginning of a segment precedes this data.
            for source, position in marks.items():
                remember(self._resume, source, position)
        if segment.size >= self._next_checkpoint:
            data += checkpoint_line(self._newest + 1, self._key, self._resume)
            self._next_checkpoint = segment.size + CHECKPOINT_BYTES
        written = self._host.descriptors.write(self._fd, data)
        if written == len(data):
            segment.size += written
            return self._newest - first + 1
        self._fail(OSError("only a part was written"))
        whole = data.rfind(b"\n", 0, written) + 1
        segment.size += whole
        return data.count(b"\n", 0, whole)

    def _begin(self, first: int) -> Segment:
        """Begin a segment with the number `first`, and remove the oldest to make room. :raises OSError:"""
        self.release()
        self._roll = True
        segment = Segment.fresh(self._directory, self.vm_id, first, self._now_us())
        fd = self._host.descriptors.open(segment.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL)
        line = checkpoint_line(first, self._key, self._resume)
        try:
            if self._host.descriptors.write(fd, line) != len(line):
                raise OSError("only a part was written")
        except OSError:
            self._host.descriptors.close(fd)
            self._drop(segment.path)
            raise
        segment.size = len(line)
        self._fd = fd
        self._segments.append(segment)
        self._next_checkpoint = CHECKPOINT_BYTES
        self._roll = False
        kept = sum(segment.size for segment in self._segments)
        while len(self._segments) > 1 and kept + self._segment_bytes > self._max_bytes:
            oldest = self._segments.pop(0)
            kept -= oldest.size
            self._drop(oldest.path)
        return segment

    def _fail(self, error: OSError) -> None:
        # A torn end would be read as records, so the next line begins another file.
        self._roll = True
        self.release()
        if not self._failing:
            _logger.warning("the log of VM %d (%s) loses lines: %s", self.vm_id, self._key.name, error)
        self._failing = True

    def _now_us(self) -> int:
        return int(self._host.clock.now().timestamp() * 1_000_000)

    def _head(self, stream: str) -> bytes:
        head = b'{"name":%b,"vm_id":%d,"stream":%b,"line":' % (_encode(self._key.name), self.vm_id, _encode(stream))
        self._heads[stream] = head
        return head

    def _token(self, source: str) -> tuple[str, bytes]:
        # A guest may invent sources.
        if len(self._tokens) >= MAX_SOURCES:
            self._tokens.clear()
        token = quote(source[:_SOURCE_CHARACTERS], safe="/.-_:@")
        self._tokens[source] = (token, token.encode())
        return self._tokens[source]

    # Upkeep, for `VmLogs`

    def set_key(self, key: Key) -> None:
        """Set the VM's project and name for the next lines."""
        if key != self._key:
            self._key = key
            self._heads.clear()

    def release(self) -> None:
        """Close the file. The next line opens it again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._host.descriptors.close(fd)

    def go_on(self) -> None:
        """Accept lines again after `end`."""
        self._ended = False

    def end(self) -> None:
        """Accept no more lines. Readers get the rest, then the end."""
        self._ended = True
        self.release()
        if self._ring is not None:
            self._ring.close()

    def expire(self, cutoff_us: int, idle_us: int) -> None:
        """Remove lines from before `cutoff_us`, and close the file if nothing was written since `idle_us`."""
        if self._last_us < idle_us:
            self.release()
        if self._segments and self._last_us < cutoff_us and self._newest >= self._segments[-1].first:
            # An empty segment stays, as the numbers continue from its name.
            try:
                self._begin(self._newest + 1)
            except OSError as error:
                self._fail(error)
                return
            self.release()
        while len(self._segments) > 1 and self._segments[1].at_us < cutoff_us:
            self._drop(self._segments.pop(0).path)
        if len(self._segments) == 2 and self._last_us < cutoff_us and self._newest < self._segments[1].first:
            self._drop(self._segments.pop(0).path)

    def remove(self) -> None:
        """Remove all lines."""
        self.end()
        while self._segments:
            self._drop(self._segments.pop().path)

    # Reading

    def tail_lines(self, count: int, stream: LogStream | None = None, *, source: str | None = None) -> tuple[str, ...]:
        """Returns the last lines of a stream and a source, or of all, oldest first.

        Reads at most the last 256 KiB, in place: they have just been written, so they are in memory.
        """
        heads = () if stream is None else (self._head(stream),)
        token = None if source is None else self._token(source)[1]
        lines: list[str] = []
        room = _TAIL_BYTES
        for segment in reversed(self._segments):
            if room <= 0 or len(lines) >= count:
                break
            begin = max(0, segment.size - room)
            try:
                fd = self._host.descriptors.open(segment.path, os.O_RDONLY)
                try:
                    data = self._host.descriptors.read_at(fd, segment.size - begin, begin)
                finally:
                    self._host.descriptors.close(fd)
            except OSError:
                break
            room -= len(data)
            records = data.split(b"\n")[1 if begin else 0 : -1]
            for record in reversed(records):
                fields = record.split(b" ", 3)
                if len(lines) >= count or len(fields) != 4 or (token is not None and fields[0] != token):
                    continue
                if not heads or fields[3].startswith(heads):
                    try:
                        lines.append(msgspec.json.decode(fields[3], type=_Line).line)
                    except ValueError:
                        continue
        return tuple(reversed(lines))

    @asynccontextmanager
    async def cursor(
        self,
        *,
        since_seq: int | None = None,
        since_time: datetime | None = None,
        tail: int | None = None,
        streams: Collection[LogStream] = (),
        follow: bool = True,
    ) -> AsyncIterator[LogCursor]:
        """Reads the log, all streams or some.

        The first argument that is given decides where: after the line numbered `since_seq`, at the first line from
        `since_time` on, at the last `tail` lines of the streams; else at the oldest line. `follow` waits for more at
        the end.

        :raises OSError: the disk can't be read.
        """
        if self._ring is None:
            self._ring = Log(max_frames=_RING_FRAMES, max_bytes=_RING_BYTES, next_seq=self._newest + 1)
            if self._ended:
                self._ring.close()
        self._readers += 1
        try:
            heads = tuple(self._head(stream) for stream in streams)
            end = None if follow else self._newest
            place, since_us = self.oldest - 1, 0
            if since_seq is not None:
                place = min(max(since_seq, 0), self._newest)
            elif since_time is not None:
                since_us = int(since_time.timestamp() * 1_000_000)
                for segment in self._segments:
                    if segment.at_us <= since_us:
                        place = max(place, segment.first - 1)
            elif tail is not None:
                place = await self._tail(max(0, tail), heads)
            yield LogCursor(self, self._ring, place, heads, since_us, end)
        finally:
            self._readers -= 1
            if not self._readers:
                self._ring = None

    async def _tail(self, count: int, heads: tuple[bytes, ...]) -> int:
        newest = self._newest
        if not count:
            return newest
        if not heads:
            return max(newest - count, self.oldest - 1)
        place = self.oldest - 1
        for segment in reversed(self._segments.copy()):
            last = self._last_of(segment, newest)
            try:
                async with self._reading:
                    found, place = await self._host.threads.run(
                        lambda segment=segment, last=last, count=count: count_back(
                            self._host, segment, last, heads, count
                        )
                    )
            except FileNotFoundError:
                break
            count -= found
            if not count:
                break
        return max(place, self.oldest - 1)

    def _last_of(self, segment: Segment, newest: int) -> int:
        """Returns the highest number that a segment can have."""
        index = bisect.bisect_right(self._segments, segment.first, key=lambda other: other.first)
        return self._segments[index].first - 1 if index < len(self._segments) else newest

    def _segment_with(self, seq: int) -> Segment | None:
        index = bisect.bisect_right(self._segments, seq, key=lambda segment: segment.first) - 1
        return self._segments[index] if index >= 0 else None

    def _next_after(self, seq: int) -> int:
        """Returns the lowest number after `seq` that begins a segment or is in the ring; otherwise the next new one."""
        index = bisect.bisect_right(self._segments, seq, key=lambda segment: segment.first)
        first = self._segments[index].first if index < len(self._segments) else self._newest + 1
        ring = self._ring
        if ring is not None and ring.oldest > seq:
            first = min(first, ring.oldest)
        return first


class _Line(msgspec.Struct):
    line: str
