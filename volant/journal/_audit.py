"""The audit log: records, encoded once for all readers, and reading those that are no longer in memory."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import apsw
import msgspec

from volant.host import Host
from volant.model import AuditRecord
from volant.model.stored import MAX_ID

from ._events import FrameLog
from ._frames import Readers

AUDIT_EPOCH = "audit"
"""Replaces the epoch, which records do not have: their numbers continue after a restore."""

_RING_RECORDS = 1024
_RING_BYTES = 1024 * 1024
_PAGE = 1000
_MANY = 1000
"""Records are counted up to here, to choose an index."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(AuditRecord).decode


class AuditFrame(msgspec.Struct, frozen=True):
    """A record with its bytes."""

    seq: int
    record: AuditRecord
    data: bytes
    """JSON of the record."""
    sse: bytes
    """The block of the event stream, with its blank line."""

    @classmethod
    def of(cls, record: AuditRecord) -> AuditFrame:
        """Encodes a record."""
        return cls._with(record, _encode(record))

    @classmethod
    def read(cls, data: bytes) -> AuditFrame:
        """Reads stored JSON. :raises msgspec.ValidationError: it is no record."""
        return cls._with(_decode(data), data)

    @classmethod
    def _with(cls, record: AuditRecord, data: bytes) -> AuditFrame:
        return cls(record.seq, record, data, b"id: %d\nevent: AUDIT\ndata: %b\n\n" % (record.seq, data))


class AuditFilter(msgspec.Struct, frozen=True, kw_only=True):
    """A reader's filter for records; None matches any. Times count to the second."""

    caller: str | None = None
    """The name or the id of the caller."""
    project: str | None = None
    operation: str | None = None
    target: str | None = None
    request_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def wants(self, record: AuditRecord) -> bool:
        """Returns whether a record matches."""
        at = int(record.time.timestamp())
        return (
            self.caller in (None, record.caller, record.caller_id)
            and self.project in (None, record.project)
            and self.operation in (None, record.operation)
            and self.target in (None, record.target)
            and self.request_id in (None, record.request_id)
            and (self.since is None or at >= int(self.since.timestamp()))
            and (self.until is None or at < int(self.until.timestamp()))
        )

    def alternatives(self) -> list[dict[str, str]]:
        """Returns alternatives of column values: each wanted record has all values of one of them."""
        wanted = {
            column: value
            for column in ("request_id", "target", "operation", "project")
            if (value := getattr(self, column)) is not None
        }
        if self.caller is None:
            return [wanted]
        return [{column: self.caller} | wanted for column in ("caller", "caller_id")]

    @property
    def times(self) -> tuple[int, int]:
        """The range in seconds: from the first one on, and before the second one."""
        since = 0 if self.since is None else int(self.since.timestamp())
        return since, MAX_ID if self.until is None else int(self.until.timestamp())


class AuditPage(msgspec.Struct, frozen=True):
    """Some of the stored records."""

    frames: list[AuditFrame]
    oldest: int
    """The number of the oldest record that was stored when they were read."""


class AuditPages(Readers):
    """Reads records. Safe for several threads."""

    def read(self, epoch: str, after_seq: int, up_to_seq: int) -> list[AuditFrame]:
        """Returns the stored records after one number and up to another. :raises apsw.Error: the disk fails."""
        del epoch
        with self.reader() as connection:
            query = "SELECT record FROM audit WHERE seq > ? AND seq <= ? ORDER BY seq"
            return [AuditFrame.read(data) for (data,) in connection.execute(query, (after_seq, up_to_seq))]

    def find(self, wanted: AuditFilter, after: int, limit: int, newest: bool) -> AuditPage:
        """Returns up to `limit` records after a number, in order: the first of them, or the newest."""
        order = "DESC" if newest else "ASC"
        # All as of one moment, as retention removes records meanwhile.
        with self.reader() as connection, connection:
            oldest: int = connection.execute("SELECT min(seq) FROM audit").get or 1
            last = MAX_ID
            if wanted.since is not None or wanted.until is not None:
                within = connection.execute(
                    "SELECT min(seq), max(seq) FROM audit WHERE at >= ? AND at < ?", wanted.times
                )
                first, last = ((seq or 0) for seq in within.get)
                after = max(after, first - 1)
            selects: list[str] = []
            values: list[str | int] = []
            for equal in wanted.alternatives():
                rarest = min(equal, key=lambda column: _count(connection, column, equal[column]), default=None)
                # SQLite uses one index, and a plus says which one not.
                terms = [f"{'' if column == rarest else '+'}{column} = ?" for column in equal]
                terms += ["seq > ?", "seq <= ?", "+at >= ?", "+at < ?"]
                selects.append(f"SELECT seq, record FROM audit WHERE {' AND '.join(terms)}")  # noqa: S608 - our own columns
                values += (*equal.values(), after, last, *wanted.times)
            # Each has the order of its index, so SQLite merges them without reading all of any.
            query = f"{' UNION '.join(selects)} ORDER BY seq {order} LIMIT ?"
            found = [AuditFrame.read(data) for _, data in connection.execute(query, (*values, limit))]
        return AuditPage(found[::-1] if newest else found, oldest)


def _count(connection: apsw.Connection, column: str, value: str) -> int:
    """Returns how many records have this value, or `_MANY`."""
    some = f"SELECT 1 FROM audit WHERE {column} = ? LIMIT ?"  # noqa: S608 - our own columns
    count: int = connection.execute(f"SELECT count(*) FROM ({some})", (value, _MANY)).get  # noqa: S608
    return count


class AuditLog(FrameLog[AuditFrame]):
    """Holds the stored records, and publishes new ones."""

    def __init__(self, host: Host, path: Path) -> None:
        self._records = AuditPages(path)
        super().__init__(host, self._records, ring_events=_RING_RECORDS, ring_bytes=_RING_BYTES)

    async def find(self, wanted: AuditFilter, *, after: int = 0, limit: int = _PAGE, newest: bool = False) -> AuditPage:
        """Returns up to `limit` wanted records after a number, in order: the first of them, or the newest.

        :raises apsw.Error: the disk fails.
        """
        async with self._reading:
            return await self._host.threads.run(self._records.find, wanted, after, limit, newest)
