"""Restores a backup while no daemon runs. Everything here blocks.

**A file name decides a restore.** The backup is copied beside the database, examined from the first page to the last
row, and changed into what the next daemon should find: rows, ids, a new epoch. Then it is renamed to `volant-next.db`,
which is the restore. The old database is moved aside and this one into its place. Each move can be repeated, and a
start of the daemon does so. So a restore that is killed in between leaves the old or the new database, never a mixture.

Rejected: to write the rows into the database in use. That is one transaction, but every actor, reader and response that
depends on the old rows would have to learn of it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from datetime import datetime
from pathlib import Path

import apsw
import msgspec

from volant.host import Host
from volant.model import DONE, Cause, EventId, event_for
from volant.model.stored import MAX_ID, BadMember, check_addresses_differ, check_stored_epoch

from ._audit import AuditFrame
from ._database import Database, Loaded
from ._errors import DatabaseRefused
from ._frames import EventFrame
from ._merge import Change, Evidence, merge, named_after
from ._operations import AddEvent, AddRecord, Put, PutDrain, PutKey, RequireKeys
from ._schema import MAX_BLOB_BYTES, open_backup, open_reader

EXAMINE_S = 300.0
_MAX_EVENT_BYTES = 1024 * 1024
"""Maximum of one event. Labels, a reason and its last lines have some 200 kB."""
_LEFT_BEHIND = re.compile(r"-copy-[0-9a-f]+\.db(-journal|-wal|-shm)?\Z")


class Done(msgspec.Struct, frozen=True):
    """The outcome of a restore."""

    epoch: str
    vms: int
    aside: str | None
    """The path of the old database, None if there was none."""
    refused: str | None
    """Why the old database can't be read."""
    locked: bool
    """Whether TCP needs credentials although the database has no key."""


def restore_offline(
    host: Host, path: Path, file: Path, evidence: Evidence, instance: str, *, replace: bool, cause: Cause | None = None
) -> Done:
    """Replaces a database that no daemon uses by a backup, even if it is damaged.

    :param file: the backup, which an attacker may have written
    :param evidence: the VMs that the host has traces of
    :param replace: VMs that the backup does not know may lose their rows
    :param cause: who restores, for a record in the audit log
    :raises DatabaseRefused: `file` is damaged, another version or another program wrote it, or it has a row that
        volantd can't have written.
    :raises Problem: 409 see `merge`.
    :raises apsw.Error, OSError: the disk fails; nothing has changed.
    """
    take_over(host, path)
    copy = path.with_name(f"{path.stem}-copy-{host.random.new_id()}{path.suffix}")
    try:
        host.descriptors.close(host.descriptors.open(copy, os.O_RDWR | os.O_CREAT, 0o600))
        shutil.copyfile(file, copy)
        with closing(open_backup(host, copy, EXAMINE_S)) as connection:
            backup = _examine(connection)
            present, refused = _present(host, path)
            changes = merge(backup, present.rows if present else [], evidence.running, instance, replace=replace)
            # Nobody knows what a damaged database has required.
            keys_required = backup.keys_required or (present.keys_required if present else refused is not None)
            last_vm_id = max(backup.last_vm_id, present.last_vm_id if present else 0, evidence.newest_id)
            epoch, now = host.random.new_id()[:12], host.clock.now()
            database = Database(connection)
            with database.transaction():
                _put_rows(connection, database, changes, last_vm_id, epoch, now)
                _put_definitions(connection, database, backup, present, keys_required)
                newest = _take_over_audit(connection, path if present is not None else None)
                if cause is not None:
                    database.execute(AddRecord(AuditFrame.of(cause.record(newest + 1, now, DONE, None))))
        _decide(host, copy, path)
    except apsw.TooBigError as error:
        raise DatabaseRefused(f"it has a row with more than {MAX_BLOB_BYTES // 2**20} MiB") from error
    except apsw.InterruptError as error:
        raise DatabaseRefused(f"checking it took more than {EXAMINE_S:g} s") from error
    finally:
        for suffix in ("", "-journal"):
            host.files.unlink(copy.with_name(copy.name + suffix))
    locked = keys_required and not (present is not None and present.keys)
    return Done(epoch, len(backup.rows), take_over(host, path), refused, locked)


def _examine(connection: apsw.Connection) -> Loaded:
    """Checks every row. :raises DatabaseRefused: volantd can't have written one."""
    loaded = Database(connection).load(None)
    _examine_events(connection, loaded)
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


def _put_rows(
    connection: apsw.Connection,
    database: Database,
    changes: Iterable[Change],
    last_vm_id: int,
    epoch: str,
    now: datetime,
) -> None:
    """Puts the changed rows in place of the backup's, with an event for each new status."""
    execute = connection.execute
    seq = execute("SELECT max(seq) FROM events").get or 0
    for change in changes:
        after = msgspec.structs.replace(change.after, revision=max(change.before.revision, change.after.revision))
        encoded = msgspec.json.encode(after)
        execute("UPDATE vms SET revision = ?, row = ? WHERE id = ?", (after.revision, encoded, after.id))
        event_id = EventId(epoch, seq + 1)
        event = event_for(change.before, after, event_id=event_id, message="the database was restored", now=now)
        if event is not None:
            seq += 1
            database.execute(AddEvent(EventFrame.of(seq, event)))
    execute("DELETE FROM sqlite_sequence WHERE name = 'vms'")
    execute("INSERT INTO sqlite_sequence VALUES ('vms', ?)", (last_vm_id,))
    execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))


def _put_definitions(
    connection: apsw.Connection, database: Database, backup: Loaded, present: Loaded | None, keys_required: bool
) -> None:
    """Puts what is kept of the present database in the place of the backup's.

    No key of the backup comes back, as it may have been deleted since. What closed TCP to clients without a key stays
    closed.
    """
    database.execute(PutDrain(present.drain if present else None))
    if present is not None:
        # One that was deleted since stays deleted.
        connection.execute("DELETE FROM named WHERE kind = 'secret'")
    for one in named_after(backup, present.named if present else ()):
        database.execute(Put(one))
    connection.execute("DELETE FROM keys")
    for key in present.keys if present else ():
        database.execute(PutKey(key))
    if keys_required:
        database.execute(RequireKeys())


def _take_over_audit(connection: apsw.Connection, present: Path | None) -> int:
    """Replaces the audit log of a backup by that of the present database. Returns the number of the newest record."""
    connection.execute("DELETE FROM audit")
    if present is not None:
        with closing(open_reader(present)) as reader:
            rows = reader.execute("SELECT * FROM audit ORDER BY seq")
            connection.executemany("INSERT INTO audit VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    newest: int = connection.execute("SELECT max(seq) FROM audit").get or 0
    return newest


def _decide(host: Host, copy: Path, path: Path) -> None:
    """Gives a changed copy the name that the next start looks for. :raises OSError: the disk fails."""
    try:
        host.files.rename(copy, _next_path(path))
    except OSError:
        host.files.unlink(_next_path(path))
        raise


def _next_path(path: Path) -> Path:
    """Returns the path of the database that replaces this one at the next start."""
    return path.with_name(f"{path.stem}-next{path.suffix}")


def replaced_databases(path: Path) -> list[Path]:
    """Returns the files of databases that restores have moved aside."""
    return sorted(path.parent.glob(f"{path.stem}-before-*{path.suffix}*"))


def take_over(host: Host, path: Path) -> str | None:
    """Replaces the database by a restored one, if there is one, and removes what backups and restores have left.

    Call it before the database is opened. Returns the new path of the old database.

    :raises OSError: the disk fails. It can be called again.
    """
    for left in list(path.parent.glob(f"{path.stem}-*")):
        if _LEFT_BEHIND.search(left.name):
            host.files.unlink(left)
    fresh = _next_path(path)
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
    host.files.rename(fresh, path)
    return str(aside)
