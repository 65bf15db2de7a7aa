"""The connection that writes the database. Everything here blocks, and runs in a worker thread, one call at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal

import apsw
import msgspec

from volant.host import Host
from volant.model import ApiKey, Drain, VmRow
from volant.model.stored import (
    MAX_ID,
)

from . import _operations as op
from ._audit import AuditFrame
from ._errors import BadRow, DatabaseRefused, JournalBroken, naming
from ._frames import EventFrame
from ._named import KINDS, Named
from ._responses import StoredResponse
from ._rows import (
    check_ids_differ,
    check_tags_differ,
    read_drain,
    read_epoch,
    read_key,
    read_named,
    read_response,
    read_vm,
)
from ._schema import BUSY_TIMEOUT_MS, open_writer, transaction

# Reserved disk space for the next start.
#
# SQLite keeps an index of its log in a file, and can't even read without it. So a file of some size lies beside the
# database, and is removed when the database can't be opened for lack of space. While it is missing, the journal refuses
# changes; it is created again as soon as there is space.


RESERVE_BYTES = 1024 * 1024
"""The index of a log of 32 MiB takes 64 KiB, and a migration some pages."""


class Reserve:
    """The reserve of one database. All calls block on the disk."""

    def __init__(self, host: Host, database: Path) -> None:
        self._host = host
        self.path = database.with_name(f"{database.name}-reserve")

    def lacks_space(self, error: apsw.Error) -> bool:
        """Returns whether the error means a full disk. SQLite does not always say so."""
        if isinstance(error, apsw.FullError):
            return True
        return isinstance(error, apsw.IOError | apsw.CantOpenError) and self._free() < RESERVE_BYTES

    def keep(self) -> bool:
        """Creates it if it is missing. Returns whether it is there. Some space must stay free besides."""
        if self._host.files.exists(self.path):
            return True
        try:
            if self._free() < 2 * RESERVE_BYTES:
                return False
            self._host.disk.reserve(self.path, RESERVE_BYTES)
        except OSError:
            return False
        return True

    def release(self) -> bool:
        """Removes it. Returns whether it was there."""
        was_there = self._host.files.exists(self.path)
        self._host.files.unlink(self.path)
        return was_there

    def _free(self) -> int:
        return self._host.disk.free(self.path.parent)


_encode = msgspec.json.Encoder().encode

_VACUUM_PAGES = 128
"""Half a megabyte: a commit waits for one such piece at most."""
_SLACK_PAGES = 256
_LOG_BYTES = 32 * 1024 * 1024
_LOG_PATIENCE_MS = 250
_MAX_STATE_BYTES = 2**30
"""Maximum of each table, as JSON. A thousand VMs with the largest manifests have a quarter of it."""
_COLUMNS = (
    ("vms", "row"),
    ("named", "value"),
    ("keys", "key"),
    ("responses", "result"),
)


class Loaded(msgspec.Struct, frozen=True):
    """The state that the journal has in memory."""

    epoch: str
    rows: list[VmRow]
    named: list[Named]
    keys: list[ApiKey]
    keys_required: bool
    responses: list[StoredResponse]
    drain: Drain | None
    last_vm_id: int
    oldest_seq: int
    """The number of the oldest stored event; one more than `newest_seq` if there is none."""
    newest_seq: int
    oldest_at: int | None
    """The time of the oldest event in seconds since 1970; None when no event can expire."""
    unpublished: list[EventFrame]
    """The events after `published_seq`, which readers have not received."""
    audit: LoadedAudit


class LoadedAudit(msgspec.Struct, frozen=True):
    """The loaded part of the audit log; see the same members of `Loaded`."""

    oldest_seq: int
    newest_seq: int
    oldest_at: int | None
    unpublished: list[AuditFrame]


Numbered = Literal["events", "audit"]
"""Tables whose rows have numbers without holes, and are removed by age and count."""


class Trimmed(msgspec.Struct, frozen=True):
    """The rest of the events or records. `more`: further ones may have expired."""

    oldest_seq: int
    oldest_at: int | None
    more: bool


class Database:
    """The connection that writes."""

    def __init__(self, connection: apsw.Connection, reserve: Reserve | None = None) -> None:
        self._connection = connection
        self._reserve = reserve
        self._is_shorter = False
        """The log has a shorter version of the file."""

    @classmethod
    def open(cls, host: Host, path: Path) -> Database:
        """Opens it, if need be with the space that is reserved for it.

        :raises DatabaseRefused: see `open_writer`. :raises apsw.Error: the disk fails.
        """
        reserve = Reserve(host, path)
        try:
            connection = open_writer(host, path)
        except apsw.Error as error:
            if not reserve.lacks_space(error):
                raise
            if not reserve.release():
                raise apsw.FullError("the disk is full") from error
            connection = open_writer(host, path)
        return cls(connection, reserve)

    def keep_reserve(self) -> bool:
        """Reserve space for the next start. Returns whether it is reserved."""
        return self._reserve is None or self._reserve.keep()

    def close(self) -> None:
        self._connection.close()

    def load(self, published_seq: int | None, published_record: int | None = None) -> Loaded:
        """Reads the state. `published_seq` and `published_record` are the last event and record that readers have got,
        None before there were readers.

        :raises BadRow: a row can't be read, or volantd can't have written it.
        """
        # A thread of a previous incarnation may still commit. Under the write lock it is done.
        with self.transaction():
            get = self._connection.execute
            epoch = read_epoch(get("SELECT value FROM meta WHERE key = 'epoch'").get)
            drained = get("SELECT value FROM meta WHERE key = 'drain'").get
            sequence = get("SELECT seq FROM sqlite_sequence WHERE name = 'vms'").get
            oldest, newest = get("SELECT min(seq), max(seq) FROM events").get
            newest = newest or 0
            if not 0 <= (sequence or 0) <= MAX_ID:
                raise BadRow(f"table sqlite_sequence, row 'vms': seq is {sequence}, and at most {MAX_ID} is possible")
            oldest_at = self._oldest_at("events", newest)
            audit = self._load_audit(published_record)
            unpublished = [] if published_seq is None else self._after(epoch, published_seq)
            self._check_size()
            vms = get("SELECT id, project, name, revision, row FROM vms ORDER BY id")
            rows = [read_vm(*columns) for columns in vms]
            named = [read_named(*columns) for columns in get("SELECT kind, project, name, value FROM named")]
            keys = [read_key(*columns) for columns in get("SELECT digest, key FROM keys")]
            required = get("SELECT value FROM meta WHERE key = 'keys_required'").get
            responses = [
                read_response(*columns) for columns in get("SELECT scope, request, at, result, project FROM responses")
            ]
            drain = None if drained is None else read_drain(drained)
            check_ids_differ(named)
            check_tags_differ(rows)
        oldest_seq = oldest or newest + 1
        return Loaded(
            epoch,
            rows,
            named,
            keys,
            required is not None or bool(keys),
            responses,
            drain,
            sequence or 0,
            oldest_seq,
            newest,
            oldest_at,
            unpublished,
            audit,
        )

    def _load_audit(self, published: int | None) -> LoadedAudit:
        get = self._connection.execute
        oldest, newest = get("SELECT min(seq), max(seq) FROM audit").get
        newest = newest or 0
        if not 0 <= newest <= MAX_ID:
            raise BadRow(f"table audit: seq is {newest}, and at most {MAX_ID} is possible")
        unpublished = []
        if published is not None:
            for seq, data in get("SELECT seq, record FROM audit WHERE seq > ? ORDER BY seq", (published,)):
                with naming("audit", seq):
                    unpublished.append(AuditFrame.read(data))
        return LoadedAudit(oldest or newest + 1, newest, self._oldest_at("audit", newest), unpublished)

    def _check_size(self) -> None:
        """Checks the size of the tables. :raises DatabaseRefused: their rows would take all memory."""
        for table, column in _COLUMNS:
            query = f"SELECT total(length({column})) FROM {table}"  # noqa: S608 - our own names
            total = self._connection.execute(query).get
            if total > _MAX_STATE_BYTES:
                raise DatabaseRefused(
                    f"the rows of table {table} take {int(total) // 2**20} MiB, at most {_MAX_STATE_BYTES // 2**20} "
                    "are possible"
                )

    def write(self, operations: Sequence[op.Operation]) -> None:
        """Writes one transaction. All of it is on the disk when this returns, or none of it will be.

        :raises JournalBroken: a row on the disk has another revision than expected.
        :raises apsw.Error: nothing was written.
        """
        with self.transaction():
            for operation in operations:
                self.execute(operation)

    def trim(self, table: Numbered, cutoff_at: int, below_seq: int, limit: int) -> Trimmed:
        """Deletes up to `limit` of the oldest events or records: those from before `cutoff_at` and those below
        `below_seq`.

        The newest one stays, as the numbers continue from it. :raises apsw.Error: nothing was deleted.
        """
        get = self._connection.execute
        with self.transaction():
            newest = get(f"SELECT max(seq) FROM {table}").get  # noqa: S608 - our own name
            if newest is None:
                return Trimmed(1, None, False)
            oldest = newest
            dropped = 0
            for seq, at in get(f"SELECT seq, at FROM {table} ORDER BY seq LIMIT ?", (limit + 1,)):  # noqa: S608
                if seq >= newest or dropped == limit or (at >= cutoff_at and seq >= below_seq):
                    oldest = seq
                    break
                dropped += 1
            if dropped:
                get(f"DELETE FROM {table} WHERE seq < ?", (oldest,))  # noqa: S608
            oldest_at = self._oldest_at(table, newest)
        return Trimmed(oldest, oldest_at, dropped == limit)

    def compact(self) -> bool:
        """Returns a piece of unused space to the disk. Returns whether there is more.

        :raises apsw.Error: it can't be returned now.
        """
        connection = self._connection
        unused = connection.pragma("freelist_count")
        if unused > _SLACK_PAGES:
            for _ in connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})"):
                pass
            self._is_shorter = True
            return True
        # The file becomes shorter when the log is moved into it. That does not wait for readers, unless they have kept
        # the log from being emptied for long.
        if self._log_bytes() <= _LOG_BYTES:
            if self._is_shorter:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").get  # noqa: B018 - runs it
                self._is_shorter = False
            return False
        connection.set_busy_timeout(_LOG_PATIENCE_MS)
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").get  # noqa: B018 - runs it
        finally:
            connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        return False

    def _log_bytes(self) -> int:
        try:
            return Path(self._connection.filename_wal).stat().st_size
        except FileNotFoundError:
            return 0

    def _oldest_at(self, table: Numbered, newest: int) -> int | None:
        query = f"SELECT at FROM {table} WHERE seq < ? ORDER BY seq LIMIT 1"  # noqa: S608
        at: int | None = self._connection.execute(query, (newest,)).get
        return at

    def _after(self, epoch: str, seq: int) -> list[EventFrame]:
        found = self._connection.execute("SELECT seq, frame FROM events WHERE seq > ? ORDER BY seq", (seq,))
        return [EventFrame.read(epoch, seq, frame) for seq, frame in found]

    def transaction(self) -> AbstractContextManager[None]:
        """Commits what is written in the block, or none of it."""
        return transaction(self._connection)

    def execute(self, operation: op.Operation) -> None:
        """Carry out an operation. Must be in a transaction."""
        execute = self._connection.execute
        match operation:
            case op.PutRow(row, None):
                execute(
                    "INSERT INTO vms VALUES (?, ?, ?, ?, ?)",
                    (row.id, row.project, row.name, row.revision, _encode(row)),
                )
            case op.PutRow(row, after):
                execute(
                    "UPDATE vms SET revision = ?, row = ? WHERE id = ? AND revision = ?",
                    (row.revision, _encode(row), row.id, after),
                )
                self._expect_one(row.id)
            case op.DropRow(vm_id, after):
                execute("DELETE FROM vms WHERE id = ? AND revision = ?", (vm_id, after))
                self._expect_one(vm_id)
            case op.AddEvent(frame):
                event = frame.event
                execute(
                    "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)",
                    (
                        frame.seq,
                        int(event.timestamp.timestamp()),
                        event.vm_id,
                        event.name,
                        event.type.value,
                        frame.data,
                    ),
                )
            case op.AddRecord(frame):
                record = frame.record
                execute(
                    "INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        record.seq,
                        int(record.time.timestamp()),
                        record.caller,
                        record.caller_id,
                        record.project,
                        record.operation,
                        record.target,
                        record.request_id,
                        frame.data,
                    ),
                )
            case op.Put(named):
                execute("INSERT OR REPLACE INTO named VALUES (?, ?, ?, ?)", (*_place_of(named), _encode(named)))
            case op.Drop(named):
                execute("DELETE FROM named WHERE kind = ? AND project = ? AND name = ?", _place_of(named))
            case op.PutKey(key):
                execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key.digest, _encode(key)))
            case op.DropKey(digest):
                execute("DELETE FROM keys WHERE digest = ?", (digest,))
            case op.RequireKeys():
                execute("INSERT OR REPLACE INTO meta VALUES ('keys_required', '1')")
            case op.PutResponse(StoredResponse(key, at, encoded)):
                execute(
                    "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?)",
                    (key.scope, key.request, at, encoded, key.project),
                )
            case op.PutDrain(None):
                execute("DELETE FROM meta WHERE key = 'drain'")
            case op.PutDrain(drain):
                execute("INSERT OR REPLACE INTO meta VALUES ('drain', ?)", (_encode(drain).decode(),))
            case op.DropResponse(scope):
                execute("DELETE FROM responses WHERE scope = ?", (scope,))

    def _expect_one(self, vm_id: int) -> None:
        if self._connection.changes() != 1:
            raise JournalBroken(f"the row of VM {vm_id} on the disk is not the one that was committed last")


def _place_of(named: Named) -> tuple[str, str, str]:
    return (KINDS[type(named)].word, *named.key)
