"""Copies of the database while it is in use, and what puts one in its place.

A copy is made by `VACUUM INTO` through a connection that can't write, in a thread of its own: it reads one snapshot,
and neither commits nor readers wait for it.

**A restore is decided by a name.** What was sent is written beside the database, examined from its first page to its
last row, and made what the next daemon should find: rows, ids, a new epoch. Then it is given the name `volant-next.db`,
and that it has this name is the restore. Whoever starts next moves the old database aside and this one into its place;
each of these moves can be repeated, so a daemon that is killed before, between or after them leaves the old one or the
new one, and never a mixture. Rejected: to write the rows into the database that is in use. It would be one
transaction, but every actor, reader and answer that hangs on the old rows would have to learn of it; a daemon that
starts has that behind it already.

Everything here but `merge` blocks.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import apsw
import msgspec

from volant.host import Host
from volant.model import (
    Desired,
    Drain,
    EventId,
    Phase,
    Problem,
    ProcessIdentity,
    Snapshot,
    Status,
    VmRow,
    event_for,
    moved,
)
from volant.model.stored import MAX_ID, BadMember, check_addresses_differ, check_stored_epoch

from ._acknowledged import acknowledged_path
from ._database import Database, Loaded
from ._errors import DatabaseRefused
from ._frames import EventFrame
from ._operations import AddEvent, PutDrain, PutSnapshot
from ._schema import MAX_BLOB_BYTES, migrated, open_reader

EXAMINE_S = 300.0
_READ = 1024 * 1024
_MAX_EVENT_BYTES = 1024 * 1024
"""Of one event; the labels of a VM, a reason and its last lines have some 200 kB."""
_LEFT_BEHIND = re.compile(r"-(copy|upload)-[0-9a-f]+\.db(-journal|-wal|-shm)?\Z")


class Running(msgspec.Struct, frozen=True):
    """A hypervisor of ours that runs: of which boot of its VM it is."""

    boot: int
    identity: ProcessIdentity
    serial_socket: str | None = None
    """Where its console is served."""


class Evidence(msgspec.Struct, frozen=True):
    """What the host shows of VMs, whatever a database says."""

    newest_id: int = 0
    """The highest id of a VM of which there is a process, a log or a disk."""
    running: Mapping[int, Running] = {}
    """By the VM's id."""


class Copied(msgspec.Struct, frozen=True):
    """A finished copy."""

    path: Path
    size: int
    sha256: bytes


class Change(msgspec.Struct, frozen=True):
    """A row that is put in the place of the one in the backup."""

    before: VmRow
    after: VmRow


def copy_path(path: Path, name: str) -> Path:
    """Where a copy is made; one that is left behind goes with the next start."""
    return path.with_name(f"{path.stem}-copy-{name}{path.suffix}")


def upload_path(path: Path, name: str) -> Path:
    """Where a database is received; what is left behind goes with the next start."""
    return path.with_name(f"{path.stem}-upload-{name}{path.suffix}")


def next_path(path: Path) -> Path:
    """What lies here replaces the database at the next start."""
    return path.with_name(f"{path.stem}-next{path.suffix}")


def replaced_databases(path: Path) -> list[Path]:
    """The files of databases that restores have moved aside."""
    return sorted(path.parent.glob(f"{path.stem}-before-*{path.suffix}*"))


def make_copy(host: Host, path: Path, to: Path, opened: Callable[[apsw.Connection], None]) -> Copied:
    """Copy the database and check the copy. `opened` is given the connection, to interrupt it.

    :raises apsw.InterruptError: it was. :raises apsw.Error: the disk fails. :raises DatabaseRefused: it is damaged.
    """
    host.descriptors.close(host.descriptors.open(to, os.O_RDWR | os.O_CREAT, 0o600))
    connection = open_reader(path)
    try:
        opened(connection)
        connection.execute("VACUUM INTO ?", (str(to),))
    finally:
        connection.close()
    copy = open_reader(to)
    try:
        opened(copy)
        found = copy.execute("PRAGMA quick_check(1)").get
    finally:
        copy.close()
    if found != "ok":
        raise DatabaseRefused(f"{path} is damaged: {found}")
    with to.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return Copied(to, to.stat().st_size, digest)


def append(path: Path, data: bytes) -> None:
    """Write the next piece of what is received. :raises OSError: the disk does not take it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def read(path: Path, offset: int) -> bytes:
    """The next piece of a copy. :raises OSError: it can't be read."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_READ)


def examine(host: Host, path: Path) -> Loaded:
    """Look at every page and every row of what shall become the database, and bring it up to date.

    :raises DatabaseRefused: it is damaged, a newer version's, none of ours, or has a row that this daemon can't have
        written. :raises apsw.Error: the disk fails.
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
        raise DatabaseRefused(f"looking through it took more than {EXAMINE_S:g} s") from error
    try:
        check_addresses_differ(loaded.rows)
    except BadMember as bad:
        raise DatabaseRefused(f"table vms: {bad}") from bad
    return loaded


def _examine_events(connection: apsw.Connection, loaded: Loaded) -> None:
    """:raises DatabaseRefused: one can't be understood, or their numbers have a hole."""
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
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DatabaseRefused(f"table events, row {seq}, can't be understood: {error}") from error


def merge(
    backup: Loaded, present: Sequence[VmRow], running: Mapping[int, Running], instance: str, *, replace: bool
) -> list[Change]:
    """Which rows of a backup must not become what they were: what is known now of a VM is truer. Addresses stay as they
    are: a VM has one for life, and so nobody in the backup has that of another one who is kept.

    :param instance: of this daemon, which may not be the one that made the backup
    :raises Problem: 409 VMs would lose their rows, unless `replace`; 409 an id belongs to two VMs.
    """
    kept = {row.id: row for row in backup.rows}
    clashes = [
        f"{row.id} ({row.name!r} here, {kept[row.id].name!r} in the backup)"
        for row in present
        if row.id in kept and not _same(row, kept[row.id])
    ]
    if clashes:
        raise Problem(
            409,
            "restore-clash",
            f"these ids belong to other VMs in the backup: {_listed(clashes)}",
            hint="it was made by another daemon; delete these VMs first",
        )
    lost = [row.name for row in present if row.id not in kept]
    if lost and not replace:
        raise Problem(
            409,
            "restore-loses-vms",
            f"the backup does not know these VMs: {_listed(lost)}",
            hint="delete them; or let them go with `replace`: what runs of them goes on and is listed as an orphan",
        )
    now = {row.id: row for row in present}
    changes = []
    for row in backup.rows:
        after = now.get(row.id) or _as_it_runs(row, running.get(row.id), instance)
        if after != row:
            changes.append(Change(row, after))
    return changes


def _same(one: VmRow, other: VmRow) -> bool:
    return (one.name, one.created_at) == (other.name, other.created_at)


def _as_it_runs(row: VmRow, running: Running | None, instance: str) -> VmRow:
    """What a backup says of processes is not believed: which there are, the host tells. A process of a later boot than
    the one in the backup is the VM: to boot another beside it would be two."""
    same = running is not None and running.identity.tag == row.tag
    row = msgspec.structs.replace(
        row,
        process=None,
        serial_socket=None,
        lease=None if row.lease is None else moved(row.lease, instance, row.id),
        tag=_own_tag(row, instance),
    )
    if running is None:
        return row
    if not same:
        row = msgspec.structs.replace(
            row,
            status=Status.RUNNING,
            desired=Desired.RUNNING if row.desired is Desired.STOPPED else row.desired,
            phase=Phase.PAUSE if row.desired is Desired.PAUSED else Phase.NONE,
            reason=None,
            boots=running.boot,
            booted=row.generation,
            agent_seen=True,
        )
    return msgspec.structs.replace(
        row, tag=running.identity.tag, process=running.identity, serial_socket=running.serial_socket
    )


def _own_tag(row: VmRow, instance: str) -> str:
    """The tag that this daemon gives the boot that the row is in: nobody else's process carries it."""
    if not row.tag:
        return ""
    boot = row.boots + 1 if row.phase is Phase.LAUNCH else max(1, row.boots)
    return f"volant-{instance}-{row.id}.{boot}"


def snapshots_after(backup: Loaded, present: Iterable[Snapshot]) -> list[Snapshot]:
    """Those of a backup, without what it says of processes, and those of now in the place of what it says of them."""
    kept = [
        msgspec.structs.replace(one, vm=msgspec.structs.replace(one.vm, process=None, serial_socket=None, tag=""))
        for one in backup.snapshots
    ]
    return [*kept, *present]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def finish(
    host: Host,
    upload: Path,
    path: Path,
    changes: Iterable[Change],
    *,
    last_vm_id: int,
    drain: Drain | None,
    snapshots: Iterable[Snapshot],
    now: datetime,
) -> str:
    """Make an examined upload what the next daemon finds, and give it the name that says so; the new epoch.

    `snapshots`: see `snapshots_after`.

    :raises apsw.Error, OSError: the disk fails; nothing is decided.
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
            for snapshot in snapshots:
                database.execute(PutSnapshot(snapshot))
    finally:
        connection.close()
    try:
        host.files.rename(upload, next_path(path))
    except OSError:
        host.files.unlink(next_path(path))
        raise
    return epoch


class Done(msgspec.Struct, frozen=True):
    """What an offline restore has done."""

    epoch: str
    vms: int
    aside: str | None
    """Where the database of before lies; None: there was none."""
    refused: str | None
    """Why that could not be looked at."""


def restore_offline(host: Host, path: Path, file: Path, evidence: Evidence, instance: str, *, replace: bool) -> Done:
    """Put a backup in the place of a database that no daemon uses, whatever has become of that.

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
        last_vm_id = max(backup.last_vm_id, present.last_vm_id if present else 0, evidence.newest_id)
        epoch = finish(
            host,
            upload,
            path,
            changes,
            last_vm_id=last_vm_id,
            drain=present.drain if present else None,
            snapshots=snapshots_after(backup, present.snapshots if present else ()),
            now=host.clock.now(),
        )
    finally:
        host.files.unlink(upload)
    return Done(epoch, len(backup.rows), take_over(host, path), refused)


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
    """Before the database is opened: put a restored one in its place, if there is one, and clear up what uploads and
    copies have left; where the old one lies now.

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
    # Its last commits may be in the log alone, and what was begun is in its journal: both would ruin another database.
    for suffix in ("-wal", "-journal", ""):
        if host.files.exists(path.with_name(path.name + suffix)):
            host.files.rename(path.with_name(path.name + suffix), aside.with_name(aside.name + suffix))
    host.files.unlink(path.with_name(path.name + "-shm"))
    # It tells of the one that was moved aside.
    host.files.unlink(acknowledged_path(path))
    host.files.rename(fresh, path)
    return str(aside)
