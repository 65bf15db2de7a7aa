"""Events, encoded once for all readers, and reading those that are no longer in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import apsw
import msgspec

from volant.model import Event, EventType

from ._schema import open_reader

T = TypeVar("T")


class Readers:
    """Connections to the database that can't write. Safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[apsw.Connection] = []

    @contextmanager
    def reader(self) -> Iterator[apsw.Connection]:
        """Has a connection for the length of a block. :raises apsw.Error: the disk fails."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = open_reader(self._path)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class EventPages(Readers):
    """Reads events. Safe for several threads."""

    def read(self, epoch: str, after_seq: int, up_to_seq: int) -> list[EventFrame]:
        """Returns the stored events after one number and up to another.

        :raises apsw.Error: the disk fails.
        """
        with self.reader() as connection:
            found = connection.execute(
                "SELECT seq, frame FROM events WHERE seq > ? AND seq <= ? ORDER BY seq", (after_seq, up_to_seq)
            )
            return [EventFrame.read(epoch, seq, frame) for seq, frame in found]

    def fold(self, types: Collection[EventType], up_to_seq: int, use: Callable[[Iterator[Event]], T]) -> T:
        """Calls `use` with all stored events of some types up to a number, in order, and returns its result.

        Reads the whole table, as there is no index: a million events, a quarter of them of these types, take some 0.8 s
        of processor time.

        :raises apsw.Error: the disk fails.
        :raises msgspec.ValidationError: one is no event.
        """
        marks = ", ".join("?" * len(types))
        query = f"SELECT frame FROM events WHERE seq <= ? AND type IN ({marks}) ORDER BY seq"  # noqa: S608 - only marks
        with self.reader() as connection:
            return use(_decode(frame) for (frame,) in connection.execute(query, (up_to_seq, *types)))


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class EventFrame(msgspec.Struct, frozen=True):
    """An event with its bytes. `event` has what filters need: name, type, labels, vm_id."""

    seq: int
    event: Event
    data: bytes
    """JSON of the event."""
    sse: bytes
    """The block of the event stream, with its blank line."""

    @property
    def size(self) -> int:
        """The bytes that it occupies, roughly."""
        return len(self.data) + len(self.sse) + _OVERHEAD

    @classmethod
    def of(cls, seq: int, event: Event) -> EventFrame:
        """Encode an event."""
        return cls._with(seq, event, _encode(event))

    @classmethod
    def read(cls, epoch: str, seq: int, data: bytes) -> EventFrame:
        """Reads stored JSON. In a restored database it still has the old epoch.

        :raises msgspec.ValidationError: it is no event.
        """
        event = _decode(data)
        event_id = f"{epoch}-{seq}"
        # A line break in the JSON would begin another field of the stream.
        if event.id != event_id or b"\n" in data or b"\r" in data:
            return cls.of(seq, msgspec.structs.replace(event, id=event_id))
        return cls._with(seq, event, data)

    @classmethod
    def _with(cls, seq: int, event: Event, data: bytes) -> EventFrame:
        # Encoded JSON has no raw line break, so it fits into one data line.
        return cls(seq, event, data, f"id: {event.id}\nevent: {event.type}\ndata: ".encode() + data + b"\n\n")


_OVERHEAD = 600
"""The decoded event and the objects round it."""
