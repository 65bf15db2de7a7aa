"""The tables of the database, and how the database of an earlier version is brought up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import apsw
import msgspec

from ._errors import naming


class _Answer(msgspec.Struct):
    """A rendered response, as versions 2 to 5 stored it."""

    status: int
    headers: dict[str, str]
    body: str


_LATER_IN_A_VM: dict[str, object] = {"boot": "auto", "booted_from": None, "fallback": None}
"""Members of a VM's view that the first of version 2 did not have."""


class _Kept(msgspec.Struct):
    asked: bytes
    at: Annotated[int, msgspec.Meta(ge=0, le=2**53)]
    answer: _Answer | None
    refusal: dict[str, object] | None = None


def _type_responses(connection: apsw.Connection) -> None:
    """Replaces rendered HTTP responses by typed results."""
    connection.execute(
        """
        CREATE TABLE responses (
            scope BLOB PRIMARY KEY,
            request BLOB NOT NULL,
            at INTEGER NOT NULL,
            result BLOB NOT NULL
        ) STRICT, WITHOUT ROWID
        """
    )
    for scope, data in connection.execute("SELECT scope, kept FROM answers"):
        with naming("answers", scope):
            kept = msgspec.json.decode(data, type=_Kept)
            result = _result_of(kept.answer) if kept.answer is not None else {"type": "refusal", **(kept.refusal or {})}
        encoded = msgspec.json.encode(result)
        connection.execute("INSERT INTO responses VALUES (?, ?, ?, ?)", (scope, kept.asked, kept.at, encoded))
    connection.execute("DROP TABLE answers")


def _divide_names(connection: apsw.Connection) -> None:
    """Makes names unique in a project, and one table of what is no VM."""
    connection.execute(
        """
        CREATE TABLE vms_of_projects (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            project TEXT NOT NULL,
            name TEXT NOT NULL,
            revision INTEGER NOT NULL,
            row BLOB NOT NULL,
            UNIQUE (project, name)
        ) STRICT;
        INSERT INTO vms_of_projects SELECT id, 'default', name, revision, row FROM vms;
        DELETE FROM sqlite_sequence WHERE name = 'vms_of_projects';
        INSERT INTO sqlite_sequence SELECT 'vms_of_projects', seq FROM sqlite_sequence WHERE name = 'vms';
        DROP TABLE vms;
        ALTER TABLE vms_of_projects RENAME TO vms;
        CREATE TABLE named (
            kind TEXT NOT NULL,
            project TEXT NOT NULL,
            name TEXT NOT NULL,
            value BLOB NOT NULL,
            PRIMARY KEY (kind, project, name)
        ) STRICT, WITHOUT ROWID;
        INSERT INTO named SELECT 'snapshot', 'default', name, snapshot FROM snapshots;
        INSERT INTO named SELECT 'network', 'default', name, network FROM networks;
        INSERT INTO named SELECT 'volume', 'default', name, volume FROM volumes;
        """
    )
    for name, enabled, created_at, manifest in connection.execute("SELECT * FROM plugins").fetchall():
        with naming("plugins", name):
            plugin = {"manifest": msgspec.Raw(manifest), "enabled": bool(enabled), "created_at": created_at}  # type: ignore[arg-type]
            connection.execute(
                "INSERT INTO named VALUES ('plugin', 'default', ?, ?)", (name, msgspec.json.encode(plugin))
            )
    for table in ("plugins", "snapshots", "networks", "volumes"):
        connection.execute(f"DROP TABLE {table}")


def _result_of(answer: _Answer) -> dict[str, object]:
    body = msgspec.Raw(answer.body.encode())
    if "ETag" in answer.headers:
        revision = int(answer.headers["ETag"].strip('"').partition("-")[2])
        vm = _LATER_IN_A_VM | msgspec.json.decode(body, type=dict[str, object])
        return {"type": "vm-created" if answer.status == 201 else "vm-changed", "vm": vm, "revision": revision}
    if answer.status == 200:
        return {"type": "plugin-changed", "plugin": body}
    match answer.headers.get("Location", "").split("/")[1:4]:
        case ["api", "v1", "snapshots"]:
            return {"type": "snapshot-taken", "snapshot": body}
        case ["api", "v1", "networks"]:
            return {"type": "network-created", "network": body}
        case ["api", "v1", "plugins"]:
            return {"type": "plugin-installed", "plugin": body}
    return {"type": "vm-forked", "copies": body}


MIGRATIONS: tuple[str | Callable[[apsw.Connection], None], ...] = (
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
    """
    CREATE TABLE snapshots (
        id TEXT PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        snapshot BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE networks (
        name TEXT PRIMARY KEY,
        network BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    "",  # Pages may have checksums. A version that does not know them would write pages without.
    _type_responses,
    """
    CREATE TABLE volumes (
        name TEXT PRIMARY KEY,
        volume BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    """
    CREATE TABLE keys (
        digest TEXT PRIMARY KEY,
        key BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    """,
    _divide_names,
    """
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
    """,
    """
    ALTER TABLE responses ADD COLUMN project TEXT NOT NULL DEFAULT 'default';
    CREATE INDEX audit_by_at ON audit (at);
    CREATE INDEX audit_by_caller ON audit (caller);
    CREATE INDEX audit_by_caller_id ON audit (caller_id);
    CREATE INDEX audit_by_project ON audit (project);
    CREATE INDEX audit_by_operation ON audit (operation);
    CREATE INDEX audit_by_target ON audit (target);
    CREATE INDEX audit_by_request_id ON audit (request_id);
    """,
)
"""Entry n brings a database from version n to n + 1. Entries are never changed once released.

`vms.row`, `events.frame`, `responses.result`, `named.value`, `keys.key` and `audit.record` are JSON.
`events.at`, `responses.at` and `audit.at` are seconds since 1970.
"""

VERSION = len(MIGRATIONS)


def migrate(connection: apsw.Connection, version: int, to: int = VERSION) -> None:
    """Bring a database from one version to another, in a transaction of the caller's.

    :raises BadRow: a row can't be converted.
    """
    for migration in MIGRATIONS[version:to]:
        if isinstance(migration, str):
            connection.execute(migration)
        else:
            migration(connection)
