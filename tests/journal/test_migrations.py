"""A database of every earlier version is brought up to date when it is opened, whole or not at all; nothing is lost."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import apsw
import pytest

from tests.journal.kit import ClockHost, events_after, running
from volant.journal import _schema as schema
from volant.model import Manifest, Status

AT = "2025-09-24T12:34:56Z"
RELEASED = ["45f1bd27637d01f0", "9a3a0cf9f2ba6f85", "fa64548fe9252224", "6466402163b6e92d", "e3b0c44298fc1c14"]
"""What was hashed of each migration when it was released."""

# As the first version wrote them: what came later is not in them.
ROW = {
    "id": 3, "name": "demo", "cpu_cores": 2, "memory_mb": 256, "plugin": "web", "runtime": "web",
    "manifest": {"name": "web", "version": "1"}, "labels": {"team": "a"}, "env": {"WORD": "x"},
    "restart_policy": "always", "created_at": AT, "updated_at": AT, "desired": "stopped", "generation": 4,
    "status": "stopped", "booted": 4, "boots": 5, "revision": 17,
}  # fmt: skip
STATUSES = ("pending", "starting", "running", "stopping", "stopped")
TYPES = ("VM_CREATED", "VM_STARTING", "VM_RUNNING", "VM_STOPPING", "VM_STOPPED")


def event(seq: int) -> dict[str, object]:
    return {
        "type": TYPES[seq - 1], "id": f"5f3a-{seq}", "name": "demo", "vm_id": 3, "status": STATUSES[seq - 1],
        "ip_address": "", "timestamp": AT, "message": f"number {seq}",
    }  # fmt: skip


def database_of(path: Path, version: int) -> None:
    """A database as that version left it."""
    connection = apsw.Connection(str(path))
    connection.pragma("auto_vacuum", "incremental")
    connection.pragma("journal_mode", "wal")
    for script in schema.MIGRATIONS[:version]:
        connection.execute(script)
    connection.pragma("application_id", schema.APPLICATION_ID)
    connection.pragma("user_version", version)
    execute = connection.execute
    execute("INSERT INTO meta VALUES ('epoch', '5f3a')")
    execute("INSERT INTO vms VALUES (9, 'gone', 1, x'')")
    execute("DELETE FROM vms")
    execute("INSERT INTO vms VALUES (3, 'demo', 17, ?)", (json.dumps(ROW).encode(),))
    for seq in range(1, 6):
        frame = json.dumps(event(seq)).encode()
        execute("INSERT INTO events VALUES (?, 1758717296, 3, 'demo', ?, ?)", (seq, TYPES[seq - 1], frame))
    execute("INSERT INTO plugins VALUES ('web', 0, ?, ?)", (AT, json.dumps({"name": "web", "version": "1"}).encode()))
    if version >= 2:
        kept = {
            "scope": "c2NvcGU=", "asked": "YXNrZWQ=", "at": 1758717296,
            "answer": {"status": 201, "headers": {}, "body": "{}", "vm_id": 3},
        }  # fmt: skip
        execute("INSERT INTO answers VALUES (?, ?)", (b"scope", json.dumps(kept).encode()))
    connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volant.db"


@pytest.mark.parametrize("version", range(1, schema.VERSION + 1))
async def test_nothing_is_lost_on_the_way(path: Path, version: int) -> None:
    database_of(path, version)
    host = ClockHost()
    async with running(path, host=host) as bench:
        (row,) = bench.store.projection.rows()
        assert (row.id, row.name, row.revision, row.boots, row.status) == (3, "demo", 17, 5, Status.STOPPED)
        assert (row.labels, row.env, row.restart_policy) == ({"team": "a"}, {"WORD": "x"}, "always")
        plugin = bench.store.projection.plugins["web"]
        assert (plugin.manifest, plugin.enabled) == (Manifest(name="web", version="1"), False)
        frames = await events_after(bench.store.events)
        assert [frame.event.id for frame in frames] == [f"5f3a-{seq}" for seq in range(1, 6)]
        assert [frame.event.message for frame in frames] == [f"number {seq}" for seq in range(1, 6)]
        assert len(bench.store.answers) == (1 if version >= 2 else 0)
        # And it works: what is new in this version, too. Ids go on above those that were ever given out.
        assert (await bench.create("next")).id == 10
        assert bench.store.events.newest.seq == 6
    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == schema.VERSION
    assert schema._schema_of(connection) == schema._own_schema()
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


async def test_a_migration_that_fails_leaves_the_database_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database_of(path, 1)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE one (x); CREATE TABLE vms (x)"))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    with pytest.raises(apsw.SQLError, match="already exists"):
        async with running(path):
            pass
    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == 1
    assert connection.execute("SELECT name FROM sqlite_schema WHERE name IN ('answers', 'one')").fetchall() == []
    connection.close()
    monkeypatch.undo()
    async with running(path) as bench:
        assert len(bench.store.projection) == 1


def test_released_migrations_are_never_changed() -> None:
    """A database of that version is out there: a change to it goes into a new entry."""
    digests = [hash_of(script) for script in schema.MIGRATIONS]
    assert digests[: len(RELEASED)] == RELEASED


def hash_of(script: str) -> str:
    return hashlib.sha256(" ".join(script.split()).encode()).hexdigest()[:16]
