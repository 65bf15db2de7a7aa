"""The tables of the database, and how it is opened, created and checked.

Pages have checksums: SQLite's own extension for them (`cksumvfs`), which comes with apsw. SQLite notices a damaged
structure, but not a changed byte of the content. With eight bytes at the end of each page, reading a changed page is an
error. The extension is a layer beneath all databases of the process, and leaves those without checksums alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import apsw.sqlite_extra

from volant.host import Host

from ._errors import DatabaseRefused

_logger = logging.getLogger("volant.journal")


def _load_checksums() -> bool:
    if "cksmvfs" not in apsw.vfs_names():
        try:
            with closing(apsw.Connection(":memory:")) as connection:
                apsw.sqlite_extra.load(connection, "cksumvfs")
        except (apsw.sqlite_extra.NotAvailable, apsw.Error, LookupError):
            return False
    return True


_HAS_CHECKSUMS = _load_checksums()

VERSION = 1
"""Changes with the tables: a database of another version is not used."""
_TABLES = """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE vms (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        revision INTEGER NOT NULL,
        row BLOB NOT NULL,
        UNIQUE (project, name)
    ) STRICT;
    CREATE TABLE named (
        kind TEXT NOT NULL,
        project TEXT NOT NULL,
        name TEXT NOT NULL,
        value BLOB NOT NULL,
        PRIMARY KEY (kind, project, name)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE keys (digest TEXT PRIMARY KEY, key BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        vm_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        type TEXT NOT NULL,
        frame BLOB NOT NULL
    ) STRICT;
    CREATE TABLE responses (
        scope BLOB PRIMARY KEY,
        request BLOB NOT NULL,
        at INTEGER NOT NULL,
        result BLOB NOT NULL,
        project TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE audit (
        seq INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        caller TEXT NOT NULL,
        caller_id TEXT NOT NULL,
        project TEXT,
        operation TEXT NOT NULL,
        target TEXT NOT NULL,
        request_id TEXT NOT NULL,
        record BLOB NOT NULL
    ) STRICT;
    CREATE INDEX audit_by_at ON audit (at);
    CREATE INDEX audit_by_caller ON audit (caller);
    CREATE INDEX audit_by_caller_id ON audit (caller_id);
    CREATE INDEX audit_by_project ON audit (project);
    CREATE INDEX audit_by_operation ON audit (operation);
    CREATE INDEX audit_by_target ON audit (target);
    CREATE INDEX audit_by_request_id ON audit (request_id);
"""
"""`row`, `value`, `key`, `frame`, `result` and `record` are JSON. `at` is in seconds since 1970."""

_CHECKSUM_BYTES = 8
"""The reserved bytes at the end of each page. The extension recognises its databases by this number."""
CHANGED_PAGE = "a page is not what was written to it: its checksum differs"
APPLICATION_ID = 0x566F_6C61
"""`Vola`, in the file's header: other programs' databases are not taken for ours."""

MAX_BLOB_BYTES = 16 * 1024 * 1024
"""Maximum of one row. The largest that volantd writes, with a manifest and an environment, have less than one MiB."""
BUSY_TIMEOUT_MS = 5000
_WAL_LIMIT_BYTES = 16 * 1024 * 1024
_CHECK_S = 10.0
"""The limit for the scan at a start: some gigabytes from a disk."""
_CHECK_STEPS = 10_000

_WHAT_TO_DO = (
    "it has not been touched. `volantd restore BACKUP` puts a backup in its place and keeps this file; or move it away "
    "to start with no VMs. Running hypervisors go on and are listed"
)


def open_writer(host: Host, path: Path) -> apsw.Connection:
    """Opens the database for writing, and creates it if it is missing. Blocks on the disk.

    :raises DatabaseRefused: it is damaged, or another version or another program wrote it. It is unchanged.
    :raises apsw.Error: the disk fails.
    """
    if host.files.exists(path):
        # Through a connection that can't write: closing another one would move the log into a damaged file.
        try:
            with closing(open_reader(path)) as reader:
                _inspect(reader, path, host)
        except apsw.ReadOnlyError:
            # A daemon was killed while it created the database: SQLite rolls that back, which is no damage.
            with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
                _inspect(connection, path, host)
    else:
        # SQLite gives its -wal and -shm the permissions of the database.
        host.descriptors.close(host.descriptors.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        host.files.sync_directory(path.parent)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        _prepare(connection, host)
    except BaseException:
        connection.close()
        raise
    return connection


def open_backup(host: Host, path: Path, check_s: float) -> apsw.Connection:
    """Opens a copy of a backup without other users, as one file, and checks all of it: an attacker may have written it.
    All use of the connection must end within `check_s`.

    :raises DatabaseRefused: it is damaged, or another version or another program wrote it.
    :raises apsw.Error: the disk fails.
    """
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        _distrust(connection)
        connection.pragma("temp_store", "memory")
        if _check(connection, path):
            raise DatabaseRefused(f"{path.name} is empty")
        # Before anything is read through it: checks, defaults and generated columns are programs.
        _check_schema(connection, path)
        if not _scan(connection, path, host, check_s, "integrity_check"):
            raise DatabaseRefused(f"checking it took more than {check_s:g} s")
        deadline = host.clock.monotonic() + check_s
        connection.set_progress_handler(lambda: host.clock.monotonic() > deadline, _CHECK_STEPS)
        connection.pragma("journal_mode", "delete")
        connection.pragma("synchronous", "extra")
    except BaseException:
        connection.close()
        raise
    return connection


def _distrust(connection: apsw.Connection) -> None:
    """Keeps the file from running anything: triggers, views, functions in its schema, writes past SQLite's checks."""
    for option, value in (
        (apsw.SQLITE_DBCONFIG_DEFENSIVE, 1),
        (apsw.SQLITE_DBCONFIG_TRUSTED_SCHEMA, 0),
        (apsw.SQLITE_DBCONFIG_ENABLE_TRIGGER, 0),
        (apsw.SQLITE_DBCONFIG_ENABLE_VIEW, 0),
        (apsw.SQLITE_DBCONFIG_WRITABLE_SCHEMA, 0),
        (apsw.SQLITE_DBCONFIG_DQS_DDL, 0),
        (apsw.SQLITE_DBCONFIG_DQS_DML, 0),
    ):
        connection.config(option, value)
    connection.limit(apsw.SQLITE_LIMIT_LENGTH, MAX_BLOB_BYTES)
    connection.pragma("cell_size_check", True)
    connection.pragma("mmap_size", 0)


def _check_schema(connection: apsw.Connection, path: Path) -> None:
    """Checks the tables. :raises DatabaseRefused: the database has other tables than volantd creates, or any other
    objects."""
    try:
        found = _schema_of(connection)
    except (apsw.CorruptError, apsw.NotADBError, apsw.SQLError) as error:
        raise damaged(path, error) from error
    with closing(apsw.Connection(":memory:")) as empty:
        empty.execute(_TABLES)
        own = _schema_of(empty)
    strange = [f"{each[0]} {each[1]!r}" for each in found if each not in own]
    missing = [f"{each[0]} {each[1]!r}" for each in own if each not in found]
    if strange or missing:
        what = f"it has {strange[0]}" if strange else f"it lacks {missing[0]}"
        raise DatabaseRefused(f"its tables are not those of volantd: {what[:200]}")


def open_reader(path: Path) -> apsw.Connection:
    """Returns a connection that can't write. Blocks on the disk. :raises apsw.Error: there is no such database."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def _inspect(connection: apsw.Connection, path: Path, host: Host) -> None:
    if _check(connection, path) and _had_vms(host, path):
        raise damaged(path, "it is empty, and there are logs of VMs beside it")
    _scan(connection, path, host, _CHECK_S)


def _check(connection: apsw.Connection, path: Path) -> bool:
    """Returns whether it is empty. :raises DatabaseRefused: this version must not use it."""
    try:
        application_id = connection.pragma("application_id")
        version = connection.pragma("user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except (apsw.NotADBError, apsw.CorruptError, apsw.SQLError) as error:
        raise damaged(path, error) from error
    except apsw.IOError as error:
        if is_changed_page(error):
            raise damaged(path, CHANGED_PAGE) from error
        raise
    if not _HAS_CHECKSUMS:
        raise DatabaseRefused(
            "this build of apsw has no checksums for the pages of a database (cksumvfs): install the one from PyPI"
        )
    is_empty: bool = application_id == 0 and tables == 0
    if is_empty:
        wal = path.with_name(f"{path.name}-wal")
        if wal.exists() and wal.stat().st_size:
            raise damaged(path, "it is empty, and its write-ahead log is not")
    elif application_id != APPLICATION_ID:
        raise DatabaseRefused(f"{path} is a database of another program; Volant does not touch it")
    elif version != VERSION:
        raise DatabaseRefused(
            f"{path} was written by another version of Volant (its database has version {version}, this one uses "
            f"{VERSION}): run that version, or restore a backup that this one made"
        )
    if connection.pragma("page_count") and connection.reserve_bytes() != _CHECKSUM_BYTES:
        raise damaged(path, "its pages have no checksums")
    return is_empty


def _had_vms(host: Host, path: Path) -> bool:
    logs = path.parent / "logs"
    return host.files.exists(logs) and bool(host.files.names(logs))


def damaged(path: Path, what: object) -> DatabaseRefused:
    """Returns the error for a damaged database."""
    return DatabaseRefused(f"{path} is damaged or no SQLite database ({what}); {_WHAT_TO_DO}")


def untrusted(path: Path, what: object) -> DatabaseRefused:
    """Returns the error for a database with a row that volantd can't have written."""
    return DatabaseRefused(f"{path} has content that volantd has not written, and is not used: {what}; {_WHAT_TO_DO}")


def _scan(connection: apsw.Connection, path: Path, host: Host, within_s: float, pragma: str = "quick_check") -> bool:
    """Returns whether all of it was read in time; it is sound then. :raises DatabaseRefused: it is damaged."""
    deadline = host.clock.monotonic() + within_s
    connection.set_progress_handler(lambda: host.clock.monotonic() > deadline, _CHECK_STEPS)
    try:
        found = connection.execute(f"PRAGMA {pragma}(1)").get
    except apsw.InterruptError:
        _logger.warning("%s is so large that only a part of it was checked for damage within %g s", path, within_s)
        return False
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise damaged(path, error) from error
    except apsw.IOError as error:
        if is_changed_page(error):
            raise damaged(path, CHANGED_PAGE) from error
        raise
    finally:
        connection.set_progress_handler(None)
    if f"error code={apsw.SQLITE_IOERR_DATA}" in found:
        found = f"{CHANGED_PAGE}: {found}"
    if found != "ok":
        raise damaged(path, str(found).strip().replace("\n", ", ")[:200])
    return True


def _schema_of(connection: apsw.Connection) -> list[tuple[object, ...]]:
    return list(connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name"))


def _prepare(connection: apsw.Connection, host: Host) -> None:
    connection.pragma("trusted_schema", False)
    connection.pragma("temp_store", "memory")
    if not connection.pragma("page_count"):
        # These two have an effect only while the file is empty. Space of removed events is returned in small pieces.
        connection.reserve_bytes(reserve=_CHECKSUM_BYTES)
        connection.pragma("auto_vacuum", "incremental")
    mode = connection.pragma("journal_mode", "wal")
    if mode != "wal":
        raise apsw.IOError(f"SQLite can't use a write-ahead log here (journal mode {mode})")
    # In WAL mode anything less does not sync each commit, and a power cut takes back acknowledged changes.
    connection.pragma("synchronous", "full")
    connection.pragma("journal_size_limit", _WAL_LIMIT_BYTES)
    if connection.pragma("user_version") != VERSION:
        with transaction(connection):
            connection.execute(_TABLES)
            connection.pragma("application_id", APPLICATION_ID)
            connection.pragma("user_version", VERSION)
            connection.execute("INSERT INTO meta VALUES ('epoch', ?)", (host.random.new_id()[:12],))


def is_changed_page(error: BaseException) -> bool:
    """Returns whether the error is a wrong checksum."""
    return isinstance(error, apsw.IOError) and getattr(error, "extendedresult", None) == apsw.SQLITE_IOERR_DATA


@contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
    """Commits what is written in the block, or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite ends the transaction itself when the disk is full.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
