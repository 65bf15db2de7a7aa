"""Decides changes: whether each is allowed on top of those before it, and what it does to the stage.

A change that raises leaves nothing on the stage: each checks first and puts afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

import msgspec

from actors import Request
from volant.model import (
    BASE,
    BRIDGE,
    MAX_ALL_VOLUMES,
    MAX_NETWORKS,
    NONE,
    USER,
    Cause,
    CloneVolume,
    Drain,
    EventType,
    Key,
    Lease,
    Network,
    NetworkChoice,
    Origin,
    Problem,
    Snapshot,
    Status,
    Step,
    VmRow,
    Volume,
    VolumeMount,
    Woke,
    already_exists,
    arrived_row,
    check_copyable,
    check_create_volume,
    check_fork,
    check_manifest,
    check_name,
    check_ports_free,
    check_transition,
    check_unchanged,
    check_volumes_free,
    copied_row,
    decide as decide_steps,
    draining,
    egress_unavailable,
    first_few,
    fork_names,
    forked_event,
    image_event,
    is_at_rest,
    is_named,
    is_restricted,
    kind_of,
    name_taken,
    new_network,
    new_row,
    new_snapshot,
    no_such_network,
    no_such_plugin,
    no_such_secret,
    no_such_snapshot,
    no_such_volume,
    refused,
    restored_row,
    snapshot_event,
    unavailable,
    user_lease,
    users_of,
    volume_not_ready,
    waits_for,
    writer_of,
)
from volant.model.stored import BadMember, check_stored_vm

from . import messages
from ._definitions import take
from ._errors import StaleRow
from ._named import Named, Plugin
from ._quotas import check_fits, check_vms_fit, require_project
from ._responses import IdempotencyKey
from ._stage import Stage, bridge_address

Q = TypeVar("Q", bound=Request[Any])
Decision = Callable[[Stage, Q], object]

MAX_PLUGINS = 200
MAX_NETWORKS_OF_PROJECT = 200
MAX_VOLUMES_OF_PROJECT = 2000
"""Maximum per project, so that none uses up what all share."""

DECISIONS: dict[type[Request[Any]], Decision[Any]] = {}
"""The deciding functions, by the type of their message."""


def decides(decision: Decision[Q]) -> Decision[Q]:
    """Registers a function that decides messages of the type of its parameter `message`."""
    DECISIONS[get_type_hints(decision)["message"]] = decision
    return decision


def decide(stage: Stage, message: Request[Any]) -> object:
    """Put a change and the result of a request with a key on the stage; return the reply.

    :raises Problem, StaleRow, IllegalTransition: the change is refused, see the message.
    :raises DuplicateRequest: the request was carried out before.
    """
    key: IdempotencyKey | None = getattr(message, "key", None)
    if key is not None:
        stage.check_idempotency_key(key)
    cause: Cause | None = getattr(message, "cause", None)
    stage.cause = cause
    reply = DECISIONS[type(message)](stage, message)
    if cause is not None:
        stage.put_record(cause, messages.outcome_of(message), _vm_id_of(message, reply))
    if key is not None and not isinstance(message, messages.StoreRefusal):
        stage.put_result(key, messages.result_of(message, reply))
    return reply


def _vm_id_of(message: Request[Any], reply: object) -> int | None:
    """Returns the VM that a change is about, None if it names none."""
    return reply.id if isinstance(reply, VmRow) else getattr(message, "vm_id", None)


@decides
def _store_refusal(stage: Stage, message: messages.StoreRefusal) -> None:
    stage.put_result(message.key, message.refusal)


# VMs


@decides
def _create(stage: Stage, message: messages.CreateRow) -> VmRow:
    request = message.request
    check_name(request.name, "name")
    plugin = _plugin(stage, Key(message.project, check_name(request.plugin, "plugin")))
    if not plugin.enabled:
        raise Problem(
            409,
            "plugin-disabled",
            f"plugin {request.plugin!r} is disabled",
            field="plugin",
            hint=f"`volar plugins enable {request.plugin}` enables it",
        )
    manifest = message.manifest or plugin.manifest
    row = new_row(
        request,
        manifest,
        project=message.project,
        project_egress=require_project(stage, message.project).egress,
        vm_id=stage.last_vm_id + 1,
        now=stage.now,
        networking=stage.networking,
        movable=message.movable,
    )
    row = msgspec.structs.replace(row, volumes=tuple(_known(stage, row, mount) for mount in row.volumes))
    check_volumes_free(row, stage.all_rows(), stage.volumes.values())
    _check_secrets(stage, row, lambda variable: "secrets" if variable is None else f"env.{variable}")
    move = None if row.movable is None else row.movable.move
    taken_over = move and f"{move.to_host} has taken it over from {move.from_host}, which gives no sign of life"
    row = _put_new(stage, [row], taken_over or "created")[0]
    if message.starts:
        _begin(stage, row)
    return row


def _begin(stage: Stage, row: VmRow) -> None:
    """Begin the first boot of a new VM, which does not wait as the daemon does not drain."""
    # The client has asked for the VM; that it starts follows.
    stage.cause = None
    steps = decide_steps(row, Woke(None), stage.now)
    last = steps[-1].row
    assert last is not None
    stage.put_row(msgspec.structs.replace(last, revision=row.revision + 1), row.revision)
    _add_events(stage, row, steps)


@decides
def _restore(stage: Stage, message: messages.RestoreRow) -> VmRow:
    request = message.request
    check_name(request.name, "name")
    snapshot = stage.snapshots.get(Key(message.project, request.from_snapshot))
    if snapshot is None:
        raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
    whole = [_made_ready(stage, volume.key, volume.id) for volume in message.volumes.values()]
    row = restored_row(request, snapshot, vm_id=stage.last_vm_id + 1, now=stage.now, volumes=message.volumes)
    check_unchanged(row, stage.volumes.values())
    check_volumes_free(row, stage.all_rows(), stage.volumes.values())
    _check_secrets(stage, row, lambda variable: "from_snapshot")
    row = _put_new(stage, [row], f"created from snapshot {snapshot.name}")[0]
    for volume in whole:
        stage.put(volume)
    return row


@decides
def _arrive(stage: Stage, message: messages.ArriveRow) -> VmRow:
    snapshot = stage.snapshots.get(message.named)
    if snapshot is None or not snapshot.move or snapshot.vm.leaving is None:
        raise no_such_snapshot(message.named.name)
    before = stage.vm(snapshot.vm.key)
    if before is not None and before.arrived == snapshot.move:
        return before
    if snapshot.status != "ready":
        raise Problem(409, "snapshot-not-ready", f"snapshot {snapshot.name!r} is being made", hint="try again later")
    row = arrived_row(snapshot, vm_id=stage.last_vm_id + 1, epoch=message.epoch, now=stage.now)
    _check_secrets(stage, row, lambda variable: "secrets" if variable is None else f"env.{variable}")
    leaving = snapshot.vm.leaving
    text = f"moved from {leaving.from_host}, with {'its disk' if is_at_rest(row) else 'memory and disk'}"
    if leaving.replica:
        taken = leaving.at.strftime("%Y-%m-%d %H:%M:%S UTC")
        text = (
            f"{leaving.to_host} continues it from its replica of {taken}, as {leaving.from_host} gives no sign of life"
        )
    return _put_new(stage, [row], text, is_new=False)[0]


@decides
def _count_build(stage: Stage, message: messages.CountBuild) -> None:
    check_vms_fit(stage, [message.row])
    stage.new_creates[message.row.project] += 1


@decides
def _fork(stage: Stage, message: messages.ForkRow) -> tuple[VmRow, ...]:
    request = message.request
    check_fork(request)
    vm = _vm(stage, message.vm_id)
    check_copyable(vm)
    taken = frozenset(row.name for row in stage.all_rows() if row.project == vm.project)
    names = fork_names(request, vm.name, taken)
    origin = Origin("fork", vm.name, vm.id, paused_ms=message.paused_ms)
    copies = _put_new(
        stage,
        [
            copied_row(vm, vm_id=vm_id, name=name, origin=origin, checkpoint=message.checkpoint, now=stage.now)
            for vm_id, name in enumerate(names, stage.last_vm_id + 1)
        ],
        f"created as a fork of VM {vm.name}",
    )
    event_id = stage.next_event_id()
    forked = forked_event(vm, names, message.paused_ms, event_id=event_id, now=stage.now, cause=stage.cause)
    stage.add_event(event_id, forked)
    return copies


def _put_new(stage: Stage, rows: Sequence[VmRow], message: str, *, is_new: bool = True) -> tuple[VmRow, ...]:
    """Puts rows of new VMs, each with its lease, all or none. With `is_new` False, their project already had them on
    another host, so they are in its limits."""
    for row in rows:
        _check_free(stage, row)
        if stage.drain is not None:
            raise draining(stage.drain, vm=row.name)
    if is_new:
        check_vms_fit(stage, rows)
    else:
        require_project(stage, rows[0].project)
    leases: list[Lease] = []
    new = [msgspec.structs.replace(_connected(stage, row, leases), revision=1) for row in rows]
    if leases:
        stage.taken_up_to = leases[-1].address
    if is_new:
        stage.new_creates[rows[0].project] += len(rows)
    for row in new:
        check_transition(None, row.status)
        stage.put_row(row, None)
        stage.add_events(None, row, message)
    return tuple(new)


def _connected(stage: Stage, row: VmRow, leases: list[Lease]) -> VmRow:
    """Returns the row with its lease, and adds a lease on the bridge to `leases`.

    :raises Problem: 404, there is no such network; 409, the port is taken or the network refused; 503, the host can't
        have the network.
    """
    networking = stage.networking
    kind = kind_of(row.network)
    if is_named(row.network) and stage.networks.get(row.network_key) is None:
        raise no_such_network(row.network, field="network")
    if kind == USER and networking.user_refused:
        raise refused(networking.user_refused, vm=row.name)
    obstacle = networking.obstacles.get(kind)
    if obstacle is not None:
        raise unavailable(NetworkChoice(row.network, row.network_reason), obstacle, vm=row.name)
    unrestricted = networking.egress_obstacles.get(kind)
    if unrestricted is not None and is_restricted(row.egress):
        raise egress_unavailable(unrestricted, vm=row.name)
    if row.ports:
        others = ((other.key, port) for other in stage.all_rows() for port in other.ports)
        check_ports_free(row.project, row.ports, others)
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


@decides
def _commit(stage: Stage, message: messages.CommitSteps) -> VmRow | None:
    vm_id, revision, steps = message.vm_id, message.revision, message.steps
    before = stage.by_id(vm_id)
    if before is None or before.revision != revision:
        raise StaleRow(vm_id, revision, before)
    if not steps:
        return before
    status = before.status
    for step in steps:
        if step.row is not None and (step.row.id != vm_id or step.row.key != before.key):
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
        if last.volumes and last.tag and not before.tag:
            last = _open_volumes(stage, last)
        if kind_of(last.network) == USER and last.status is Status.STARTING:
            # The daemon that created the VM may have had other possibilities than this one.
            last = msgspec.structs.replace(last, network_reason=stage.networking.reason_for(last.network_reason))
        stage.put_row(last, revision)
    _add_events(stage, before, steps)
    return last


@decides
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
            hint="it keeps running; `volar vms kill` ends it",
        ) from bad  # fmt: skip
    if stage.by_id(row.id) is not None:
        raise Problem(409, "vm-exists", f"there is a VM with the id {row.id} already", vm=row.name)
    require_project(stage, row.project)
    _check_free(stage, row)
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


def _check_free(stage: Stage, row: VmRow) -> None:
    if stage.vm(row.key) is not None:
        raise name_taken(row.name)


def _check_secrets(stage: Stage, row: VmRow, field_of: Callable[[str | None], str]) -> None:
    """Checks that the secrets of a VM exist. `field_of` returns the member that names a secret, by its environment
    variable, or None for a file. :raises Problem: 404, a secret does not exist."""
    wanted = [*row.secret_env.items(), *((None, file.name) for file in row.secrets)]
    for variable, name in wanted:
        if stage.secrets.get(Key(row.project, name)) is None:
            raise no_such_secret(name, field=field_of(variable))


# Volumes


def _known(stage: Stage, row: VmRow, mount: VolumeMount) -> VolumeMount:
    """Returns the mount with the id of its volume. :raises Problem: 404; 409 it is being made or deleted."""
    volume = stage.volumes.get(Key(row.project, mount.name))
    if volume is None:
        raise no_such_volume(mount.name, field="volumes")
    if volume.status != "ready":
        raise volume_not_ready(volume, field="volumes")
    return msgspec.structs.replace(mount, id=volume.id)


def _open_volumes(stage: Stage, row: VmRow) -> VmRow:
    """Opens the volumes of a VM that gets a process, and counts each volume that it writes to.

    :raises Problem: 409, another VM has one open, or a volume has changed since the copy of the VM's memory.
    """
    volumes = stage.volumes.values()
    check_volumes_free(row, stage.all_rows(), volumes, is_launched=True)
    if row.checkpoint is not None:
        check_unchanged(row, volumes)
    by_id = {volume.id: volume for volume in volumes}
    mounts = []
    for mount in row.volumes:
        volume = by_id.get(mount.id)
        # Without a row, after a restore, the boot fails when it looks for the file.
        if volume is not None and not mount.read_only:
            volume = msgspec.structs.replace(volume, writers=volume.writers + 1)
            stage.put(volume)
        mounts.append(mount if volume is None else msgspec.structs.replace(mount, writers=volume.writers))
    return msgspec.structs.replace(row, volumes=tuple(mounts))


@decides
def _begin_volume(stage: Stage, message: messages.BeginVolume) -> Volume:
    request = message.request
    check_create_volume(request)
    if stage.volumes.get(Key(message.project, request.name)) is not None:
        raise already_exists("volume", request.name, "choose another name, or delete that one first")
    if len(stage.volumes) >= MAX_ALL_VOLUMES:
        raise Problem(
            409, "too-many-volumes", f"there are {MAX_ALL_VOLUMES} volumes already, which is the limit",
            hint="delete one first",
        )  # fmt: skip
    source: Volume | None = None
    if isinstance(request, CloneVolume):
        source = _ready(stage, Key(message.project, message.source or ""))
        writer = writer_of(source.id, stage.all_rows())
        if writer is not None:
            raise Problem(
                409, "volume-in-use", f"VM {writer.name!r} writes to the volume {source.name!r}", vm=writer.name,
                hint="stop the VM first: a volume can't be copied while a VM writes to it",
            )  # fmt: skip
        size_mb = source.size_mb
    else:
        size_mb = request.size_mb
    check_count("volume", stage.volumes.values(), message.project, MAX_VOLUMES_OF_PROJECT)
    check_fits(stage, message.project, disk_mb=size_mb)
    volume = Volume(
        id=message.volume_id,
        name=request.name,
        project=message.project,
        size_mb=size_mb,
        labels=request.labels,
        created_at=stage.now,
        source=None if source is None else source.id,
    )
    stage.put(volume)
    return volume


@decides
def _finish_volume(stage: Stage, message: messages.FinishVolume) -> Volume:
    volume = _made_ready(stage, message.named, message.volume_id)
    stage.put(volume)
    return volume


def _made_ready(stage: Stage, key: Key, volume_id: str) -> Volume:
    """Returns the row of a volume with a complete file, as `ready`. :raises Problem: 404; 409, it is being deleted."""
    volume = stage.volumes.get(key)
    if volume is None or volume.id != volume_id:
        raise no_such_volume(key.name)
    if volume.status == "deleting":
        raise volume_not_ready(volume)
    return msgspec.structs.replace(volume, status="ready")


@decides
def _resize_row(stage: Stage, message: messages.ResizeRow) -> Volume:
    volume = _ready(stage, message.named)
    if volume.id != message.volume_id:
        raise no_such_volume(message.named.name)
    if message.size_mb < volume.size_mb:
        raise Problem(
            409,
            "volume-would-shrink",
            f"volume {volume.name!r} has {volume.size_mb} MiB, and can't shrink to {message.size_mb}",
            field="size_mb",
            hint="copy its content to a smaller volume in a VM that mounts both",
        )
    _check_not_copied(stage, volume)
    if message.size_mb != volume.size_mb:
        check_fits(stage, volume.project, disk_mb=message.size_mb - volume.size_mb)
        volume = msgspec.structs.replace(volume, size_mb=message.size_mb)
        stage.put(volume)
    return volume


@decides
def _begin_removal(stage: Stage, message: messages.BeginRemovalOfVolume) -> Volume:
    volume = stage.volumes.get(message.named)
    if volume is None:
        raise no_such_volume(message.named.name)
    if volume.status == "creating":
        raise volume_not_ready(volume)
    if volume.status == "deleting":
        # That is decided: a request that is repeated after a kill of the daemon completes it.
        return volume
    check_unused("volume", volume.name, users_of(volume.id, stage.all_rows()), "delete them first")
    _check_not_copied(stage, volume)
    volume = msgspec.structs.replace(volume, status="deleting")
    stage.put(volume)
    return volume


@decides
def _abandon_volume(stage: Stage, message: messages.AbandonVolume) -> Volume | None:
    volume = stage.volumes.get(message.named)
    if volume is None or volume.id != message.volume_id:
        return None
    if volume.status == "creating":
        volume = msgspec.structs.replace(volume, status="deleting")
        stage.put(volume)
    return volume


@decides
def _forget_volume(stage: Stage, message: messages.ForgetVolume) -> None:
    volume = stage.volumes.get(message.named)
    if volume is not None and volume.id == message.volume_id and volume.status == "deleting":
        stage.drop(volume)


def _ready(stage: Stage, key: Key) -> Volume:
    volume = stage.volumes.get(key)
    if volume is None:
        raise no_such_volume(key.name)
    if volume.status != "ready":
        raise volume_not_ready(volume)
    return volume


def _check_not_copied(stage: Stage, volume: Volume) -> None:
    for copy in stage.volumes.values():
        if copy.source == volume.id and copy.status == "creating":
            raise Problem(
                409, "volume-in-use", f"volume {volume.name!r} is being copied to {copy.name!r}",
                hint="try again once that is done",
            )  # fmt: skip


# Snapshots


@decides
def _begin_snapshot(stage: Stage, message: messages.BeginSnapshot) -> Snapshot:
    vm = _vm(stage, message.vm_id)
    return _put_snapshot(
        stage, new_snapshot(message.request, vm, snapshot_id=message.snapshot_id, now=stage.now, move=message.move)
    )


@decides
def _add_snapshot(stage: Stage, message: messages.AddSnapshot) -> Snapshot:
    return _put_snapshot(stage, message.snapshot)


def _put_snapshot(stage: Stage, snapshot: Snapshot) -> Snapshot:
    """Puts a new snapshot. One of a move or a replica counts for no limit."""
    if stage.snapshots.get(snapshot.key) is not None:
        raise already_exists("snapshot", snapshot.name, "choose another name, or delete that one first")
    if not snapshot.move:
        check_fits(stage, snapshot.project, snapshots=1)
    stage.put(snapshot)
    return snapshot


@decides
def _finish_snapshot(stage: Stage, message: messages.FinishSnapshot) -> Snapshot:
    snapshot = stage.snapshots.get(message.named)
    if snapshot is None or snapshot.id != message.snapshot_id:
        raise no_such_snapshot(message.named.name)
    was_taken = snapshot.status == "ready"
    snapshot = msgspec.structs.replace(
        snapshot, status="ready", paused_ms=message.paused_ms, size_bytes=message.size_bytes
    )
    stage.put(snapshot)
    # Replicas come and go by themselves, often.
    if not was_taken and snapshot.is_listed:
        of = EventType.SNAPSHOT_PULLED if snapshot.source else EventType.SNAPSHOT_TAKEN
        _add_snapshot_event(stage, of, snapshot, snapshot.source or None)
    return snapshot


@decides
def _note_push(stage: Stage, message: messages.NotePush) -> None:
    snapshot = stage.snapshots.get(message.named)
    if snapshot is not None and snapshot.id == message.snapshot_id:
        _add_snapshot_event(stage, EventType.SNAPSHOT_PUSHED, snapshot, message.reference)


@decides
def _remove_snapshot(stage: Stage, message: messages.RemoveSnapshot) -> None:
    snapshot = stage.snapshots.get(message.named)
    if snapshot is None or snapshot.id != message.snapshot_id:
        return
    users = [row.name for row in stage.all_rows() if waits_for(row, snapshot.checkpoint)]
    if users:
        raise Problem(
            409,
            "snapshot-in-use",
            f"VM {users[0]!r} is about to continue from snapshot {snapshot.name!r}",
            hint="wait until it runs, or delete it",
        )
    stage.drop(snapshot)
    if snapshot.status == "ready" and snapshot.is_listed:
        _add_snapshot_event(stage, EventType.SNAPSHOT_DELETED, snapshot)


def _add_snapshot_event(stage: Stage, of: EventType, snapshot: Snapshot, reference: str | None = None) -> None:
    event_id, vm = stage.next_event_id(), stage.by_id(snapshot.vm.id)
    facts: dict[str, Any] = {"event_id": event_id, "now": stage.now, "cause": stage.cause, "reference": reference}
    stage.add_event(event_id, snapshot_event(of, snapshot, vm, **facts))


# Plugins


@decides
def _install_plugin(stage: Stage, message: messages.InstallPlugin) -> Plugin:
    manifest = message.manifest
    check_manifest(manifest)
    if stage.plugin(Key(message.project, manifest.name)) is not None:
        raise already_exists(
            "plugin", manifest.name, "delete that one first; VMs keep the manifest that they were created with"
        )
    require_project(stage, message.project)
    check_count("plugin", stage.installed_plugins(), message.project, MAX_PLUGINS)
    plugin = Plugin(manifest, True, stage.now, message.project)
    stage.put(plugin)
    return plugin


@decides
def _remove_plugin(stage: Stage, message: messages.RemovePlugin) -> None:
    plugin = _changeable_plugin(stage, message.named, "removed")
    users = [row for row in stage.all_rows() if (row.project, row.plugin) == message.named]
    check_unused("plugin", plugin.name, users, "delete them first, or disable the plugin")
    stage.drop(plugin)


@decides
def _enable_plugin(stage: Stage, message: messages.EnablePlugin) -> Plugin:
    plugin = _changeable_plugin(stage, message.named, "disabled")
    if plugin.enabled is not message.enabled:
        plugin = msgspec.structs.replace(plugin, enabled=message.enabled)
        stage.put(plugin)
    return plugin


def _plugin(stage: Stage, key: Key) -> Plugin:
    plugin = stage.plugin(key)
    if plugin is None:
        raise no_such_plugin(key.name, field="plugin")
    return plugin


def _changeable_plugin(stage: Stage, key: Key, change: str) -> Plugin:
    plugin = _plugin(stage, key)
    if key.name == BASE.name:
        raise Problem(409, "plugin-built-in", f"plugin {key.name!r} is built in and can't be {change}")
    return plugin


# Networks


@decides
def _add_network(stage: Stage, message: messages.AddNetwork) -> Network:
    network = new_network(message.request, project=message.project, now=stage.now)
    if stage.networks.get(network.key) is not None:
        raise already_exists("network", network.name, "choose another name; VMs that are created with this one join it")
    require_project(stage, message.project)
    obstacle = stage.networking.obstacles.get(BRIDGE)
    if obstacle is not None:
        raise Problem(503, "network-unavailable", f"this host can't have named networks: {obstacle}")
    check_count("network", stage.networks.values(), message.project, MAX_NETWORKS_OF_PROJECT)
    if len(stage.networks) >= MAX_NETWORKS:
        raise Problem(
            409, "too-many-networks", f"there are {MAX_NETWORKS} networks already, which is the limit",
            hint="`volar networks delete` deletes networks without VMs",
        )  # fmt: skip
    stage.put(network)
    return network


@decides
def _remove_network(stage: Stage, message: messages.RemoveNetwork) -> None:
    network = stage.networks.get(message.named)
    if network is None:
        raise no_such_network(message.named.name)
    members = [row for row in stage.all_rows() if row.network_key == message.named]
    check_unused("network", network.name, members, "delete them first")
    stage.drop(network)


# Objects that the hosts of a fleet share


@decides
def _take_definitions(stage: Stage, message: messages.TakeDefinitions) -> object:
    take(stage, message.changes)
    return message.reply


# Audit


@decides
def _write_record(stage: Stage, message: messages.WriteRecord) -> None:
    """Does nothing itself: `decide` puts the record."""


# Maintenance


@decides
def _set_drain(stage: Stage, message: messages.SetDrain) -> Drain:
    """A repeated message keeps the time of the first one, and its grace unless there is another."""
    before = stage.drain or Drain(stage.now)
    grace_s = before.stop_grace_s if message.stop_grace_s is None else message.stop_grace_s
    drain = Drain(before.since, grace_s)
    stage.put_drain(drain)
    return drain


@decides
def _end_drain(stage: Stage, message: messages.EndDrain) -> None:
    stage.put_drain(None)


# Images


@decides
def _add_image_event(stage: Stage, message: messages.AddImageEvent) -> None:
    event_id = stage.next_event_id()
    stage.add_event(
        event_id,
        image_event(
            message.type, message.image, message.message, project=message.project, event_id=event_id, now=stage.now
        ),
    )


def check_count(kind: str, there: Iterable[Named], project: str, most: int) -> None:
    """Checks the maximum number of objects of one kind in a project. All of them are in memory. :raises Problem: 409,
    the maximum is reached."""
    if sum(one.project == project for one in there) >= most:
        raise Problem(
            409, f"too-many-{kind}s", f"the project has {most} {kind}s already, which is the limit",
            hint="delete one first",
        )  # fmt: skip


def check_unused(kind: str, name: str, users: Sequence[VmRow], hint: str) -> None:
    """Checks that an object has no users. :raises Problem: 409, it has users."""
    if users:
        names = sorted(row.name for row in users)
        used = f"{kind} {name!r} is in use by {len(names)} VM{'s' if len(names) > 1 else ''}: {first_few(names)}"
        raise Problem(409, f"{kind}-in-use", used, hint=hint)
