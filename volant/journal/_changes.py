"""Decides changes: whether each is allowed on top of those before it, and what it does to the stage.

A change that raises leaves nothing on the stage: each checks first and puts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import msgspec

from actors import Request
from volant.model import (
    BASE,
    BRIDGE,
    MAX_NETWORKS,
    NONE,
    USER,
    Drain,
    Lease,
    Network,
    NetworkChoice,
    Origin,
    Problem,
    Snapshot,
    Status,
    Step,
    VmRow,
    check_copyable,
    check_fork,
    check_manifest,
    check_name,
    check_ports_free,
    check_transition,
    copied_row,
    draining,
    fork_names,
    forked_event,
    is_named,
    kind_of,
    name_taken,
    new_network,
    new_row,
    new_snapshot,
    no_such_network,
    no_such_plugin,
    no_such_snapshot,
    refused,
    restored_row,
    unavailable,
    user_lease,
    waits_for,
)
from volant.model.stored import BadMember, check_stored_vm

from . import messages
from ._errors import StaleRow
from ._projection import Plugin
from ._responses import IdempotencyKey
from ._stage import Stage, bridge_address

Q = TypeVar("Q", bound=Request[Any])
Decision = Callable[[Stage, Q], object]

DECISIONS: dict[type[Request[Any]], Decision[Any]] = {}
"""By the type of the message."""


def _decides(decision: Decision[Q]) -> Decision[Q]:
    """Registers what decides messages of the type of its parameter `message`."""
    DECISIONS[get_type_hints(decision)["message"]] = decision
    return decision


def decide(stage: Stage, message: Request[Any]) -> object:
    """Put a change and the result of a request with a key on the stage; return the reply.

    :raises Problem, StaleRow, IllegalTransition: the change is refused, see the message.
    :raises DuplicateRequest: the request was carried out before.
    """
    key: IdempotencyKey | None = getattr(message, "key", None)
    if key is not None:
        stage.check_key(key)
    stage.caller = getattr(message, "caller", None)
    reply = DECISIONS[type(message)](stage, message)
    if key is not None and not isinstance(message, messages.StoreRefusal):
        stage.put_result(key, messages.RESULTS[type(message)](reply))
    return reply


@_decides
def _store_refusal(stage: Stage, message: messages.StoreRefusal) -> None:
    stage.put_result(message.key, message.refusal)


# VMs


@_decides
def _create(stage: Stage, message: messages.CreateRow) -> VmRow:
    request = message.request
    check_name(request.name, "name")
    plugin = _plugin(stage, check_name(request.plugin, "plugin"))
    if not plugin.enabled:
        raise Problem(
            409,
            "plugin-disabled",
            f"plugin {request.plugin!r} is disabled",
            field="plugin",
            hint=f"`volar plugins enable {request.plugin}` enables it",
        )
    row = new_row(request, plugin.manifest, vm_id=stage.last_vm_id + 1, now=stage.now, networking=stage.networking)
    return _put_new(stage, [row], "created")[0]


@_decides
def _restore(stage: Stage, message: messages.RestoreRow) -> VmRow:
    request = message.request
    check_name(request.name, "name")
    snapshot = stage.snapshots.get(request.from_snapshot)
    if snapshot is None:
        raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
    row = restored_row(request, snapshot, vm_id=stage.last_vm_id + 1, now=stage.now)
    return _put_new(stage, [row], f"created from snapshot {snapshot.name}")[0]


@_decides
def _fork(stage: Stage, message: messages.ForkRow) -> tuple[VmRow, ...]:
    request = message.request
    check_fork(request)
    vm = _vm(stage, message.vm_id)
    check_copyable(vm)
    names = fork_names(request, vm.name, frozenset(row.name for row in stage.all_rows()))
    origin = Origin("fork", vm.name, vm.id)
    copies = _put_new(
        stage,
        [
            copied_row(vm, vm_id=vm_id, name=name, origin=origin, checkpoint=message.checkpoint, now=stage.now)
            for vm_id, name in enumerate(names, stage.last_vm_id + 1)
        ],
        f"created as a fork of VM {vm.name}",
    )
    event_id = stage.next_event_id()
    stage.add_event(event_id, forked_event(vm, names, event_id=event_id, now=stage.now, caller=stage.caller))
    return copies


def _put_new(stage: Stage, rows: Sequence[VmRow], message: str) -> tuple[VmRow, ...]:
    """Put rows of new VMs, each with its lease, all or none."""
    for row in rows:
        _check_free(stage, row.name)
        if stage.drain is not None:
            raise draining(stage.drain, vm=row.name)
    leases: list[Lease] = []
    new = [msgspec.structs.replace(_connected(stage, row, leases), revision=1) for row in rows]
    if leases:
        stage.taken_up_to = leases[-1].address
    for row in new:
        check_transition(None, row.status)
        stage.put_row(row, None)
        stage.add_events(None, row, message)
    return tuple(new)


def _connected(stage: Stage, row: VmRow, leases: list[Lease]) -> VmRow:
    """Returns the row with its lease. One on the bridge is added to `leases`.

    :raises Problem: 404 no such network, 409 port taken or network refused, 503 the host can't have the network.
    """
    networking = stage.networking
    kind = kind_of(row.network)
    if is_named(row.network) and stage.networks.get(row.network) is None:
        raise no_such_network(row.network, field="network")
    if kind == USER and networking.user_refused:
        raise refused(networking.user_refused, vm=row.name)
    obstacle = networking.obstacles.get(kind)
    if obstacle is not None:
        raise unavailable(NetworkChoice(row.network, row.network_reason), obstacle, vm=row.name)
    if row.ports:
        check_ports_free(row.ports, ((other.name, port) for other in stage.all_rows() for port in other.ports))
    if kind == BRIDGE:
        leases.append(stage.lease(row.id, leases))
        return msgspec.structs.replace(row, lease=leases[-1])
    if kind == NONE:
        return msgspec.structs.replace(row, lease=None)
    return msgspec.structs.replace(
        row,
        lease=user_lease(networking.instance, row.id),
        network_reason=networking.reason_for(row.network_reason),
    )


@_decides
def _commit(stage: Stage, message: messages.CommitSteps) -> VmRow | None:
    vm_id, revision, steps = message.vm_id, message.revision, message.steps
    before = stage.by_id(vm_id)
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
        stage.drop_row(before)
    else:
        last = msgspec.structs.replace(last, revision=revision + 1)
        if kind_of(last.network) == USER and last.status is Status.STARTING:
            # The daemon that created the VM may have had other possibilities than this one.
            last = msgspec.structs.replace(last, network_reason=stage.networking.reason_for(last.network_reason))
        stage.put_row(last, revision)
    _add_events(stage, before, steps)
    return last


@_decides
def _adopt(stage: Stage, message: messages.AdoptRow) -> VmRow:
    before: VmRow | None = None
    for step in message.steps:
        if step.row is None or (before is not None and step.row.id != before.id):
            raise ValueError("the steps of an adoption hold one row each, all of one VM")
        check_transition(before.status if before is not None else None, step.row.status)
        before = step.row
    if before is None:
        raise ValueError("an adoption has at least one step")
    row = msgspec.structs.replace(before, revision=1)
    try:
        # The row is made from the command line of a process, which anybody may have written.
        check_stored_vm(row)
    except BadMember as bad:
        raise Problem(
            409, "orphan-not-adoptable", f"{row.tag} can't be adopted: {bad}", vm=row.name,
            hint="it goes on running; `volar vms kill` ends it",
        ) from bad  # fmt: skip
    if stage.by_id(row.id) is not None:
        raise Problem(409, "vm-exists", f"there is a VM with the id {row.id} already", vm=row.name)
    _check_free(stage, row.name)
    address = bridge_address(row)
    if address is not None and address in stage.taken_addresses():
        raise Problem(
            409,
            "address-taken",
            f"the address {address} of VM {row.name!r} is that of another VM",
            vm=row.name,
            hint="delete that one first",
        )
    stage.put_row(row, None)
    _add_events(stage, None, message.steps)
    return row


def _add_events(stage: Stage, before: VmRow | None, steps: Sequence[Step]) -> None:
    for step in steps:
        stage.add_events(before, step.row, step.message)
        before = step.row


def _vm(stage: Stage, vm_id: int) -> VmRow:
    vm = stage.by_id(vm_id)
    if vm is None:
        raise Problem(404, "vm-not-found", "the VM is gone")
    return vm


def _check_free(stage: Stage, name: str) -> None:
    if stage.named(name) is not None:
        raise name_taken(name)


# Snapshots


@_decides
def _begin_snapshot(stage: Stage, message: messages.BeginSnapshot) -> Snapshot:
    vm = _vm(stage, message.vm_id)
    snapshot = new_snapshot(message.request, vm, snapshot_id=message.snapshot_id, now=stage.now)
    if stage.snapshots.get(snapshot.name) is not None:
        raise _exists("snapshot", snapshot.name, "choose another name, or delete that one first")
    stage.put(snapshot)
    return snapshot


@_decides
def _finish_snapshot(stage: Stage, message: messages.FinishSnapshot) -> Snapshot:
    snapshot = stage.snapshots.get(message.name)
    if snapshot is None or snapshot.id != message.snapshot_id:
        raise no_such_snapshot(message.name)
    snapshot = msgspec.structs.replace(
        snapshot, status="ready", paused_ms=message.paused_ms, size_bytes=message.size_bytes
    )
    stage.put(snapshot)
    return snapshot


@_decides
def _remove_snapshot(stage: Stage, message: messages.RemoveSnapshot) -> None:
    snapshot = stage.snapshots.get(message.name)
    if snapshot is None or snapshot.id != message.snapshot_id:
        return
    users = [row.name for row in stage.all_rows() if waits_for(row, snapshot.checkpoint)]
    if users:
        raise Problem(
            409,
            "snapshot-in-use",
            f"VM {users[0]!r} is about to go on from snapshot {snapshot.name!r}",
            hint="wait until it runs, or delete it",
        )
    stage.drop(snapshot)


# Plugins


@_decides
def _install_plugin(stage: Stage, message: messages.InstallPlugin) -> Plugin:
    manifest = message.manifest
    check_manifest(manifest)
    if stage.plugins.get(manifest.name) is not None:
        raise _exists(
            "plugin", manifest.name, "delete that one first; VMs keep the manifest that they were created with"
        )
    plugin = Plugin(manifest, True, stage.now)
    stage.put(plugin)
    return plugin


@_decides
def _remove_plugin(stage: Stage, message: messages.RemovePlugin) -> None:
    plugin = _changeable_plugin(stage, message.name, "removed")
    users = [row for row in stage.all_rows() if row.plugin == plugin.name]
    _check_unused("plugin", plugin.name, users, "delete them first, or disable the plugin")
    stage.drop(plugin)


@_decides
def _enable_plugin(stage: Stage, message: messages.EnablePlugin) -> Plugin:
    plugin = _changeable_plugin(stage, message.name, "disabled")
    if plugin.enabled is not message.enabled:
        plugin = msgspec.structs.replace(plugin, enabled=message.enabled)
        stage.put(plugin)
    return plugin


def _plugin(stage: Stage, name: str) -> Plugin:
    plugin = stage.plugins.get(name)
    if plugin is None:
        raise no_such_plugin(name, field="plugin")
    return plugin


def _changeable_plugin(stage: Stage, name: str, change: str) -> Plugin:
    plugin = _plugin(stage, name)
    if name == BASE.name:
        raise Problem(409, "plugin-built-in", f"plugin {name!r} is built in and can't be {change}")
    return plugin


# Networks


@_decides
def _add_network(stage: Stage, message: messages.AddNetwork) -> Network:
    network = new_network(message.request, now=stage.now)
    if stage.networks.get(network.name) is not None:
        raise _exists("network", network.name, "choose another name; VMs that are created with this one join it")
    obstacle = stage.networking.obstacles.get(BRIDGE)
    if obstacle is not None:
        raise Problem(503, "network-unavailable", f"this host can't have named networks: {obstacle}")
    if len(stage.networks) >= MAX_NETWORKS:
        raise Problem(
            409, "too-many-networks", f"there are {MAX_NETWORKS} networks already, which is the limit",
            hint="`volar networks remove` removes networks without VMs",
        )  # fmt: skip
    stage.put(network)
    return network


@_decides
def _remove_network(stage: Stage, message: messages.RemoveNetwork) -> None:
    network = stage.networks.get(message.name)
    if network is None:
        raise no_such_network(message.name)
    members = [row for row in stage.all_rows() if row.network == network.name]
    _check_unused("network", network.name, members, "delete them first")
    stage.drop(network)


# Maintenance


@_decides
def _set_drain(stage: Stage, message: messages.SetDrain) -> Drain:
    """A repeated message keeps the time of the first one, and its grace unless there is another."""
    before = stage.drain or Drain(stage.now)
    grace_s = before.stop_grace_s if message.stop_grace_s is None else message.stop_grace_s
    drain = Drain(before.since, grace_s)
    stage.put_drain(drain)
    return drain


@_decides
def _end_drain(stage: Stage, message: messages.EndDrain) -> None:
    stage.put_drain(None)


def _exists(kind: str, name: str, hint: str) -> Problem:
    return Problem(409, f"{kind}-exists", f"there is a {kind} named {name!r} already", field="name", hint=hint)


def _check_unused(kind: str, name: str, users: Sequence[VmRow], hint: str) -> None:
    if users:
        names = sorted(row.name for row in users)
        listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        used = f"{kind} {name!r} is in use by {len(names)} VM{'s' if len(names) > 1 else ''}: {listed}"
        raise Problem(409, f"{kind}-in-use", used, hint=hint)
