"""Reads rows of the database, and refuses rows that volantd can't have written."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

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

from ._errors import BadRow, naming, shown
from ._projection import Plugin
from ._responses import IdempotencyKey, StoredResponse

_decode_row = msgspec.json.Decoder(VmRow).decode
_decode_manifest = msgspec.json.Decoder(Manifest).decode
_decode_drain = msgspec.json.Decoder(Drain).decode
_decode_snapshot = msgspec.json.Decoder(Snapshot).decode
_decode_network = msgspec.json.Decoder(Network).decode


def _same(**columns: tuple[object, object]) -> None:
    """:raises BadMember: a member says something else than the column of that name."""
    for name, (column, member) in columns.items():
        if column != member:
            raise BadMember(name, member, f"and its column says {shown(column)}")


def read_vm(vm_id: int, name: str, revision: int, data: bytes) -> VmRow:
    with naming("vms", vm_id):
        row = _decode_row(data)
        _same(id=(vm_id, row.id), name=(name, row.name), revision=(revision, row.revision))
        check_stored_vm(row)
        return row


def read_plugin(name: str, data: bytes, enabled: int, created_at: str) -> Plugin:
    with naming("plugins", name):
        manifest = _decode_manifest(data)
        _same(name=(name, manifest.name))
        check_stored_plugin(manifest)
        created = datetime.fromisoformat(created_at)
        check_stored_time("created_at", created)
        return Plugin(manifest, bool(enabled), created)


def read_snapshot(snapshot_id: str, name: str, data: bytes) -> Snapshot:
    with naming("snapshots", snapshot_id):
        snapshot = _decode_snapshot(data)
        _same(id=(snapshot_id, snapshot.id), name=(name, snapshot.name))
        check_stored_snapshot(snapshot)
        return snapshot


def read_network(name: str, data: bytes) -> Network:
    with naming("networks", name):
        network = _decode_network(data)
        _same(name=(name, network.name))
        check_stored_network(network)
        return network


def read_response(scope: bytes, request: bytes, at: int, result: bytes) -> StoredResponse:
    with naming("responses", scope):
        response = StoredResponse(IdempotencyKey(scope, request), at, result)
        _ = response.result
        return response


def read_drain(data: str) -> Drain:
    with naming("meta", "drain"):
        drain = _decode_drain(data)
        check_stored_time("since", drain.since)
        return drain


def read_changes(value: str | None) -> int:
    with naming("meta", "changes"):
        count = int(value or 0)
        if not 0 <= count <= MAX_ID:
            raise BadMember("value", value, "which is no number of changes")
        return count


def read_epoch(value: object) -> str:
    with naming("meta", "epoch"):
        return check_stored_epoch(value)


def check_tags_differ(rows: Sequence[VmRow]) -> None:
    """:raises BadRow: two VMs have the same process tag."""
    owners: dict[str, int] = {}
    for row in rows:
        if row.tag and (other := owners.setdefault(row.tag, row.id)) != row.id:
            raise BadRow(f"table vms, row {row.id}: mark is {row.tag!r}, which is that of row {other}")
