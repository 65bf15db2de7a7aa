"""The output of the workload: a ring buffer for each of its two streams, and one reader at a time.

Without a reader the oldest output is overwritten: a workload must not stop because the daemon is away. A slow reader
loses nothing: the pumps stop reading the workload's pipes when the reader is a whole ring behind, and then the kernel
blocks the workload. A reader that accepts nothing for `HOLD_BACK_S` may be dead, so it no longer blocks the workload,
and gets a gap instead.

A position counts the bytes since the agent's start. A reader that reconnects sends its positions, and gets either the
rest or a gap.

At the end of the guest the agent waits for its reader, even if that has not connected yet: the daemon begins to read a
clone's output shortly after it has sent its identity, and a short job may have ended by then.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time

from volant.model import agent

from ._http import Gone, Problem
from ._stream import LAST_CHUNK, chunk
from ._watch import Client, Wakeup

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._http import Request
    from ._stream import Stream

HOLD_BACK_S = 30.0
"""How long a reader that accepts nothing may block the workload."""
_MERGE_NS = 5_000_000
_MERGE_BYTES = 4096
_MAX_CHUNKS = 8192
_BATCH_BYTES = 256 * 1024
_LEAVE_S = 2.0
_CHECK_S = 1.0
_NAMES = {"stdout": agent.FRAME_STDOUT, "stderr": agent.FRAME_STDERR}
_GAPS = {agent.FRAME_STDOUT: agent.FRAME_STDOUT_GAP, agent.FRAME_STDERR: agent.FRAME_STDERR_GAP}


class _Ring:
    """The last bytes of one stream, in pieces with the times at which they were read."""

    __slots__ = ("end", "pieces", "start")

    def __init__(self) -> None:
        # A list and not a deque, which can't be searched by position.
        self.pieces: list[tuple[int, int, bytes]] = []
        self.start = 0
        self.end = 0

    def append(self, data: bytes, now_ns: int) -> None:
        if self.pieces:
            position, time_ns, last = self.pieces[-1]
            # Else a program that writes byte by byte costs a hundred bytes of memory for each.
            if now_ns - time_ns < _MERGE_NS and len(last) + len(data) <= _MERGE_BYTES:
                self.pieces[-1] = (position, time_ns, last + data)
                self.end += len(data)
                self._evict()
                return
        self.pieces.append((self.end, now_ns, data))
        self.end += len(data)
        self._evict()

    def _evict(self) -> None:
        drop = 0
        while self.end - self.start > agent.RING_BYTES or len(self.pieces) - drop > _MAX_CHUNKS:
            position, _, data = self.pieces[drop]
            self.start = position + len(data)
            drop += 1
        if drop:
            del self.pieces[:drop]

    def after(self, position: int) -> tuple[int, int, bytes] | None:
        """Returns position, time and bytes of the first piece after `position`; None if there is none."""
        low, high = 0, len(self.pieces)
        while low < high:
            middle = (low + high) // 2
            if self.pieces[middle][0] + len(self.pieces[middle][2]) <= position:
                low = middle + 1
            else:
                high = middle
        if low == len(self.pieces):
            return None
        start, time_ns, data = self.pieces[low]
        skip = max(0, position - start)
        return start + skip, time_ns, data[skip : skip + agent.MAX_FRAME_BYTES]

    def is_full_for(self, position: int, count: int) -> bool:
        """Returns whether appending `count` bytes would overwrite bytes after `position`."""
        if self.end + count - max(position, self.start) > agent.RING_BYTES:
            return True
        return len(self.pieces) >= _MAX_CHUNKS and self.pieces[0][0] + len(self.pieces[0][2]) > position


class _Reader:
    def __init__(self, positions: dict[int, int]) -> None:
        self.positions = positions
        self.wakeup = Wakeup()
        self.stalled_at: float | None = None
        """The time since which it has accepted none of the pending output."""
        self.displaced = False


class Output:
    """The ring buffers of the workload's output, and their reader."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rings = {kind: _Ring() for kind in _NAMES.values()}
        self._reader: _Reader | None = None
        self._sent = dict.fromkeys(_NAMES.values(), 0)
        """The position up to which each stream was sent to the last reader."""
        self._finished = False
        # Not os.urandom, which may wait for entropy early in a boot.
        self.id = f"{time.time_ns():x}-{os.getpid():x}"

    def rename(self, identifier: str) -> None:
        """Changes the id, in a clone of a guest with the old id, before the first read."""
        self.id = identifier

    def write(self, kind: int, data: bytes) -> None:
        """Appends output of the workload; blocks while the reader is a ring behind."""
        with self._changed:
            while True:
                reader = self._reader
                if reader is None or self._finished:
                    break
                if not self._rings[kind].is_full_for(reader.positions[kind], len(data)):
                    break
                stalled_at = reader.stalled_at
                if stalled_at is not None and time.monotonic() - stalled_at >= HOLD_BACK_S:
                    break
                self._changed.wait(_CHECK_S)
            self._rings[kind].append(data, time.time_ns())
            if self._reader is not None:
                self._reader.wakeup.wake()

    def finish(self, timeout_s: float) -> None:
        """Ends the output, and waits until a reader has received all of it and has disconnected."""
        end = time.monotonic() + timeout_s
        with self._changed:
            self._finished = True
            self._changed.notify_all()
            if self._reader is not None:
                self._reader.wakeup.wake()
            while (self._reader is not None or self._is_unread()) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _is_unread(self) -> bool:
        return any(ring.end > self._sent[kind] for kind, ring in self._rings.items())

    def statistics(self) -> dict[str, int]:
        """Returns the number of bytes of each stream, in total and stored."""
        with self._changed:
            out, err = self._rings[agent.FRAME_STDOUT], self._rings[agent.FRAME_STDERR]
            return {
                "stdout_bytes": out.end,
                "stdout_kept": out.end - out.start,
                "stderr_bytes": err.end,
                "stderr_kept": err.end - err.start,
            }

    def serve(self, stream: Stream, request: Request) -> None:
        """Answers `GET /v1/daemon/logs`.

        :raises Problem: 400, a position is malformed
        :raises Gone: the client disconnected
        """
        reader = _Reader(parse_positions(request.query))
        with self._changed:
            before = self._reader
            self._reader = reader
            for kind, ring in self._rings.items():
                # A position of the agent before this one: begin with the oldest.
                if reader.positions[kind] > ring.end:
                    reader.positions[kind] = 0
            if before is not None:
                before.displaced = True
                before.wakeup.wake()
            self._changed.notify_all()
        try:
            headers = [("Content-Type", agent.LOG_CONTENT_TYPE), (agent.LOG_ID_HEADER, self.id)]
            stream.start(200, headers, chunked=True)
            self._stream(reader, Client(stream.sock))
        finally:
            with self._changed:
                if self._reader is reader:
                    self._reader = None
                self._changed.notify_all()
                reader.wakeup.close()
                reader.displaced = True

    def _stream(self, reader: _Reader, client: Client) -> None:
        while True:
            reader.wakeup.clear()
            batch, finished = self._take(reader)
            if reader.displaced:
                return
            if batch:
                self._send(reader, client, memoryview(chunk(batch)))
                with self._changed:
                    if not reader.displaced:
                        self._sent = dict(reader.positions)
            elif finished:
                break
            else:
                client.wait({reader.wakeup.fd: select.POLLIN}, None)
        self._send(reader, client, memoryview(LAST_CHUNK))
        # The guest is about to power off and loses what is not delivered, so wait until the client closes.
        try:
            client.sock.shutdown(socket.SHUT_WR)
            client.wait({}, _LEAVE_S)
        except (Gone, OSError):
            pass

    def _take(self, reader: _Reader) -> tuple[bytes, bool]:
        """Returns the next frames, oldest of both streams first, and whether the output has ended."""
        frames: list[bytes] = []
        size = 0
        with self._changed:
            while size < _BATCH_BYTES:
                best: tuple[int, int, int, bytes] | None = None
                for kind, ring in self._rings.items():
                    position = reader.positions[kind]
                    if position < ring.start:
                        lost = ring.start - position
                        frames.append(agent.encode_gap(_GAPS[kind], position, time.time_ns(), lost))
                        reader.positions[kind] = position = ring.start
                    piece = ring.after(position)
                    if piece is not None and (best is None or piece[1] < best[1]):
                        best = (kind, piece[1], piece[0], piece[2])
                if best is None:
                    break
                kind, time_ns, position, data = best
                frames.append(agent.encode_log_frame(kind, position, time_ns, data))
                reader.positions[kind] = position + len(data)
                size += len(data)
            if size:
                self._changed.notify_all()
            return b"".join(frames), self._finished

    def _send(self, reader: _Reader, client: Client, data: memoryview) -> None:
        while data:
            sent = client.send_some(data)
            if sent:
                reader.stalled_at = None
                data = data[sent:]
                continue
            if reader.stalled_at is None:
                reader.stalled_at = time.monotonic()
            client.wait({reader.wakeup.fd: select.POLLIN} if not reader.displaced else {}, None, writable=True)
            if reader.displaced:
                raise Gone
            reader.wakeup.clear()


def parse_positions(query: str) -> dict[int, int]:
    """Returns the positions at which a reader begins, by stream. :raises Problem: 400, the query is malformed."""
    positions = dict.fromkeys(_NAMES.values(), 0)
    for part in query.split("&") if query else ():
        name, _, text = part.partition("=")
        if name not in _NAMES:
            raise Problem(400, f"unknown query parameter {name[:80]!r}", field=name[:80])
        if not text.isascii() or not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
            raise Problem(400, f"{name} is not a position", field=name)
        positions[_NAMES[name]] = int(text)
    return positions
