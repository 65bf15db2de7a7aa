"""What the journal does on the disk. Everything here blocks, and runs in a worker thread, one call at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import apsw
import msgspec

from volant.host import Host
from volant.model import Drain, Manifest, Network, Snapshot, VmRow
from volant.model.stored import (
    MAX_ID,
    BadMember,
    check_stored_epoch,
    check_stored_network,
    check_stored_plugin,
    check_stored_snapshot,
    check_stored_time,
    check_stored_vm,
)

from ._acknowledged import Acknowledged, AcknowledgedFile
from ._errors import BadRow, DatabaseRefused, JournalBroken, naming, shown
from ._frames import EventFrame
from ._operations import (
    AddEvent,
    DropNetwork,
    DropPlugin,
    DropResponse,
    DropRow,
    DropSnapshot,
    Operation,
    PutDrain,
    PutNetwork,
    PutPlugin,
    PutResponse,
    PutRow,
    PutSnapshot,
)
from ._projection import Plugin
from ._reserve import Reserve
from ._responses import IdempotencyKey, StoredResponse
from ._schema import BUSY_TIMEOUT_MS, open_reader, open_writer

_encode = msgspec.json.Encoder().encode
_decode_row = msgspec.json.Decoder(VmRow).decode
_decode_manifest = msgspec.json.Decoder(Manifest).decode
_decode_drain = msgspec.json.Decoder(Drain).decode
_decode_snapshot = msgspec.json.Decoder(Snapshot).decode
_decode_network = msgspec.json.Decoder(Network).decode

_logger = logging.getLogger("volant.journal")

_VACUUM_PAGES = 128
"""Half a megabyte: a commit waits for one bite at most."""
_SLACK_PAGES = 256
_LOG_BYTES = 32 * 1024 * 1024
_LOG_PATIENCE_MS = 250
_MAX_STATE_BYTES = 2**30
"""Of all that is kept in memory, as JSON: a thousand VMs with the largest manifests have a quarter of it."""


class Loaded(msgspec.Struct, frozen=True):
    """Everything that the journal keeps in memory."""

    epoch: str
    rows: list[VmRow]
    plugins: list[Plugin]
    snapshots: list[Snapshot]
    networks: list[Network]
    responses: list[StoredResponse]
    drain: Drain | None
    last_vm_id: int
    oldest_seq: int
    """Of the events that are kept; one more than `newest_seq` when there is none."""
    newest_seq: int
    oldest_at: int | None
    """When the oldest event was, in seconds since 1970; None when there is none that could ever go."""
    untold: list[EventFrame]
    """The events after `told_seq`."""


class Trimmed(msgspec.Struct, frozen=True):
    """What is left of the events. `more`: there may be others to drop."""

    oldest_seq: int
    oldest_at: int | None
    more: bool


class Database:
    """The one connection that writes."""

    def __init__(self, connection: apsw.Connection, reserve: Reserve | None = None) -> None:
        self._connection = connection
        self._reserve = reserve
        self._file: AcknowledgedFile | None = None
        self._at: Acknowledged | None = None
        """How far it is, once it is known."""
        self._changes = 0
        self._is_shorter = False
        """By what stands in the log and not yet in the file."""

    @classmethod
    def open(cls, host: Host, path: Path) -> Database:
        """What keeps room for it is given up where there is no other.

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
        """Have room kept for the next start; whether there is."""
        return self._reserve is None or self._reserve.keep()

    def close(self) -> None:
        self._connection.close()
        if self._file is not None:
            self._file.close()

    def compare(self, host: Host, loaded: Loaded, new_epoch: str) -> tuple[str, str | None]:
        """Whether it is as far as was acknowledged last: its epoch from now on, and what is lost. It is a new one where
        something is. From now on each transaction says how far it is.

        :raises OSError, apsw.Error: the disk fails.
        """
        file = AcknowledgedFile(host, Path(self._connection.filename))
        before = file.open()
        self._file = file
        found = Acknowledged(loaded.epoch, loaded.newest_seq, self._changes, loaded.last_vm_id)
        lost = None
        if before is not None and before.epoch != found.epoch:
            lost = f"events up to {before.epoch}-{before.seq} were acknowledged, and it has others, of {found.epoch}"
        elif before is not None and (missing := before.missing(found)) is not None:
            lost = f"it lacks {missing} that were acknowledged, and ends with event {found.epoch}-{found.seq}"
            with self.transaction():
                self._connection.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (new_epoch,))
            found = msgspec.structs.replace(found, epoch=new_epoch)
        if before is not None:
            # No id is given out again, also of those that are lost.
            found = msgspec.structs.replace(found, last_vm_id=max(found.last_vm_id, before.last_vm_id))
        self._at = found
        if before != found:
            file.write(found)
        return found.epoch, lost

    @property
    def last_vm_id(self) -> int:
        """The highest id that was ever given out, as far as is known."""
        return self._at.last_vm_id if self._at is not None else 0

    @property
    def is_acknowledged(self) -> bool:
        """Whether the disk has what the file says of it."""
        return self._file is None or self._file.is_synced

    def sync_acknowledged(self) -> None:
        """While others write. :raises OSError: the disk does not take it."""
        if self._file is not None:
            self._file.sync()

    def _acknowledge(self, operations: Sequence[Operation]) -> None:
        if self._at is None or self._file is None:
            return
        seq, last_vm_id = self._at.seq, self._at.last_vm_id
        for operation in operations:
            if isinstance(operation, AddEvent):
                seq = operation.frame.seq
            elif isinstance(operation, PutRow):
                last_vm_id = max(last_vm_id, operation.row.id)
        self._at = Acknowledged(self._at.epoch, seq, self._changes, last_vm_id)
        try:
            self._file.write(self._at)
        except OSError as error:
            # What is written is written; only a loss of it would not show.
            _logger.warning("how far the database is can't be noted: %s", error)

    def load(self, told_seq: int | None) -> Loaded:
        """Read the state. `told_seq` is the last event that readers have had, None when there were no readers yet.

        :raises BadRow: one can't be understood, or this daemon can't have written it.
        """
        # A commit of a predecessor may still be under way in its thread. Under the write lock it is over.
        with self.transaction():
            get = self._connection.execute
            epoch = _epoch(get("SELECT value FROM meta WHERE key = 'epoch'").get)
            drained = get("SELECT value FROM meta WHERE key = 'drain'").get
            self._changes = _count(get("SELECT value FROM meta WHERE key = 'changes'").get)
            sequence = get("SELECT seq FROM sqlite_sequence WHERE name = 'vms'").get
            oldest, newest = get("SELECT min(seq), max(seq) FROM events").get
            newest = newest or 0
            if not 0 <= (sequence or 0) <= MAX_ID:
                raise BadRow(f"table sqlite_sequence, row 'vms': seq is {sequence}, and at most {MAX_ID} is possible")
            oldest_at = self._oldest_at(newest)
            untold = [] if told_seq is None else self._after(epoch, told_seq)
            self._check_size()
            rows = [_vm(*columns) for columns in get("SELECT id, name, revision, row FROM vms ORDER BY id")]
            plugins = [_plugin(*columns) for columns in get("SELECT name, manifest, enabled, created_at FROM plugins")]
            snapshots = [_snapshot(*columns) for columns in get("SELECT id, name, snapshot FROM snapshots")]
            networks = [_network(*columns) for columns in get("SELECT name, network FROM networks")]
            responses = [_response(*columns) for columns in get("SELECT scope, request, at, result FROM responses")]
            drain = None if drained is None else _drain(drained)
            _check_tags(rows)
        oldest_seq = oldest or newest + 1
        return Loaded(
            epoch,
            rows,
            plugins,
            snapshots,
            networks,
            responses,
            drain,
            sequence or 0,
            oldest_seq,
            newest,
            oldest_at,
            untold,
        )

    def _check_size(self) -> None:
        """:raises DatabaseRefused: its rows would take all memory."""
        for table, column in _COLUMNS:
            query = f"SELECT total(length({column})) FROM {table}"  # noqa: S608 - our own names
            total = self._connection.execute(query).get
            if total > _MAX_STATE_BYTES:
                raise DatabaseRefused(
                    f"the rows of table {table} take {int(total) // 2**20} MiB, at most {_MAX_STATE_BYTES // 2**20} "
                    "are possible"
                )

    def write(self, operations: Sequence[Operation]) -> None:
        """One transaction. All of it is on the disk when this returns, or none of it will be.

        :raises JournalBroken: a row on the disk is not at the revision that it should be at.
        :raises apsw.Error: nothing was written.
        """
        with self.transaction():
            for operation in operations:
                self.execute(operation)
            if not any(isinstance(operation, AddEvent) for operation in operations):
                # Events are numbered; changes without one are counted, so that the loss of one shows.
                self._changes += 1
                self._connection.execute("INSERT OR REPLACE INTO meta VALUES ('changes', ?)", (str(self._changes),))
        self._acknowledge(operations)

    def trim(self, cutoff_at: int, below_seq: int, limit: int) -> Trimmed:
        """Drop up to `limit` of the oldest events: those from before `cutoff_at` and those below `below_seq`.

        Never the newest one, as the numbers go on from it. :raises apsw.Error: nothing was dropped.
        """
        get = self._connection.execute
        with self.transaction():
            newest = get("SELECT max(seq) FROM events").get
            if newest is None:
                return Trimmed(1, None, False)
            oldest = newest
            dropped = 0
            for seq, at in get("SELECT seq, at FROM events ORDER BY seq LIMIT ?", (limit + 1,)):
                if seq >= newest or dropped == limit or (at >= cutoff_at and seq >= below_seq):
                    oldest = seq
                    break
                dropped += 1
            if dropped:
                get("DELETE FROM events WHERE seq < ?", (oldest,))
            oldest_at = self._oldest_at(newest)
        return Trimmed(oldest, oldest_at, dropped == limit)

    def compact(self) -> bool:
        """Give a bite of unused space back to the disk; whether there is more.

        :raises apsw.Error: it can't be given back now; nothing is lost by that.
        """
        connection = self._connection
        unused = connection.pragma("freelist_count")
        if unused > _SLACK_PAGES:
            for _ in connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})"):
                pass
            self._is_shorter = True
            return True
        # The file becomes shorter when the log has been moved into it. Readers that are in the middle of something are
        # not waited for, unless so many have been there for so long that the log was never empty.
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

    def _oldest_at(self, newest: int) -> int | None:
        at: int | None = self._connection.execute(
            "SELECT at FROM events WHERE seq < ? ORDER BY seq LIMIT 1", (newest,)
        ).get
        return at

    def _after(self, epoch: str, seq: int) -> list[EventFrame]:
        found = self._connection.execute("SELECT seq, frame FROM events WHERE seq > ? ORDER BY seq", (seq,))
        return [EventFrame.read(epoch, seq, frame) for seq, frame in found]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written in the block is on the disk after it, or none of it."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # A full disk may have ended the transaction already.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def execute(self, operation: Operation) -> None:
        """Do it, in a transaction."""
        execute = self._connection.execute
        match operation:
            case PutRow(row, None):
                execute("INSERT INTO vms VALUES (?, ?, ?, ?)", (row.id, row.name, row.revision, _encode(row)))
            case PutRow(row, after):
                execute(
                    "UPDATE vms SET revision = ?, row = ? WHERE id = ? AND revision = ?",
                    (row.revision, _encode(row), row.id, after),
                )
                self._expect_one(row.id)
            case DropRow(vm_id, after):
                execute("DELETE FROM vms WHERE id = ? AND revision = ?", (vm_id, after))
                self._expect_one(vm_id)
            case AddEvent(frame):
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
            case PutPlugin(plugin):
                assert plugin.created_at is not None
                execute(
                    "INSERT OR REPLACE INTO plugins VALUES (?, ?, ?, ?)",
                    (plugin.name, plugin.enabled, plugin.created_at.isoformat(), _encode(plugin.manifest)),
                )
            case DropPlugin(name):
                execute("DELETE FROM plugins WHERE name = ?", (name,))
            case PutSnapshot(snapshot):
                execute(
                    "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?)",
                    (snapshot.id, snapshot.name, _encode(snapshot)),
                )
            case DropSnapshot(snapshot_id):
                execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
            case PutNetwork(network):
                execute("INSERT OR REPLACE INTO networks VALUES (?, ?)", (network.name, _encode(network)))
            case DropNetwork(name):
                execute("DELETE FROM networks WHERE name = ?", (name,))
            case PutResponse(StoredResponse(key, at, encoded)):
                execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?)", (key.scope, key.request, at, encoded))
            case PutDrain(None):
                execute("DELETE FROM meta WHERE key = 'drain'")
            case PutDrain(drain):
                execute("INSERT OR REPLACE INTO meta VALUES ('drain', ?)", (_encode(drain).decode(),))
            case DropResponse(scope):
                execute("DELETE FROM responses WHERE scope = ?", (scope,))

    def _expect_one(self, vm_id: int) -> None:
        if self._connection.changes() != 1:
            raise JournalBroken(f"the row of VM {vm_id} on the disk is not the one that was committed last")


_COLUMNS = (
    ("vms", "row"),
    ("plugins", "manifest"),
    ("snapshots", "snapshot"),
    ("networks", "network"),
    ("responses", "result"),
)


def _same(**columns: tuple[object, object]) -> None:
    """:raises BadMember: a member says something else than the column of that name."""
    for name, (column, member) in columns.items():
        if column != member:
            raise BadMember(name, member, f"and its column says {shown(column)}")


def _vm(vm_id: int, name: str, revision: int, data: bytes) -> VmRow:
    with naming("vms", vm_id):
        row = _decode_row(data)
        _same(id=(vm_id, row.id), name=(name, row.name), revision=(revision, row.revision))
        check_stored_vm(row)
        return row


def _plugin(name: str, data: bytes, enabled: int, created_at: str) -> Plugin:
    with naming("plugins", name):
        manifest = _decode_manifest(data)
        _same(name=(name, manifest.name))
        check_stored_plugin(manifest)
        created = datetime.fromisoformat(created_at)
        check_stored_time("created_at", created)
        return Plugin(manifest, bool(enabled), created)


def _snapshot(snapshot_id: str, name: str, data: bytes) -> Snapshot:
    with naming("snapshots", snapshot_id):
        snapshot = _decode_snapshot(data)
        _same(id=(snapshot_id, snapshot.id), name=(name, snapshot.name))
        check_stored_snapshot(snapshot)
        return snapshot


def _network(name: str, data: bytes) -> Network:
    with naming("networks", name):
        network = _decode_network(data)
        _same(name=(name, network.name))
        check_stored_network(network)
        return network


def _response(scope: bytes, request: bytes, at: int, result: bytes) -> StoredResponse:
    with naming("responses", scope):
        response = StoredResponse(IdempotencyKey(scope, request), at, result)
        _ = response.result
        return response


def _drain(data: str) -> Drain:
    with naming("meta", "drain"):
        drain = _decode_drain(data)
        check_stored_time("since", drain.since)
        return drain


def _count(value: str | None) -> int:
    with naming("meta", "changes"):
        count = int(value or 0)
        if not 0 <= count <= MAX_ID:
            raise BadMember("value", value, "which is no number of changes")
        return count


def _epoch(value: object) -> str:
    with naming("meta", "epoch"):
        return check_stored_epoch(value)


def _check_tags(rows: Sequence[VmRow]) -> None:
    """:raises BadRow: two VMs claim one process."""
    owners: dict[str, int] = {}
    for row in rows:
        if row.tag and (other := owners.setdefault(row.tag, row.id)) != row.id:
            raise BadRow(f"table vms, row {row.id}: mark is {row.tag!r}, which is that of row {other}")


class EventPages:
    """Read-only connections for those who read events that are no longer in memory. Safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[apsw.Connection] = []

    def read(self, epoch: str, after_seq: int, up_to_seq: int) -> list[EventFrame]:
        """The events after one number and up to another, as far as they are kept.

        :raises apsw.Error: the disk fails.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = open_reader(self._path)
        try:
            found = connection.execute(
                "SELECT seq, frame FROM events WHERE seq > ? AND seq <= ? ORDER BY seq", (after_seq, up_to_seq)
            )
            frames = [EventFrame.read(epoch, seq, frame) for seq, frame in found]
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return frames

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
