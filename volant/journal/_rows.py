"""Reads rows of the database, and refuses rows that volantd can't have written."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from volant.model import ApiKey, Drain, Snapshot, VmRow, Volume
from volant.model.stored import (
    BadMember,
    check_stored_epoch,
    check_stored_key,
    check_stored_time,
    check_stored_vm,
)

from ._errors import BadRow, naming, shown
from ._named import KINDS_BY_WORD, Named
from ._responses import IdempotencyKey, StoredResponse

_decode_row = msgspec.json.Decoder(VmRow).decode
_decode_drain = msgspec.json.Decoder(Drain).decode
_decode_key = msgspec.json.Decoder(ApiKey).decode


def _same(**columns: tuple[object, object]) -> None:
    """Compares members with their columns. :raises BadMember: a member differs from the column of that name."""
    for name, (column, member) in columns.items():
        if column != member:
            raise BadMember(name, member, f"and its column says {shown(column)}")


def read_vm(vm_id: int, project: str, name: str, revision: int, data: bytes) -> VmRow:
    with naming("vms", vm_id):
        row = _decode_row(data)
        _same(
            id=(vm_id, row.id), project=(project, row.project), name=(name, row.name), revision=(revision, row.revision)
        )
        check_stored_vm(row)
        return row


def read_named(word: str, project: str, name: str, data: bytes) -> Named:
    with naming("named", (word, project, name)):
        kind = KINDS_BY_WORD.get(word)
        if kind is None:
            raise BadMember("kind", word, "which is none")
        named: Named = kind.decode(data)
        _same(project=(project, named.project), name=(name, named.name))
        kind.check(named)
        return named


def read_key(digest: str, data: bytes) -> ApiKey:
    with naming("keys", digest):
        key = _decode_key(data)
        _same(digest=(digest, key.digest))
        check_stored_key(key)
        return key


def read_response(scope: bytes, request: bytes, at: int, result: bytes, project: str) -> StoredResponse:
    with naming("responses", scope):
        response = StoredResponse(IdempotencyKey(scope, request, project), at, result)
        _ = response.result
        return response


def read_drain(data: str) -> Drain:
    with naming("meta", "drain"):
        drain = _decode_drain(data)
        check_stored_time("since", drain.since)
        return drain


def read_epoch(value: object) -> str:
    with naming("meta", "epoch"):
        return check_stored_epoch(value)


def check_ids_differ(named: Sequence[Named]) -> None:
    """Checks that ids are unique. :raises BadRow: two snapshots or two volumes have the same files."""
    owners: dict[tuple[type[Named], str], Named] = {}
    for one in named:
        if isinstance(one, Snapshot | Volume) and (other := owners.setdefault((type(one), one.id), one)) is not one:
            where = f"table named, row {shown(tuple(one.key))}"
            raise BadRow(f"{where}: id is {one.id!r}, which is that of row {shown(tuple(other.key))}")


def check_tags_differ(rows: Sequence[VmRow]) -> None:
    """Checks that process tags are unique. :raises BadRow: two VMs have the same process tag."""
    owners: dict[str, int] = {}
    for row in rows:
        if row.tag and (other := owners.setdefault(row.tag, row.id)) != row.id:
            raise BadRow(f"table vms, row {row.id}: tag is {row.tag!r}, which is that of row {other}")
