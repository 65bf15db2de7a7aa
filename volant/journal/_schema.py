"""The database: how it is made, recognised and brought up to date."""

from __future__ import annotations

import os
from pathlib import Path

import apsw

from volant.host import Host

from ._errors import DatabaseRefused

APPLICATION_ID = 0x566F_6C61
"""`Vola`: in the file's header, so that nobody's other database is taken for ours."""

MIGRATIONS = (
    """
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE vms (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE,
        revision INTEGER NOT NULL,
        row BLOB NOT NULL
    ) STRICT;
    CREATE TABLE events (
        seq INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        vm_id INTEGER NOT NULL,
        name TEXT NOT NULL,
        type TEXT NOT NULL,
        frame BLOB NOT NULL
    ) STRICT;
    CREATE TABLE plugins (
        name TEXT PRIMARY KEY,
        enabled INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        manifest BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE answers (
        scope BLOB PRIMARY KEY,
        kept BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
)
"""Entry n brings a database from version n to n + 1. Entries are never changed once released.

`vms.row`, `plugins.manifest`, `events.frame` and `answers.kept` are JSON. `events.at` is seconds since 1970.
"""

VERSION = len(MIGRATIONS)

BUSY_TIMEOUT_MS = 5000
_WAL_LIMIT_BYTES = 16 * 1024 * 1024


def open_writer(host: Host, path: Path) -> apsw.Connection:
    """Open the database for writing, make it where there is none, migrate it where it is old. Blocks on the disk.

    :raises DatabaseRefused: it is a newer version's, or no database of ours; it has not been touched.
    :raises apsw.Error: the disk does not do what it should.
    """
    if not host.exists(path):
        # SQLite gives its -wal and -shm the permissions of the database.
        host.close_file(host.open_file(path, os.O_RDWR | os.O_CREAT, 0o600))
        host.sync_directory(path.parent)
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        connection.set_busy_timeout(BUSY_TIMEOUT_MS)
        _check(connection, path)
        _prepare(connection)
        _migrate(connection, host)
    except BaseException:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> apsw.Connection:
    """A connection that can't write. Blocks on the disk. :raises apsw.Error: there is no such database."""
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    connection.set_busy_timeout(BUSY_TIMEOUT_MS)
    return connection


def _check(connection: apsw.Connection, path: Path) -> None:
    try:
        application_id = connection.pragma("application_id")
        version = connection.pragma("user_version")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except (apsw.NotADBError, apsw.CorruptError) as error:
        raise DatabaseRefused(f"{path} is damaged or no SQLite database: {error}") from error
    if application_id == 0 and tables == 0:
        return
    if application_id != APPLICATION_ID:
        raise DatabaseRefused(f"{path} is a database of some other program; Volant does not touch it")
    if version > VERSION:
        raise DatabaseRefused(
            f"{path} was written by a newer Volant (database version {version}, this one knows up to {VERSION}): "
            "run that version, or restore a backup that this one made"
        )


def _prepare(connection: apsw.Connection) -> None:
    connection.pragma("trusted_schema", False)
    connection.pragma("temp_store", "memory")
    # Only heeded while the file is empty: space of trimmed events is given back in small pieces.
    connection.pragma("auto_vacuum", "incremental")
    mode = connection.pragma("journal_mode", "wal")
    if mode != "wal":
        raise apsw.IOError(f"SQLite can't use a write-ahead log here (journal mode {mode})")
    # In WAL mode anything less does not sync at each commit: then power loss takes back what was acknowledged.
    connection.pragma("synchronous", "full")
    connection.pragma("journal_size_limit", _WAL_LIMIT_BYTES)


def _migrate(connection: apsw.Connection, host: Host) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.pragma("user_version")
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        if version < VERSION:
            connection.pragma("application_id", APPLICATION_ID)
            connection.pragma("user_version", VERSION)
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (host.new_id()[:12],))
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
