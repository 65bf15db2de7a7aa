"""A database of every earlier version is migrated when it is opened, completely or not at all, without loss."""

from __future__ import annotations

import hashlib
import inspect
import json
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import apsw
import msgspec
import pytest

from tests.journal.kit import ClockHost, events_after, running
from tests.names import named
from volant import journal
from volant.journal import DatabaseRefused, IdempotencyKey
from volant.journal import _migrations as migrations
from volant.journal import _schema as schema
from volant.journal._migrations import VERSION, migrate
from volant.model import Manifest, NetworkView, PluginView, SnapshotView, Status, VmRow, VmView, view

AT = "2025-09-24T12:34:56Z"
RELEASED = ["45f1bd27637d01f0", "9a3a0cf9f2ba6f85", "fa64548fe9252224", "6466402163b6e92d", "e3b0c44298fc1c14"]
"""The hash of each migration at its release."""

# As the first version wrote them, without later members.
ROW = {
    "id": 3, "name": "demo", "cpu_cores": 2, "memory_mb": 256, "plugin": "web", "runtime": "web",
    "manifest": {"name": "web", "version": "1"}, "labels": {"team": "a"}, "env": {"WORD": "x"},
    "restart_policy": "always", "created_at": AT, "updated_at": AT, "desired": "stopped", "generation": 4,
    "status": "stopped", "booted": 4, "boots": 5, "revision": 17,
}  # fmt: skip
STATUSES = ("pending", "starting", "running", "stopping", "stopped")
TYPES = ("VM_CREATED", "VM_STARTING", "VM_RUNNING", "VM_STOPPING", "VM_STOPPED")


# As versions 2 to 5 stored responses.
NETWORK = {"name": "lan", "vms": {}, "created_at": AT}
PLUGIN = {
    "name": "web", "version": "1", "description": "", "runtime": "web", "enabled": True, "builtin": False,
    "created_at": AT, "labels": {},
}  # fmt: skip
SNAPSHOT = {
    "name": "warm", "status": "ready", "vm": "demo", "vm_id": 3, "plugin": "web", "cpu_cores": 2, "memory_mb": 256,
    "disk": "none", "description": "", "labels": {}, "created_at": AT, "paused_ms": 1.5, "size_bytes": 4096,
}  # fmt: skip
VM = json.loads(msgspec.json.encode(view(msgspec.convert(ROW, VmRow))))
EARLY_VM = {name: value for name, value in VM.items() if name not in ("boot", "booted_from", "fallback")}
"""As it was before templates."""
REFUSAL = {"status": 404, "code": "vm-not-found", "detail": "no", "field": None, "hint": "later", "vm": "demo"}


def answer(status: int, body: object, **headers: str) -> dict[str, object]:
    return {"answer": {"status": status, "headers": headers, "body": json.dumps(body), "vm_id": None}, "refusal": None}


ANSWERS: dict[bytes, dict[str, object]] = {
    b"created": answer(201, VM, ETag='"3-17"', Location="/api/v1/vms/demo"),
    b"changed": answer(200, VM, ETag='"3-18"'),
    b"early": answer(201, EARLY_VM, ETag='"3-17"', Location="/api/v1/vms/demo"),
    b"forked": answer(201, [VM, VM]),
    b"snapshot": answer(201, SNAPSHOT, Location="/api/v1/snapshots/warm"),
    b"network": answer(201, NETWORK, Location="/api/v1/networks/lan"),
    b"installed": answer(201, PLUGIN, Location="/api/v1/plugins/web"),
    b"enabled": answer(200, PLUGIN),
    b"refused": {"answer": None, "refusal": REFUSAL},
}
VIEW = msgspec.convert(VM, VmView)
RESULTS: dict[bytes, journal.Result] = {
    b"created": journal.VmCreated(VIEW, 17),
    b"changed": journal.VmChanged(VIEW, 18),
    b"early": journal.VmCreated(msgspec.structs.replace(VIEW, booted_from=None), 17),
    b"forked": journal.VmForked((VIEW, VIEW)),
    b"snapshot": journal.SnapshotTaken(msgspec.convert(SNAPSHOT, SnapshotView)),
    b"network": journal.NetworkCreated(msgspec.convert(NETWORK, NetworkView)),
    b"installed": journal.PluginInstalled(msgspec.convert(PLUGIN, PluginView)),
    b"enabled": journal.PluginChanged(msgspec.convert(PLUGIN, PluginView)),
    b"refused": msgspec.convert({"type": "refusal"} | REFUSAL, journal.Refusal),
}


def event(seq: int) -> dict[str, object]:
    return {
        "type": TYPES[seq - 1], "id": f"5f3a-{seq}", "name": "demo", "vm_id": 3, "status": STATUSES[seq - 1],
        "ip_address": "", "timestamp": AT, "message": f"number {seq}",
    }  # fmt: skip


DIVIDED = 9
"""From this version on names belong to projects."""


def database_of(path: Path, version: int) -> None:
    """Creates a database of that version."""
    connection = apsw.Connection(str(path))
    connection.pragma("auto_vacuum", "incremental")
    connection.pragma("journal_mode", "wal")
    migrate(connection, 0, version)
    connection.pragma("application_id", schema.APPLICATION_ID)
    connection.pragma("user_version", version)
    execute = connection.execute
    execute("INSERT INTO meta VALUES ('epoch', '5f3a')")
    project = "'default', " if version >= DIVIDED else ""
    execute(f"INSERT INTO vms VALUES (9, {project}'gone', 1, x'')")
    execute("DELETE FROM vms")
    execute(f"INSERT INTO vms VALUES (3, {project}'demo', 17, ?)", (json.dumps(ROW).encode(),))
    for seq in range(1, 6):
        frame = json.dumps(event(seq)).encode()
        execute("INSERT INTO events VALUES (?, 1758717296, 3, 'demo', ?, ?)", (seq, TYPES[seq - 1], frame))
    manifest = {"name": "web", "version": "1"}
    if version >= DIVIDED:
        plugin = {"manifest": manifest, "enabled": False, "created_at": AT}
        execute("INSERT INTO named VALUES ('plugin', 'default', 'web', ?)", (json.dumps(plugin).encode(),))
    else:
        execute("INSERT INTO plugins VALUES ('web', 0, ?, ?)", (AT, json.dumps(manifest).encode()))
    if 2 <= version < 6:
        for scope, kept in ANSWERS.items():
            columns = {"scope": b64encode(scope).decode(), "asked": "cmVxdWVzdA==", "at": 1758717296}
            execute("INSERT INTO answers VALUES (?, ?)", (scope, json.dumps(columns | kept).encode()))
    elif version >= 6:
        for scope, result in RESULTS.items():
            execute(
                "INSERT INTO responses (scope, request, at, result) VALUES (?, ?, ?, ?)",
                (scope, b"request", 1758717296, msgspec.json.encode(result)),
            )
    connection.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volant.db"


@pytest.mark.parametrize("version", range(1, VERSION + 1))
async def test_a_migration_loses_nothing(path: Path, version: int) -> None:
    database_of(path, version)
    host = ClockHost()
    async with running(path, host=host) as bench:
        (row,) = bench.store.projection.rows()
        assert (row.id, row.name, row.revision, row.boots, row.status) == (3, "demo", 17, 5, Status.STOPPED)
        assert (row.labels, row.env, row.restart_policy) == ({"team": "a"}, {"WORD": "x"}, "always")
        plugin = bench.store.projection.plugins[named("web")]
        assert (plugin.manifest, plugin.enabled) == (Manifest(name="web", version="1"), False)
        frames = await events_after(bench.store.events)
        assert [frame.event.id for frame in frames] == [f"5f3a-{seq}" for seq in range(1, 6)]
        assert [frame.event.message for frame in frames] == [f"number {seq}" for seq in range(1, 6)]
        results = {
            scope: bench.store.responses.find(IdempotencyKey(scope, b"request"), host.clock.now()) for scope in ANSWERS
        }
        assert results == (RESULTS if version >= 2 else dict.fromkeys(ANSWERS))
        # Ids continue above all that were given out.
        assert (await bench.create("next")).id == 10
        assert bench.store.events.newest.seq == 6
    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == VERSION
    assert schema._schema_of(connection) == schema._own_schema()
    assert connection.pragma("integrity_check") == "ok"
    connection.close()


async def test_a_migration_that_fails_leaves_the_database_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database_of(path, 1)
    broken = (*migrations.MIGRATIONS[:1], "CREATE TABLE one (x); CREATE TABLE vms (x)", *migrations.MIGRATIONS[2:])
    monkeypatch.setattr(migrations, "MIGRATIONS", broken)
    with pytest.raises(apsw.SQLError, match="already exists"):
        async with running(path):
            pass
    connection = apsw.Connection(str(path))
    assert connection.pragma("user_version") == 1
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    assert tables.isdisjoint({"answers", "responses", "one"})
    connection.close()
    monkeypatch.undo()
    async with running(path) as bench:
        assert len(bench.store.projection) == 1


@pytest.mark.parametrize("at", [2**63, -1])
async def test_a_response_with_an_impossible_time_is_refused_by_name(path: Path, at: int) -> None:
    database_of(path, 5)
    with apsw.Connection(str(path)) as connection:
        kept = {"asked": "cmVxdWVzdA==", "at": at} | ANSWERS[b"enabled"]
        connection.execute("UPDATE answers SET kept = ? WHERE scope = ?", (json.dumps(kept).encode(), b"enabled"))
    with pytest.raises(DatabaseRefused, match=r"table answers, row b'enabled'.*at"):
        async with running(path):
            pass


async def test_a_disk_that_is_full_during_a_migration_is_reported_as_such(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database_of(path, 1)

    full = "CREATE TABLE large (x); INSERT INTO large VALUES (zeroblob(1000000))"
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS[:1], full, *migrations.MIGRATIONS[2:]))
    connection = apsw.Connection(str(path))
    connection.pragma("max_page_count", connection.pragma("page_count") + 10)
    try:
        with pytest.raises(apsw.FullError):
            schema._migrate(connection, ClockHost())
        assert not connection.in_transaction
    finally:
        connection.close()


def test_released_migrations_are_never_changed() -> None:
    """Databases of released versions exist, so a change needs a new entry."""
    digests = [hash_of(migration) for migration in migrations.MIGRATIONS]
    assert digests[: len(RELEASED)] == RELEASED


def hash_of(migration: str | Callable[..., object]) -> str:
    script = migration if isinstance(migration, str) else inspect.getsource(migration)
    return hashlib.sha256(" ".join(script.split()).encode()).hexdigest()[:16]
