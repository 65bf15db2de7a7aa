"""A transaction that is being built in memory.

The journal decides requests when it builds their transaction, not when they arrive (`_changes`). So a request is judged
by what is committed and what precedes it in the same transaction. If the commit fails, nothing else fails: the stage is
discarded, and its ids and event numbers are used by the next one.

Rejected: to decide on arrival against a staged state, so that the reply is known earlier. One failed commit would then
fail everything that came after it, and refusals (`name taken`) that were based on it would be wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

from volant.model import (
    BEGUN,
    ApiKey,
    Cause,
    Drain,
    Event,
    EventId,
    Key,
    Lease,
    Network,
    Networking,
    Project,
    Secret,
    Snapshot,
    Used,
    VmRow,
    Volume,
    allocate,
    event_for,
    replica_event,
    restored_event,
    workload_event,
    workload_events,
)

from . import _operations as op
from ._api_keys import ApiKeys
from ._audit import AuditFrame
from ._errors import DuplicateRequest
from ._frames import EventFrame
from ._named import KINDS, Named, Plugin, built_in, default_project
from ._projection import Projection
from ._responses import IdempotencyKey, StoredResponse, StoredResponses
from ._results import Result
from ._store import RecentCreates

K = TypeVar("K")
V = TypeVar("V")


class Overlay(Generic[K, V]):
    """Changes on top of a committed mapping. `changed` holds None for what is removed."""

    def __init__(self, committed: Mapping[K, V]) -> None:
        self._committed = committed
        self.changed: dict[K, V | None] = {}

    def get(self, key: K) -> V | None:
        return self.changed[key] if key in self.changed else self._committed.get(key)

    def values(self) -> list[V]:
        """Returns what there is, in no order."""
        kept = [value for key, value in self._committed.items() if key not in self.changed]
        return kept + [value for value in self.changed.values() if value is not None]

    def __len__(self) -> int:
        removed = sum(value is None for value in self.changed.values())
        return len(self._committed.keys() | self.changed.keys()) - removed


class Stage:
    """A transaction on top of the projection: the state as it would be, and the operations that lead there.

    Only `lease` and `check_idempotency_key` can refuse a change.
    """

    def __init__(
        self,
        projection: Projection,
        stored: StoredResponses,
        keys: ApiKeys,
        creates: RecentCreates,
        last_vm_id: int,
        now: datetime,
        networking: Networking,
        newest_record: int,
        used_elsewhere: Callable[[str], Used],
    ) -> None:
        """
        :param stored: the stored responses
        :param keys: the API keys
        :param creates: the VMs that were created in the last minute, for the limit of projects
        :param newest_record: the number of the last audit record
        :param used_elsewhere: returns what a project has on the other hosts of the fleet
        """
        self._projection = projection
        self._stored = stored
        self.now = now
        self.networking = networking
        self.cause: Cause | None = None
        """The caller and the request of the staged change."""
        self.records: list[tuple[Cause, AuditFrame]] = []
        self._newest_record = newest_record
        self.last_vm_id = last_vm_id
        self.last_event = projection.last_event
        self.rows: dict[int, VmRow | None] = {}
        self._by_key: dict[Key, VmRow | None] = {}
        self._named: dict[type[Named], Overlay[Key, Any]] = {kind: Overlay(projection.named(kind)) for kind in KINDS}
        self.snapshots: Overlay[Key, Snapshot] = self._named[Snapshot]
        self.networks: Overlay[Key, Network] = self._named[Network]
        self.volumes: Overlay[Key, Volume] = self._named[Volume]
        self.secrets: Overlay[Key, Secret] = self._named[Secret]
        self._keys = keys
        self.keys: Overlay[str, ApiKey] = Overlay(keys.by_digest)
        self.keys_required = keys.required
        self.projects: Overlay[Key, Project] = self._named[Project]
        self._creates = creates
        self.used_elsewhere = used_elsewhere
        self.new_creates: Counter[str] = Counter()
        """The numbers of created VMs, by project."""
        self.drain = projection.drain
        self.frames: list[EventFrame] = []
        self.responses: dict[bytes, StoredResponse] = {}
        """The new responses, by scope."""
        self.dropped_responses: list[bytes] = []
        self.operations: list[op.Operation] = []
        """The operations, in order."""
        self._taken: set[str] | None = None
        """The taken addresses on the bridge; None until they are needed."""
        self.taken_up_to: str | None = None
        """All addresses up to this one are taken; None if unknown."""

    # Rows

    def by_id(self, vm_id: int) -> VmRow | None:
        return self.rows[vm_id] if vm_id in self.rows else self._projection.by_id(vm_id)

    def vm(self, key: Key) -> VmRow | None:
        return self._by_key[key] if key in self._by_key else self._projection.get(key)

    def all_rows(self) -> Iterator[VmRow]:
        yield from (row for row in self.rows.values() if row is not None)
        yield from (row for row in self._projection.rows() if row.id not in self.rows)

    def put_row(self, row: VmRow, replaces: int | None) -> None:
        """Puts a row. `replaces` is the revision that the database must have; None for a new row."""
        self.rows[row.id] = self._by_key[row.key] = row
        self.last_vm_id = max(self.last_vm_id, row.id)
        if self._taken is not None and (address := bridge_address(row)) is not None:
            self._taken.add(address)
        self.operations.append(op.PutRow(row, replaces))

    def drop_row(self, row: VmRow) -> None:
        self.rows[row.id] = self._by_key[row.key] = None
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

    # Other named objects; maintenance

    @property
    def changed(self) -> dict[type[Named], dict[Key, Any]]:
        """The changed objects by kind; None for removed ones."""
        return {kind: overlay.changed for kind, overlay in self._named.items() if overlay.changed}

    def named(self, kind: type[Named]) -> Overlay[Key, Any]:
        """Returns all objects of one kind."""
        return self._named[kind]

    def plugin(self, key: Key) -> Plugin | None:
        return built_in(key) or self._named[Plugin].get(key)

    def installed_plugins(self) -> list[Plugin]:
        """Returns the installed plugins, without those that are built in."""
        return self._named[Plugin].values()

    def project(self, key: Key) -> Project | None:
        return self.projects.get(key) or default_project(key)

    def everything_named(self) -> Iterator[tuple[str, Named]]:
        """Yields all named objects, each with the name of its kind."""
        for kind, overlay in self._named.items():
            yield from ((KINDS[kind].word, one) for one in overlay.values())

    def recent_creates(self, project: str) -> int:
        """Returns how many VMs were created in a project in the last minute. VMs that came from other hosts do not
        count."""
        return self._creates.of(project, self.now) + self.new_creates[project]

    def put(self, named: Named) -> None:
        self._named[type(named)].changed[named.key] = named
        self.operations.append(op.Put(named))

    def drop(self, named: Named) -> None:
        self._named[type(named)].changed[named.key] = None
        self.operations.append(op.Drop(named))

    def put_drain(self, drain: Drain | None) -> None:
        if drain != self.drain:
            self.drain = drain
            self.operations.append(op.PutDrain(drain))

    # API keys

    def keys_of(self, name: str) -> list[ApiKey]:
        """Returns the key of this name and those that it replaced."""
        found = {key.digest: key for key in self._keys.of(name)}
        for digest, key in self.keys.changed.items():
            found.pop(digest, None)
            if key is not None and key.name == name:
                found[digest] = key
        return list(found.values())

    def put_key(self, key: ApiKey) -> None:
        self.keys.changed[key.digest] = key
        self.operations.append(op.PutKey(key))

    def drop_key(self, key: ApiKey) -> None:
        self.keys.changed[key.digest] = None
        self.operations.append(op.DropKey(key.digest))

    def require_keys(self) -> None:
        if not self.keys_required:
            self.keys_required = True
            self.operations.append(op.RequireKeys())

    # Events

    def next_event_id(self) -> EventId:
        return EventId(self.last_event.epoch, self.last_event.seq + 1)

    def add_events(self, before: VmRow | None, after: VmRow | None, message: str) -> None:
        """Adds the events of a change of a row, if there are any."""
        event_id = self.next_event_id()
        event = event_for(before, after, event_id=event_id, message=message, now=self.now, cause=self.cause)
        if event is not None:
            self.add_event(event_id, event)
            event_id = self.next_event_id()
            restored = restored_event(before, after, event_id=event_id, now=self.now)
            if restored is not None:
                self.add_event(event_id, restored)
                event_id = self.next_event_id()
        unreplicated = replica_event(before, after, event_id=event_id, now=self.now)
        if unreplicated is not None:
            self.add_event(event_id, unreplicated)
        for kind, text in workload_events(before, after):
            assert after is not None
            event_id = self.next_event_id()
            self.add_event(event_id, workload_event(kind, after, text, event_id=event_id, now=self.now))

    def add_event(self, event_id: EventId, event: Event) -> None:
        frame = EventFrame.of(event_id.seq, event)
        self.last_event = event_id
        self.frames.append(frame)
        self.operations.append(op.AddEvent(frame))

    # Audit

    def put_record(self, cause: Cause, outcome: str, vm_id: int | None) -> None:
        """Adds a record, unless an equivalent one exists."""
        if cause.recorded == outcome or (outcome == BEGUN and cause.recorded):
            return
        if vm_id is None:
            vm_id = cause.vm_id
        if vm_id is None and cause.of_vm and cause.project is not None:
            row = self.vm(Key(cause.project, cause.target))
            vm_id = None if row is None else row.id
        self._newest_record += 1
        frame = AuditFrame.of(cause.record(self._newest_record, self.now, outcome, vm_id))
        self.records.append((cause, frame))
        self.operations.append(op.AddRecord(frame))

    # Stored responses

    def check_idempotency_key(self, key: IdempotencyKey) -> None:
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
        """Drops surplus stored responses, to make room for new ones. Call it last."""
        if self.responses:
            self.dropped_responses = self._stored.surplus(self.responses.values(), self.now)
            self.operations.extend(map(op.DropResponse, self.dropped_responses))


def bridge_address(row: VmRow) -> str | None:
    """Returns the address of a VM on the bridge."""
    return row.lease.address if row.lease is not None and row.lease.tap else None
