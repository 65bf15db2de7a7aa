"""Restores a backup. Everything here blocks.

**A file name decides a restore.** The upload is written beside the database, examined from the first page to the last
row, and made what the next daemon should find: rows, ids, a new epoch. Then it is renamed to `volant-next.db`, which is
the restore. The next start moves the old database aside and this one into its place. Each move can be repeated, so a
daemon that is killed in between leaves the old or the new database, never a mixture.

Rejected: to write the rows into the database in use. That is one transaction, but every actor, reader and response that
depends on the old rows would have to learn of it. A new daemon needs no such code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing
from datetime import datetime
from pathlib import Path

import apsw
import msgspec

from volant.host import Host
from volant.model import (
    DONE,
    ApiKey,
    Cause,
    Drain,
    EventId,
    event_for,
)
from volant.model.stored import MAX_ID, BadMember, check_addresses_differ, check_stored_epoch

from ._acknowledged import acknowledged_path
from ._audit import AuditFrame
from ._copies import append, next_path, upload_path
from ._database import Database, Loaded
from ._errors import DatabaseRefused
from ._frames import EventFrame
from ._merge import Change, Evidence, merge, named_after
from ._named import Named
from ._operations import AddEvent, AddRecord, Put, PutDrain, PutKey, RequireKeys
from ._schema import MAX_BLOB_BYTES, migrated, open_reader

EXAMINE_S = 300.0
_READ = 1024 * 1024
_MAX_EVENT_BYTES = 1024 * 1024
"""Of one event. Labels, a reason and its last lines have some 200 kB."""
_LEFT_BEHIND = re.compile(r"-(copy|upload)-[0-9a-f]+\.db(-journal|-wal|-shm)?\Z")


def examine(host: Host, path: Path) -> Loaded:
    """Checks every page and row of an upload, and migrates it.

    :raises DatabaseRefused: it is damaged, a newer version or another program wrote it, or it has a row that volantd
        can't have written.
    :raises apsw.Error: the disk fails.
    """
    try:
        connection = migrated(host, path, EXAMINE_S)
        try:
            loaded = Database(connection).load(None)
            _examine_events(connection, loaded)
        finally:
            connection.close()
    except apsw.TooBigError as error:
        raise DatabaseRefused(f"it has a row with more than {MAX_BLOB_BYTES // 2**20} MiB") from error
    except apsw.InterruptError as error:
        raise DatabaseRefused(f"checking it took more than {EXAMINE_S:g} s") from error
    try:
        check_addresses_differ(loaded.rows)
    except BadMember as bad:
        raise DatabaseRefused(f"table vms: {bad}") from bad
    return loaded


def _examine_events(connection: apsw.Connection, loaded: Loaded) -> None:
    """:raises DatabaseRefused: an event can't be read, or a number is missing."""
    expected = loaded.oldest_seq
    if not 1 <= expected <= MAX_ID or loaded.newest_seq > MAX_ID:
        raise DatabaseRefused(f"table events: seq is {expected} to {loaded.newest_seq}, 1 to {MAX_ID} are possible")
    for seq, frame in connection.execute("SELECT seq, frame FROM events ORDER BY seq"):
        if seq != expected:
            raise DatabaseRefused(f"table events: event {seq} follows event {expected - 1}")
        expected += 1
        if len(frame) > _MAX_EVENT_BYTES:
            raise DatabaseRefused(f"table events, row {seq}: frame has {len(frame)} bytes, at most {_MAX_EVENT_BYTES}")
        try:
            EventFrame.read(loaded.epoch, seq, frame)
        except (ValueError, RecursionError) as error:
            raise DatabaseRefused(f"table events, row {seq}, can't be read: {error}") from error


def finish(
    host: Host,
    upload: Path,
    path: Path,
    changes: Iterable[Change],
    *,
    last_vm_id: int,
    drain: Drain | None,
    named: Iterable[Named],
    keys: Iterable[ApiKey],
    keys_required: bool,
    present: Path | None,
    cause: Cause | None,
    now: datetime,
) -> str:
    """Makes an examined upload what the next daemon finds, and renames it. Returns the new epoch.

    `named`: see `named_after`. `keys`: those of now. No key of the backup comes back, as it may have been deleted
    since. What closed TCP to clients without a key stays closed. `present`: the database of now, if it can be read. Its
    audit log stays, and that of the backup does not count. `cause`: who restores, for a record.

    :raises apsw.Error, OSError: the disk fails; nothing has changed.
    """
    epoch = host.random.new_id()[:12]
    connection = migrated(host, upload, EXAMINE_S, check=False)
    try:
        database = Database(connection)
        with database.transaction():
            execute = connection.execute
            seq = execute("SELECT max(seq) FROM events").get or 0
            for change in changes:
                after = msgspec.structs.replace(
                    change.after, revision=max(change.before.revision, change.after.revision)
                )
                execute("UPDATE vms SET revision = ?, row = ? WHERE id = ?",
                        (after.revision, msgspec.json.encode(after), after.id))  # fmt: skip
                event_id = EventId(epoch, seq + 1)
                event = event_for(change.before, after, event_id=event_id, message="the database was restored", now=now)
                if event is not None:
                    seq += 1
                    database.execute(AddEvent(EventFrame.of(seq, event)))
            execute("DELETE FROM sqlite_sequence WHERE name = 'vms'")
            execute("INSERT INTO sqlite_sequence VALUES ('vms', ?)", (last_vm_id,))
            execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
            database.execute(PutDrain(drain))
            if present is not None:
                # One that was deleted since stays deleted.
                execute("DELETE FROM named WHERE kind = 'secret'")
            for one in named:
                database.execute(Put(one))
            execute("DELETE FROM keys")
            for key in keys:
                database.execute(PutKey(key))
            if keys_required:
                database.execute(RequireKeys())
            newest = _take_over_audit(connection, present)
            if cause is not None:
                database.execute(AddRecord(AuditFrame.of(cause.record(newest + 1, now, DONE, None))))
    finally:
        connection.close()
    try:
        host.files.rename(upload, next_path(path))
    except OSError:
        host.files.unlink(next_path(path))
        raise
    if cause is not None:
        cause.recorded = DONE
    return epoch


def _take_over_audit(connection: apsw.Connection, present: Path | None) -> int:
    """Replaces the audit log of a backup by that of the present database. Returns the number of the newest record."""
    connection.execute("DELETE FROM audit")
    if present is not None:
        with closing(open_reader(present)) as reader:
            rows = reader.execute("SELECT * FROM audit ORDER BY seq")
            connection.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    newest: int = connection.execute("SELECT max(seq) FROM audit").get or 0
    return newest


class Done(msgspec.Struct, frozen=True):
    """The outcome of an offline restore."""

    epoch: str
    vms: int
    aside: str | None
    """The path of the old database; None: there was none."""
    refused: str | None
    """Why the old database can't be read."""
    locked: bool
    """Whether TCP needs credentials although the database has no key."""


def restore_offline(
    host: Host, path: Path, file: Path, evidence: Evidence, instance: str, *, replace: bool, cause: Cause | None = None
) -> Done:
    """Replaces a database that no daemon uses by a backup, even if it is damaged.

    :raises DatabaseRefused: of `file`, see `examine`. :raises Problem: 409 see `merge`.
    :raises apsw.Error, OSError: the disk fails; nothing has changed.
    """
    take_over(host, path)
    upload = upload_path(path, host.random.new_id())
    try:
        with file.open("rb") as source:
            while data := source.read(_READ):
                append(upload, data)
        if not host.files.exists(upload):
            raise DatabaseRefused("it is empty")
        backup = examine(host, upload)
        present, refused = _present(host, path)
        changes = merge(backup, present.rows if present else [], evidence.running, instance, replace=replace)
        keys = present.keys if present else ()
        # Nobody knows what a damaged database has required.
        keys_required = backup.keys_required or (present.keys_required if present else refused is not None)
        last_vm_id = max(backup.last_vm_id, present.last_vm_id if present else 0, evidence.newest_id)
        epoch = finish(
            host,
            upload,
            path,
            changes,
            last_vm_id=last_vm_id,
            drain=present.drain if present else None,
            named=named_after(backup, present.named if present else ()),
            keys=keys,
            keys_required=keys_required,
            present=path if present is not None else None,
            cause=cause,
            now=host.clock.now(),
        )
    finally:
        host.files.unlink(upload)
    return Done(epoch, len(backup.rows), take_over(host, path), refused, locked=keys_required and not keys)


def _present(host: Host, path: Path) -> tuple[Loaded | None, str | None]:
    if not host.files.exists(path):
        return None, None
    try:
        database = Database.open(host, path)
        try:
            return database.load(None), None
        finally:
            database.close()
    except (DatabaseRefused, apsw.Error) as error:
        return None, str(error).partition("; it has not been touched")[0]


def take_over(host: Host, path: Path) -> str | None:
    """Replaces the database by a restored one, if there is one, and removes what uploads and copies have left.

    Call it before the database is opened. Returns the new path of the old database.

    :raises OSError: the disk fails. It can be called again.
    """
    for left in list(path.parent.glob(f"{path.stem}-*")):
        if _LEFT_BEHIND.search(left.name):
            host.files.unlink(left)
    fresh = next_path(path)
    if not host.files.exists(fresh):
        return None
    connection = open_reader(fresh)
    try:
        epoch = check_stored_epoch(connection.execute("SELECT value FROM meta WHERE key = 'epoch'").get)
    finally:
        connection.close()
    aside = path.with_name(f"{path.stem}-before-{epoch}{path.suffix}")
    # The last commits may be in the log alone, and SQLite's journal has an unfinished one. Both belong to the old file.
    for suffix in ("-wal", "-journal", ""):
        if host.files.exists(path.with_name(path.name + suffix)):
            host.files.rename(path.with_name(path.name + suffix), aside.with_name(aside.name + suffix))
    host.files.unlink(path.with_name(path.name + "-shm"))
    # It is about the old database.
    host.files.unlink(acknowledged_path(path))
    host.files.rename(fresh, path)
    return str(aside)
