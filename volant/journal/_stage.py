"""One transaction in the making, in memory, before the disk sees any of it.

Requests are decided when their transaction is made up, not when they arrive (`_changes`). So a request is judged by
what is committed and what precedes it in the same transaction, and a transaction that fails takes nothing else with it:
the stage is thrown away, and ids and event numbers are given out again.

Rejected: to decide on arrival against a staged state, so that the reply is known earlier. One failed commit would then
fail everything that came after it, and refusals (`name taken`) that were based on it would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

from volant.model import (
    Drain,
    Event,
    EventId,
    Lease,
    Network,
    Networking,
    Snapshot,
    VmRow,
    allocate,
    event_for,
    restored_event,
)

from . import _operations as op
from ._errors import DuplicateRequest
from ._frames import EventFrame
from ._projection import Plugin, Projection
from ._responses import IdempotencyKey, StoredResponse, StoredResponses
from ._results import Result

V = TypeVar("V")


class Overlay(Generic[V]):
    """Changes on top of a committed mapping. `changed` holds None for what is removed."""

    def __init__(self, committed: Mapping[str, V]) -> None:
        self._committed = committed
        self.changed: dict[str, V | None] = {}

    def get(self, name: str) -> V | None:
        return self.changed[name] if name in self.changed else self._committed.get(name)

    def __len__(self) -> int:
        removed = sum(value is None for value in self.changed.values())
        return len(self._committed.keys() | self.changed.keys()) - removed


class Stage:
    """A transaction on top of the projection: the state as it would be, and the operations that lead there.

    Nothing here refuses a change, except that an address or a key may be taken.
    """

    def __init__(
        self,
        projection: Projection,
        stored: StoredResponses,
        last_vm_id: int,
        now: datetime,
        networking: Networking,
    ) -> None:
        self._projection = projection
        self._stored = stored
        self.now = now
        self.networking = networking
        self.caller: str | None = None
        """The client that requests the change which is staged."""
        self.last_vm_id = last_vm_id
        self.last_event = projection.last_event
        self.rows: dict[int, VmRow | None] = {}
        self._names: dict[str, VmRow | None] = {}
        self.plugins = Overlay(projection.plugins)
        self.snapshots = Overlay(projection.snapshots)
        self.networks = Overlay(projection.networks)
        self._overlays: Mapping[type[op.Named], Overlay[Any]] = {
            Plugin: self.plugins,
            Snapshot: self.snapshots,
            Network: self.networks,
        }
        self.drain = projection.drain
        self.frames: list[EventFrame] = []
        self.responses: dict[bytes, StoredResponse] = {}
        """By scope."""
        self.dropped_responses: list[bytes] = []
        self.operations: list[op.Operation] = []
        """In order."""
        self._taken: set[str] | None = None
        """The addresses on the bridge that are taken, once they were needed."""
        self.taken_up_to: str | None = None
        """All addresses up to this one are taken; None: that is not known."""

    # Rows

    def by_id(self, vm_id: int) -> VmRow | None:
        return self.rows[vm_id] if vm_id in self.rows else self._projection.by_id(vm_id)

    def named(self, name: str) -> VmRow | None:
        return self._names[name] if name in self._names else self._projection.get(name)

    def all_rows(self) -> Iterator[VmRow]:
        yield from (row for row in self.rows.values() if row is not None)
        yield from (row for row in self._projection.rows() if row.id not in self.rows)

    def put_row(self, row: VmRow, after: int | None) -> None:
        """:param after: the revision that it replaces; None: a new row"""
        self.rows[row.id] = self._names[row.name] = row
        self.last_vm_id = max(self.last_vm_id, row.id)
        if self._taken is not None and (address := bridge_address(row)) is not None:
            self._taken.add(address)
        self.operations.append(op.PutRow(row, after))

    def drop_row(self, row: VmRow) -> None:
        self.rows[row.id] = self._names[row.name] = None
        if self._taken is not None and (address := bridge_address(row)) is not None:
            self._taken.discard(address)
            self.taken_up_to = None
        self.operations.append(op.DropRow(row.id, row.revision))

    # Addresses

    def taken_addresses(self) -> set[str]:
        """Returns the addresses of VMs and gateways on the bridge, also of VMs that were created in another subnet."""
        if self._taken is None:
            leases = [row.lease for row in self.all_rows() if row.lease is not None and row.lease.tap]
            self._taken = {lease.address for lease in leases} | {lease.gateway for lease in leases}
        return self._taken

    def lease(self, vm_id: int, given: Sequence[Lease]) -> Lease:
        """Returns the lowest free lease on the bridge.

        :param given: leases of rows that are not put yet, in the order in which they were given
        :raises Problem: 503 none is free.
        """
        taken = self.taken_addresses()
        return allocate(
            self.networking.subnet,
            taken | {lease.address for lease in given} if given else taken,
            instance=self.networking.instance,
            vm_id=vm_id,
            above=given[-1].address if given else self.taken_up_to,
        )

    # Plugins, snapshots, networks, maintenance

    def put(self, named: op.Named) -> None:
        self._overlays[type(named)].changed[named.name] = named
        self.operations.append(op.Put(named))

    def drop(self, named: op.Named) -> None:
        self._overlays[type(named)].changed[named.name] = None
        self.operations.append(op.Drop(named))

    def put_drain(self, drain: Drain | None) -> None:
        if drain != self.drain:
            self.drain = drain
            self.operations.append(op.PutDrain(drain))

    # Events

    def next_event_id(self) -> EventId:
        return EventId(self.last_event.epoch, self.last_event.seq + 1)

    def add_events(self, before: VmRow | None, after: VmRow | None, message: str) -> None:
        """Add the event of a change of a row, if there is one."""
        event_id = self.next_event_id()
        event = event_for(before, after, event_id=event_id, message=message, now=self.now, caller=self.caller)
        if event is None:
            return
        self.add_event(event_id, event)
        event_id = self.next_event_id()
        restored = restored_event(before, after, event_id=event_id, now=self.now)
        if restored is not None:
            self.add_event(event_id, restored)

    def add_event(self, event_id: EventId, event: Event) -> None:
        frame = EventFrame.of(event_id.seq, event)
        self.last_event = event_id
        self.frames.append(frame)
        self.operations.append(op.AddEvent(frame))

    # Stored responses

    def check_key(self, key: IdempotencyKey) -> None:
        """:raises DuplicateRequest: it was carried out. :raises Problem: 422 the key was used for another request."""
        here = self.responses.get(key.scope)
        result = self._stored.find(key, self.now) if here is None else here.result_for(key)
        if result is not None:
            raise DuplicateRequest(result)

    def put_result(self, key: IdempotencyKey, result: Result) -> None:
        response = StoredResponse.of(key, self.now, result)
        self.responses[key.scope] = response
        self.operations.append(op.PutResponse(response))

    def drop_surplus_responses(self) -> None:
        """Drop stored responses that make room for the new ones. Call it last."""
        if self.responses:
            self.dropped_responses = self._stored.surplus(self.responses.values(), self.now)
            self.operations.extend(map(op.DropResponse, self.dropped_responses))


def bridge_address(row: VmRow) -> str | None:
    """Returns the address of a VM on the bridge."""
    return row.lease.address if row.lease is not None and row.lease.tap else None
