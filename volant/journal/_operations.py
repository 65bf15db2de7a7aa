"""What a transaction writes, one operation after the other."""

from __future__ import annotations

import msgspec

from volant.model import Drain, Network, Snapshot, VmRow

from ._frames import EventFrame
from ._projection import Plugin
from ._responses import StoredResponse


class PutRow(msgspec.Struct, frozen=True):
    row: VmRow
    after: int | None
    """The revision that it replaces; None: a new row."""


class DropRow(msgspec.Struct, frozen=True):
    vm_id: int
    after: int


class AddEvent(msgspec.Struct, frozen=True):
    frame: EventFrame


class PutPlugin(msgspec.Struct, frozen=True):
    plugin: Plugin


class DropPlugin(msgspec.Struct, frozen=True):
    name: str


class PutSnapshot(msgspec.Struct, frozen=True):
    snapshot: Snapshot


class DropSnapshot(msgspec.Struct, frozen=True):
    snapshot_id: str


class PutNetwork(msgspec.Struct, frozen=True):
    network: Network


class DropNetwork(msgspec.Struct, frozen=True):
    name: str


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
    | PutPlugin
    | DropPlugin
    | PutSnapshot
    | DropSnapshot
    | PutNetwork
    | DropNetwork
    | PutDrain
    | PutResponse
    | DropResponse
)
