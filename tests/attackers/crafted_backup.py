"""Crafted backups: each contains one thing that volantd never writes.

`MEMBERS` are rows with one crafted member: a path to another place, a foreign process, a row that contradicts its
columns. `FILES` are crafted as databases: programs in the schema, rows that fill memory, no database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import apsw
import msgspec

from tests.journal.kit import executing
from volant.host import Host
from volant.journal._schema import open_writer
from volant.model import BASE, Desired, Snapshot, Status, VmRow

AT = datetime(2025, 9, 24, 12, 34, 56, tzinfo=UTC)
ROOTFS = {"name": "base", "boot": {"rootfs": {"url": "file:///rootfs", "sha256": "0" * 64}}}

Json = dict[str, Any]


@dataclass(frozen=True)
class Victim:
    """A directory and a process that are not the daemon's."""

    directory: Path
    process: Json


NOBODY = Victim(Path("/srv/somebody"), {"pid": 4242, "start_time": 1, "boot_id": "b", "tag": "some-argument"})


@dataclass(frozen=True)
class Member:
    """One crafted member: its table, how to change it, and its name in the error."""

    table: str
    change: Callable[[Json, Victim], None]
    named: str

    @property
    def stored_in(self) -> str:
        return "named" if self.table in ("snapshots", "networks", "plugins") else self.table


def _vm(named: str, value: object, **others: object) -> Member:
    def change(row: Json, victim: Victim) -> None:
        row.update(others)
        _put(row, named, value(victim) if callable(value) else value)

    return Member("vms", change, named)


def _of(table: str, named: str, value: object) -> Member:
    return Member(table, lambda row, victim: _put(row, named, value(victim) if callable(value) else value), named)


def _put(row: Json, named: str, value: object) -> None:
    *parents, last = named.split(".")
    for parent in parents:
        row = row[parent]
    row[last] = value


def _outside(victim: Victim) -> str:
    # Relative to `<state_dir>/disks`, `templates` and `snapshots`.
    return f"../../../../../../../..{victim.directory}"


LEASE = {
    "address": "192.168.127.9", "prefix": 24, "gateway": "192.168.127.1", "mac": "02:00:00:00:00:07",
    "tap": "v00000000000007", "address6": "",
}  # fmt: skip

MEMBERS: Mapping[str, Member] = {
    "layer, relative": _vm("layer", _outside, manifest=ROOTFS),
    "layer, absolute": _vm("layer", lambda victim: str(victim.directory), manifest=ROOTFS),
    "layer, parent": _vm("layer", "..", manifest=ROOTFS),
    "layer of another VM": _vm("layer", "6-20250924T123456.000000", manifest=ROOTFS),
    "layer with a line break": _vm("layer", "7-x\n", manifest=ROOTFS),
    "tag": _vm("tag", lambda victim: victim.process["tag"], status="running", desired="running"),
    "tag of another VM": _vm("tag", "volant-0000000000-6.1", status="running"),
    "process": _vm("process", lambda victim: victim.process | {"tag": "volant-0000000000-8.1"}, status="running"),
    "image": _vm("image", _outside),
    "template": _vm("template", _outside),
    "template of a checkpoint": _vm("template", "fork-../../x"),
    "checkpoint": _vm("checkpoint", lambda victim: f"snapshot-/../{_outside(victim)}"),
    "serial socket": _vm("serial_socket", "/run/docker.sock"),
    "name": _vm("name", "../x"),
    "project": _vm("project", "../x"),
    "id": _vm("id", -7),
    "plugin": _vm("plugin", "../x"),
    "runtime": _vm("runtime", "../x"),
    "hypervisor": _vm("hypervisor", "../x"),
    "network": _vm("network", "../x"),
    "kernel command line": _vm("kernel_cmdline", "quiet\0x"),
    "boot artifact": _vm("manifest", {"name": "base", "boot": {"kernel": {"url": "/k", "sha256": "0" * 64 + "\n"}}}),
    "boot artifact's path": _vm("manifest", {"name": "base", "boot": {"kernel": {"url": "/k", "sha256": "../" * 22}}}),
    "time without a zone": _vm("created_at", "2025-09-24T12:34:56"),
    "boots": _vm("boots", -1),
    "memory": _vm("memory_mb", -1),
    "tap": _vm("lease.tap", "eth0", network="bridge", lease=dict(LEASE)),
    "address": _vm("lease.address", "1.1.1.1 --x", network="bridge", lease=dict(LEASE)),
    "address of the gateway": _vm("lease.address", "192.168.127.1", network="bridge", lease=dict(LEASE)),
    "mac": _vm("lease.mac", "02:00:00:00:00:07,script=/x", network="bridge", lease=dict(LEASE)),
    "port": _vm("ports", [{"host": "--x", "host_port": 1, "guest_port": 1}], network="bridge", lease=dict(LEASE)),
    "snapshot's id": _of("snapshots", "id", _outside),
    "snapshot's name": _of("snapshots", "name", "../x"),
    "layer of a snapshot's VM": _of("snapshots", "vm.layer", _outside),
    "network's name": _of("networks", "name", "../x"),
    "network's project": _of("networks", "project", "../x"),
    "network that is a kind": _of("networks", "name", "bridge"),
    "plugin's name": _of("plugins", "manifest.name", "../x"),
    "plugin that is built in": _of("plugins", "manifest.name", "base"),
    "plugin's runtime": _of("plugins", "manifest.runtime", "../x"),
    "plugin's artifact": _of("plugins", "manifest.boot", {"rootfs": {"url": "/r", "sha256": "../../../../x"}}),
    "status of a refusal": _of("responses", "status", 200),
    "drain": _of("meta", "since", "2025-09-24T12:34:56"),
}
"""Each becomes a path, a process, a device or an argument."""


def vm_row(vm_id: int = 7, name: str = "crafted") -> Json:
    """Returns the row of a stopped VM as JSON."""
    row = VmRow(
        id=vm_id, name=name, cpu_cores=1, memory_mb=128, plugin="base", runtime="base", manifest=BASE, created_at=AT,
        updated_at=AT, status=Status.STOPPED, desired=Desired.STOPPED, booted=1, boots=1, revision=1,
    )  # fmt: skip
    members: dict[str, Any] = json.loads(msgspec.json.encode(row))
    return members


def _rows() -> dict[str, Json]:
    sound: VmRow = msgspec.convert(vm_row(6, "original"), VmRow)
    snapshot = Snapshot(id="0123456789ab", name="kept", status="ready", vm=sound, created_at=AT)
    return {
        "vms": vm_row(),
        "snapshots": json.loads(msgspec.json.encode(snapshot)),
        "networks": {"name": "lan", "created_at": AT.isoformat()},
        "plugins": {"manifest": {"name": "web", "version": "1"}, "created_at": AT.isoformat()},
        "responses": {"type": "refusal", "status": 404, "code": "vm-not-found", "detail": "there is no VM named 'x'",
                      "field": None, "hint": None, "vm": "x"},
        "meta": {"since": AT.isoformat()},
    }  # fmt: skip


def make(path: Path, how: str | None = None, victim: Victim = NOBODY, *, epoch: str | None = None) -> Path:
    """Writes a backup with a row in each table, of which one is crafted, or none for None."""
    rows = _rows()
    if how is not None:
        member = MEMBERS[how]
        member.change(rows[member.table], victim)
    connection = open_writer(Host(), path)
    put(connection, rows)
    if epoch is not None:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
    connection.pragma("journal_mode", "delete")
    connection.close()
    return path


def put(connection: apsw.Connection, rows: Mapping[str, Json]) -> None:
    """Writes rows without checking them."""

    def data(table: str) -> bytes:
        return json.dumps(rows[table]).encode()

    def write(sql: str, *values: object) -> None:
        connection.execute(sql, values)

    vm = rows["vms"]
    write("INSERT INTO vms VALUES (?, 'default', ?, ?, ?)", vm["id"], vm["name"], vm["revision"], data("vms"))
    for kind in ("snapshot", "network", "plugin"):
        name = (rows[f"{kind}s"].get("manifest") or rows[f"{kind}s"])["name"]
        write("INSERT INTO named VALUES (?, 'default', ?, ?)", kind, name, data(f"{kind}s"))
    write("INSERT INTO responses VALUES (?, ?, ?, ?, 'default')", b"scope", b"request", 1758717296, data("responses"))
    write("INSERT INTO meta VALUES ('drain', ?)", data("meta").decode())


def _schema(old: str, new: str) -> Callable[[Path], None]:
    """Writes a schema that SQLite would refuse."""
    return executing(
        "PRAGMA writable_schema = 1",
        f"UPDATE sqlite_schema SET sql = replace(sql, '{old}', '{new}') WHERE name = 'vms'",
    )


def _blob(mib: int) -> Callable[[Path], None]:
    return executing(f"INSERT INTO vms VALUES (99, 'default', 'large', 1, zeroblob({mib * 2**20}))")


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return write


def _nested(path: Path) -> None:
    deep = b'{"manifest":{"openapi":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b',"name":"deep"}}'
    connection = apsw.Connection(str(path))
    connection.execute("INSERT INTO named VALUES ('plugin', 'default', 'deep', ?)", (deep,))
    connection.close()


FILES: Mapping[str, Callable[[Path], None]] = {
    "trigger": executing("CREATE TRIGGER t AFTER INSERT ON vms BEGIN DELETE FROM vms; END"),
    "view": executing("CREATE VIEW v AS SELECT * FROM vms"),
    "table": executing("CREATE TABLE more (x)"),
    "index": executing("CREATE INDEX i ON vms (revision)"),
    "index with an expression": executing("CREATE INDEX i ON vms (hex(row))"),
    "virtual table": executing("CREATE VIRTUAL TABLE f USING fts5(x)"),
    "statistics": executing("INSERT INTO named VALUES ('network', 'default', 'x', x'7b7d')", "ANALYZE"),
    "table gone": executing("DROP TABLE named"),
    "generated column": executing("ALTER TABLE vms ADD COLUMN g ANY AS (hex(row))"),
    "check that is a program": _schema("UNIQUE (project", "CHECK (length(hex(zeroblob(9e8)))), UNIQUE (project"),
    "schema that is no SQL": _schema("CREATE TABLE", "CREATE NONSENSE"),
    "rows of other types": executing(
        "PRAGMA writable_schema = 1",
        "UPDATE sqlite_schema SET sql = replace(sql, ') STRICT', ')') WHERE name = 'vms'",
        "PRAGMA writable_schema = RESET",
        "INSERT INTO vms VALUES (99, 'default', 'x', 'many', 17)",
        "PRAGMA writable_schema = 1",
        "UPDATE sqlite_schema SET sql = sql || ' STRICT' WHERE name = 'vms'",
    ),
    "two tables in one place": executing(
        "PRAGMA writable_schema = 1",
        "UPDATE sqlite_schema SET rootpage = (SELECT rootpage FROM sqlite_schema WHERE name = 'vms')"
        " WHERE name = 'events'",
    ),
    "kind that there is not": executing("INSERT INTO named VALUES ('nothing', 'default', 'x', x'7b7d')"),
    "files of two snapshots": executing(
        "INSERT INTO named SELECT kind, project, 'twin',"
        " CAST(replace(CAST(value AS TEXT), '\"kept\"', '\"twin\"') AS BLOB) FROM named WHERE kind = 'snapshot'"
    ),
    "project that contradicts its row": executing("UPDATE vms SET project = 'other'"),
    "column that contradicts its row": executing("UPDATE vms SET name = 'other'"),
    "id that contradicts its row": executing("UPDATE vms SET id = 8"),
    "ids used up": executing("UPDATE sqlite_sequence SET seq = 9223372036854775807"),
    "events with a hole": executing(
        "INSERT INTO events VALUES (1, 1, 1, 'x', 'x', x'7b7d'), (3, 1, 1, 'x', 'x', x'7b7d')"
    ),
    "event that is no UTF-8": executing("INSERT INTO events VALUES (1, 1, 1, 'x', 'x', x'7b2274797065223a22ff227d')"),
    "event below one": executing("INSERT INTO events VALUES (-5, 1, 1, 'x', 'x', x'7b7d')"),
    "epoch that is a path": executing("UPDATE meta SET value = '../../x' WHERE key = 'epoch'"),
    "no epoch": executing("DELETE FROM meta WHERE key = 'epoch'"),
    "row of 17 MiB": _blob(17),
    "JSON that is nested too deep": _nested,
    "newer version": executing("PRAGMA user_version = 1000"),
    "version below zero": executing("PRAGMA user_version = -1"),
    "another program's": executing("PRAGMA application_id = 7"),
    "a text": _bytes(lambda data: b"Dear diary, " * 1000),
    "the header alone": _bytes(lambda data: data[:100]),
    "random pages": _bytes(lambda data: data[:4096] + bytes(range(256)) * 200),
}
"""Each is refused before any of it is executed, loaded into memory or trusted."""
