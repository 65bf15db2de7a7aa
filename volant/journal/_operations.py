"""The operations of a transaction, in their order."""

from __future__ import annotations

import msgspec

from volant.model import ApiKey, Drain, VmRow

from ._audit import AuditFrame
from ._frames import EventFrame
from ._named import Named
from ._responses import StoredResponse


class PutRow(msgspec.Struct, frozen=True):
    row: VmRow
    after: int | None
    """The revision that it replaces; None for a new row."""


class DropRow(msgspec.Struct, frozen=True):
    vm_id: int
    after: int


class AddEvent(msgspec.Struct, frozen=True):
    frame: EventFrame


class AddRecord(msgspec.Struct, frozen=True):
    frame: AuditFrame


class Put(msgspec.Struct, frozen=True):
    """Adds an object, or replaces the one with its key."""

    named: Named


class Drop(msgspec.Struct, frozen=True):
    named: Named


class PutKey(msgspec.Struct, frozen=True):
    key: ApiKey


class DropKey(msgspec.Struct, frozen=True):
    digest: str


class RequireKeys(msgspec.Struct, frozen=True):
    """Closes TCP for clients without a key."""


class PutDrain(msgspec.Struct, frozen=True):
    drain: Drain | None


class PutResponse(msgspec.Struct, frozen=True):
    response: StoredResponse


class DropResponse(msgspec.Struct, frozen=True):
    scope: bytes


Operation = (
    PutRow
    | DropRow
    | AddEvent
    | AddRecord
    | Put
    | Drop
    | PutKey
    | DropKey
    | RequireKeys
    | PutDrain
    | PutResponse
    | DropResponse
)
