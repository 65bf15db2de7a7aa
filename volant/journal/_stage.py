"""One group commit in the making: what is asked is decided here, in memory, before the disk sees any of it.

Requests are decided when their transaction is made up, not when they arrive. So a request is always judged by what is
committed plus what precedes it in the same transaction, and a transaction that fails takes nothing with it that had
been built on it: the stage is thrown away, the projection has never known, ids and event numbers are given out again.
Rejected: to decide on arrival against a staged state, so that the answer is known earlier. Then one failed commit fails
everything that came after it, and the refusals (`name taken`) that were based on it were wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec

from volant.model import (
    BASE,
    BRIDGE,
    MAX_NETWORKS,
    NONE,
    USER,
    Asked,
    CreateNetwork,
    CreateVm,
    Drain,
    Event,
    EventId,
    ForkVm,
    Manifest,
    Network,
    Networking,
    Origin,
    Problem,
    RestoreVm,
    Snapshot,
    Status,
    Step,
    TakeSnapshot,
    VmRow,
    allocate,
    check_copyable,
    check_fork,
    check_manifest,
    check_name,
    check_ports_free,
    check_transition,
    copied_row,
    draining,
    event_for,
    fork_names,
    forked_event,
    is_named,
    kind_of,
    name_taken,
    new_network,
    new_row,
    new_snapshot,
    no_such_network,
    no_such_snapshot,
    refused,
    restored_event,
    restored_row,
    unavailable,
    user_lease,
    waits_for,
)
from volant.model.stored import BadMember, check_stored_vm

from ._errors import DuplicateRequest, StaleRow
from ._frames import EventFrame
from ._projection import Plugin, Projection
from ._responses import IdempotencyKey, StoredResponse, StoredResponses
from ._results import Result


class PutRow(msgspec.Struct, frozen=True):
    """Write a row; `after` is the revision that it replaces, None for a new one."""

    row: VmRow
    after: int | None


class DropRow(msgspec.Struct, frozen=True):
    vm_id: int
    after: int


class AddEvent(msgspec.Struct, frozen=True):
    frame: EventFrame


class PutPlugin(msgspec.Struct, frozen=True):
    plugin: Plugin


class DropPlugin(msgspec.Struct, frozen=True):
    name: str


class PutResponse(msgspec.Struct, frozen=True):
    response: StoredResponse


class DropResponse(msgspec.Struct, frozen=True):
    scope: bytes


class PutNetwork(msgspec.Struct, frozen=True):
    network: Network


class DropNetwork(msgspec.Struct, frozen=True):
    name: str


class PutDrain(msgspec.Struct, frozen=True):
    drain: Drain | None


class PutSnapshot(msgspec.Struct, frozen=True):
    snapshot: Snapshot


class DropSnapshot(msgspec.Struct, frozen=True):
    snapshot_id: str


Operation = (
    PutRow
    | DropRow
    | AddEvent
    | PutPlugin
    | DropPlugin
    | PutResponse
    | DropResponse
    | PutDrain
    | PutSnapshot
    | DropSnapshot
    | PutNetwork
    | DropNetwork
)


class Stage:
    """A transaction that is being made up on top of a projection. A request that raises leaves nothing in it."""

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
        self._now = now
        self._networking = networking
        self._taken: set[str] | None = None
        """Addresses on the bridge, once somebody has asked."""
        self._full_to: str | None = None
        """The highest of them that was given here, as long as none below has become free."""
        self.last_vm_id = last_vm_id
        self.last_event = projection.last_event
        self.rows: dict[int, VmRow | None] = {}
        self.plugins: dict[str, Plugin | None] = {}
        self.snapshots: dict[str, Snapshot | None] = {}
        """By name."""
        self.networks: dict[str, Network | None] = {}
        self.drain = projection.drain
        self.frames: list[EventFrame] = []
        self.caller: str | None = None
        """Who asks for the change that is staged."""
        self.operations: list[Operation] = []
        """For the disk, in order."""
        self._names: dict[str, VmRow | None] = {}
        self.responses: dict[bytes, StoredResponse] = {}
        """By scope."""
        self.dropped_responses: list[bytes] = []

    def create(self, request: CreateVm) -> VmRow:
        """:raises Problem: 400, 404, 409, 503 see `CreateRow`."""
        check_name(request.name, "name")
        plugin = self._existing_plugin(check_name(request.plugin, "plugin"))
        if not plugin.enabled:
            raise Problem(
                409,
                "plugin-disabled",
                f"plugin {request.plugin!r} is disabled",
                field="plugin",
                hint=f"`volar plugins enable {request.plugin}` enables it",
            )
        row = new_row(request, plugin.manifest, vm_id=self.last_vm_id + 1, now=self._now, networking=self._networking)
        return self._make([row], "created")[0]

    def restore(self, request: RestoreVm) -> VmRow:
        """:raises Problem: 400, 404 no such snapshot, 409, 503 see `CreateRow`."""
        check_name(request.name, "name")
        snapshot = self._snapshot(request.from_snapshot)
        if snapshot is None:
            raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
        row = restored_row(request, snapshot, vm_id=self.last_vm_id + 1, now=self._now)
        return self._make([row], f"created from snapshot {snapshot.name}")[0]

    def fork(self, vm_id: int, request: ForkVm, checkpoint: str) -> tuple[VmRow, ...]:
        """:raises Problem: 400, 404, 409, 503 see `CreateRow`."""
        check_fork(request)
        vm = self._by_id(vm_id)
        if vm is None:
            raise Problem(404, "vm-not-found", "the VM is gone")
        check_copyable(vm)
        names = fork_names(request, vm.name, frozenset(row.name for row in self._rows()))
        origin = Origin("fork", vm.name, vm.id)
        copies = self._make(
            [
                copied_row(vm, vm_id=vm_id, name=name, origin=origin, checkpoint=checkpoint, now=self._now)
                for vm_id, name in enumerate(names, self.last_vm_id + 1)
            ],
            f"created as a fork of VM {vm.name}",
        )
        event_id = EventId(self.last_event.epoch, self.last_event.seq + 1)
        self._add_event(event_id, forked_event(vm, names, event_id=event_id, now=self._now, caller=self.caller))
        return copies

    def take_snapshot(self, vm_id: int, request: TakeSnapshot, snapshot_id: str) -> Snapshot:
        """:raises Problem: 400, 404, 409."""
        vm = self._by_id(vm_id)
        if vm is None:
            raise Problem(404, "vm-not-found", "the VM is gone")
        snapshot = new_snapshot(request, vm, snapshot_id=snapshot_id, now=self._now)
        if self._snapshot(snapshot.name) is not None:
            raise Problem(
                409,
                "snapshot-exists",
                f"there is a snapshot named {snapshot.name!r} already",
                field="name",
                hint="choose another name, or delete that one first",
            )
        self._put_snapshot(snapshot)
        return snapshot

    def finish_snapshot(self, name: str, snapshot_id: str, paused_ms: float, size_bytes: int) -> Snapshot:
        """:raises Problem: 404 it is gone."""
        snapshot = self._snapshot(name)
        if snapshot is None or snapshot.id != snapshot_id:
            raise no_such_snapshot(name)
        snapshot = msgspec.structs.replace(snapshot, status="ready", paused_ms=paused_ms, size_bytes=size_bytes)
        self._put_snapshot(snapshot)
        return snapshot

    def drop_snapshot(self, name: str, snapshot_id: str) -> None:
        """One that is gone stays gone. :raises Problem: 409 a VM has yet to go on from it."""
        snapshot = self._snapshot(name)
        if snapshot is None or snapshot.id != snapshot_id:
            return
        users = [row.name for row in self._rows() if waits_for(row, snapshot.checkpoint)]
        if users:
            raise Problem(
                409,
                "snapshot-in-use",
                f"VM {users[0]!r} is about to go on from snapshot {name!r}",
                hint="wait until it runs, or delete it",
            )
        self.snapshots[name] = None
        self.operations.append(DropSnapshot(snapshot_id))

    def _make(self, rows: Sequence[VmRow], message: str) -> tuple[VmRow, ...]:
        """Put rows of new VMs, each with its lease, all or none. :raises Problem: 404, 409, 503 see `CreateRow`."""
        for row in rows:
            self._check_free(row.name)
            if self.drain is not None:
                raise draining(self.drain, vm=row.name)
        made = [msgspec.structs.replace(row, revision=1) for row in self._connected(rows)]
        self._full_to = next((address for row in reversed(made) if (address := _on_the_bridge(row))), self._full_to)
        for row in made:
            check_transition(None, row.status)
            self.last_vm_id = row.id
            self._put(row, None)
            self._tell(None, row, message)
        return tuple(made)

    def _connected(self, rows: Sequence[VmRow]) -> list[VmRow]:
        """The rows with their leases. :raises Problem: 404 no such network, 409 port taken, 503 it can't be had."""
        instance, subnet = self._networking.instance, self._networking.subnet
        connected = []
        leased: set[str] = set()
        above = self._full_to
        for row in rows:
            kind = kind_of(row.network)
            if is_named(row.network) and self._network(row.network) is None:
                raise no_such_network(row.network, field="network")
            if kind == USER and self._networking.user_refused:
                raise refused(self._networking.user_refused, vm=row.name)
            obstacle = self._networking.obstacles.get(kind)
            if obstacle is not None:
                raise unavailable(Asked(row.network, row.network_reason), obstacle, vm=row.name)
            if row.ports:
                check_ports_free(row.ports, ((other.name, port) for other in self._rows() for port in other.ports))
            lease = None
            if kind == BRIDGE:
                taken = self._addresses()
                held = taken | leased if leased else taken
                lease = allocate(subnet, held, instance=instance, vm_id=row.id, above=above)
                leased.add(above := lease.address)
            elif kind != NONE:
                row = msgspec.structs.replace(row, network_reason=self._networking.reason_for(row.network_reason))
                lease = user_lease(instance, row.id)
            connected.append(msgspec.structs.replace(row, lease=lease))
        return connected

    def add_network(self, request: CreateNetwork) -> Network:
        """:raises Problem: 400, 409, 503 it can't be had here."""
        network = new_network(request, now=self._now)
        if self._network(network.name) is not None:
            raise Problem(
                409,
                "network-exists",
                f"there is a network named {network.name!r} already",
                field="name",
                hint="choose another name; VMs that are created with this one join it",
            )
        obstacle = self._networking.obstacles.get(BRIDGE)
        if obstacle is not None:
            raise Problem(503, "network-unavailable", f"there can't be networks with a name here: {obstacle}")
        gone = sum(one is None for one in self.networks.values())
        if len(self._projection.networks.keys() | self.networks.keys()) - gone >= MAX_NETWORKS:
            raise Problem(
                409, "too-many-networks", f"there are {MAX_NETWORKS} networks, and there can't be more",
                hint="`volar networks remove` removes those that nobody is in",
            )  # fmt: skip
        self.networks[network.name] = network
        self.operations.append(PutNetwork(network))
        return network

    def remove_network(self, name: str) -> None:
        """:raises Problem: 404; 409 a VM is in it."""
        if self._network(name) is None:
            raise no_such_network(name)
        members = sorted(row.name for row in self._rows() if row.network == name)
        if members:
            shown = ", ".join(members[:5]) + (", …" if len(members) > 5 else "")
            raise Problem(
                409,
                "network-in-use",
                f"{len(members)} VM{'s are' if len(members) > 1 else ' is'} in network {name!r}: {shown}",
                hint="delete them first",
            )
        self.networks[name] = None
        self.operations.append(DropNetwork(name))

    def adopt(self, steps: Sequence[Step]) -> VmRow:
        """:raises Problem: 409. :raises IllegalTransition: a step that can't be."""
        before: VmRow | None = None
        for step in steps:
            if step.row is None or (before is not None and step.row.id != before.id):
                raise ValueError("the steps of an adoption hold one row each, all of one VM")
            check_transition(before.status if before is not None else None, step.row.status)
            before = step.row
        if before is None:
            raise ValueError("an adoption has a step at least")
        row = msgspec.structs.replace(before, revision=1)
        try:
            # It is what the command line of a process says, which anybody may have written.
            check_stored_vm(row)
        except BadMember as bad:
            raise Problem(
                409, "orphan-not-adoptable", f"{row.tag} can't be adopted: {bad}", vm=row.name,
                hint="it goes on running; `volar vms kill` ends it",
            ) from bad  # fmt: skip
        if self._by_id(row.id) is not None:
            raise Problem(409, "vm-exists", f"there is a VM with the id {row.id} already", vm=row.name)
        self._check_free(row.name)
        address = _on_the_bridge(row)
        if address is not None and address in self._addresses():
            raise Problem(
                409,
                "address-taken",
                f"the address {address} of VM {row.name!r} is that of another VM",
                vm=row.name,
                hint="delete that one first",
            )
        self.last_vm_id = max(self.last_vm_id, row.id)
        self._put(row, None)
        before = None
        for step in steps:
            self._tell(before, step.row, step.message)
            before = step.row
        return row

    def commit(self, vm_id: int, revision: int, steps: Sequence[Step]) -> VmRow | None:
        """:raises StaleRow: another revision is kept. :raises IllegalTransition: a step that can't be."""
        before = self._by_id(vm_id)
        if before is None or before.revision != revision:
            raise StaleRow(vm_id, revision, before)
        if not steps:
            return before
        status = before.status
        for step in steps:
            if step.row is not None and (step.row.id != vm_id or step.row.name != before.name):
                raise ValueError(f"a step of VM {vm_id} ({before.name}) holds the row of VM {step.row.id}")
            if step.row is None and step is not steps[-1]:
                raise ValueError(f"VM {vm_id}: nothing can follow the step that removes its row")
            check_transition(status, None if step.row is None else step.row.status)
            status = before.status if step.row is None else step.row.status
        last = steps[-1].row
        if last is None:
            self._drop(before)
        else:
            last = msgspec.structs.replace(last, revision=revision + 1)
            if kind_of(last.network) == USER and last.status is Status.STARTING:
                # Created by a daemon that could, or could not, do other things than this one.
                last = msgspec.structs.replace(last, network_reason=self._networking.reason_for(last.network_reason))
            self._put(last, revision)
        previous = before
        for step in steps:
            self._tell(previous, step.row, step.message)
            if step.row is not None:
                previous = step.row
        return last

    def install(self, manifest: Manifest) -> Plugin:
        """:raises Problem: 400, 409."""
        check_manifest(manifest)
        if self._plugin(manifest.name) is not None:
            raise Problem(
                409,
                "plugin-exists",
                f"there is a plugin named {manifest.name!r} already",
                field="name",
                hint="delete that one first; VMs keep the manifest that they were created with",
            )
        plugin = Plugin(manifest, True, self._now)
        self._put_plugin(plugin)
        return plugin

    def remove(self, name: str) -> None:
        """:raises Problem: 404, 409."""
        self._removable_plugin(name, "removed")
        users = sorted(row.name for row in self._rows() if row.plugin == name)
        if users:
            shown = ", ".join(users[:5]) + (", …" if len(users) > 5 else "")
            raise Problem(
                409,
                "plugin-in-use",
                f"plugin {name!r} is in use by {len(users)} VM{'s' if len(users) > 1 else ''}: {shown}",
                hint="delete them first, or disable the plugin",
            )
        self.plugins[name] = None
        self.operations.append(DropPlugin(name))

    def enable(self, name: str, enabled: bool) -> Plugin:
        """:raises Problem: 404, 409."""
        plugin = self._removable_plugin(name, "disabled")
        if plugin.enabled is not enabled:
            plugin = msgspec.structs.replace(plugin, enabled=enabled)
            self._put_plugin(plugin)
        return plugin

    def set_drain(self, stop_grace_s: float | None) -> Drain:
        """Begin to drain. Again: since when stays, and so does that VMs are stopped."""
        before = self.drain
        if before is None:
            drain = Drain(self._now, stop_grace_s)
        else:
            drain = Drain(before.since, before.stop_grace_s if stop_grace_s is None else stop_grace_s)
        if drain != before:
            self._put_drain(drain)
        return drain

    def end_drain(self) -> None:
        """Drain no more."""
        if self.drain is not None:
            self._put_drain(None)

    def check(self, key: IdempotencyKey) -> None:
        """:raises DuplicateRequest: it was carried out. :raises Problem: 422 the key was used for another request."""
        here = self.responses.get(key.scope)
        result = self._stored.find(key, self._now) if here is None else here.result_for(key)
        if result is not None:
            raise DuplicateRequest(result)

    def store(self, key: IdempotencyKey, result: Result) -> None:
        """Store the result of a request."""
        response = StoredResponse.of(key, self._now, result)
        self.responses[key.scope] = response
        self.operations.append(PutResponse(response))

    def drop_surplus_responses(self) -> None:
        """Drop stored responses that make room for the new ones. Call it last."""
        if self.responses:
            self.dropped_responses = self._stored.surplus(self.responses.values(), self._now)
            self.operations.extend(map(DropResponse, self.dropped_responses))

    def _check_free(self, name: str) -> None:
        if self._named(name) is not None:
            raise name_taken(name)

    def _by_id(self, vm_id: int) -> VmRow | None:
        return self.rows[vm_id] if vm_id in self.rows else self._projection.by_id(vm_id)

    def _named(self, name: str) -> VmRow | None:
        return self._names[name] if name in self._names else self._projection.get(name)

    def _rows(self) -> list[VmRow]:
        changed = [row for row in self.rows.values() if row is not None]
        return changed + [row for row in self._projection.rows() if row.id not in self.rows]

    def _network(self, name: str) -> Network | None:
        return self.networks[name] if name in self.networks else self._projection.networks.get(name)

    def _addresses(self) -> set[str]:
        """Those on the bridge that are taken; also the host's own, for VMs that were created in another subnet."""
        if self._taken is None:
            leases = [row.lease for row in self._rows() if row.lease is not None and row.lease.tap]
            self._taken = {lease.address for lease in leases} | {lease.gateway for lease in leases}
        return self._taken

    def _plugin(self, name: str) -> Plugin | None:
        return self.plugins[name] if name in self.plugins else self._projection.plugins.get(name)

    def _existing_plugin(self, name: str) -> Plugin:
        plugin = self._plugin(name)
        if plugin is None:
            raise Problem(404, "plugin-not-found", f"there is no plugin named {name[:80]!r}", field="plugin")
        return plugin

    def _removable_plugin(self, name: str, verb: str) -> Plugin:
        plugin = self._existing_plugin(name)
        if name == BASE.name:
            raise Problem(409, "plugin-built-in", f"plugin {name!r} is built in and can't be {verb}")
        return plugin

    def _put(self, row: VmRow, after: int | None) -> None:
        self.rows[row.id] = self._names[row.name] = row
        if self._taken is not None and (address := _on_the_bridge(row)) is not None:
            self._taken.add(address)
        self.operations.append(PutRow(row, after))

    def _drop(self, row: VmRow) -> None:
        self.rows[row.id] = self._names[row.name] = None
        if self._taken is not None and (address := _on_the_bridge(row)) is not None:
            self._taken.discard(address)
            self._full_to = None
        self.operations.append(DropRow(row.id, row.revision))

    def _snapshot(self, name: str) -> Snapshot | None:
        return self.snapshots[name] if name in self.snapshots else self._projection.snapshots.get(name)

    def _put_snapshot(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.name] = snapshot
        self.operations.append(PutSnapshot(snapshot))

    def _put_plugin(self, plugin: Plugin) -> None:
        self.plugins[plugin.name] = plugin
        self.operations.append(PutPlugin(plugin))

    def _put_drain(self, drain: Drain | None) -> None:
        self.drain = drain
        self.operations.append(PutDrain(drain))

    def _tell(self, before: VmRow | None, after: VmRow | None, message: str) -> None:
        event_id = EventId(self.last_event.epoch, self.last_event.seq + 1)
        event = event_for(before, after, event_id=event_id, message=message, now=self._now, caller=self.caller)
        if event is None:
            return
        self._add_event(event_id, event)
        event_id = EventId(event_id.epoch, event_id.seq + 1)
        restored = restored_event(before, after, event_id=event_id, now=self._now)
        if restored is not None:
            self._add_event(event_id, restored)

    def _add_event(self, event_id: EventId, event: Event) -> None:
        frame = EventFrame.of(event_id.seq, event)
        self.last_event = event_id
        self.frames.append(frame)
        self.operations.append(AddEvent(frame))


def _on_the_bridge(row: VmRow) -> str | None:
    return row.lease.address if row.lease is not None and row.lease.tap else None
