"""Snapshots and forks: copies of a running guest. A snapshot is kept; a fork's checkpoint is removed once its copies
run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from ._effects import is_at_rest
from ._problem import Problem, invalid, name_taken
from ._project import DEFAULT_PROJECT, Key
from ._row import REPLICA, SNAPSHOT, BootMode, Origin, RestartPolicy, Status, VmRow
from ._secret import secrets_of
from ._spec import parse_ttl
from ._text import Duration, Labels, Name, Plain, Time, check_labels, check_name, check_plain
from ._volume import Volume, VolumeMount

MAX_COPIES = 32
"""Maximum copies per fork."""
FIRST_FOREIGN_ID = 10**14
"""The first VM id for VMs of pulled snapshots: far above the ids of any host's VMs."""
_NAME_CHARACTERS = 63

SnapshotReference = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=1024, description="In a registry: `registry:5000/team/app:tag`"),
]
Cores = Annotated[int, msgspec.Meta(ge=1, le=256)]
MemoryMb = Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)]


class TakeSnapshot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms/{name}/snapshots`."""

    name: Name | None = None
    """The snapshot's name; by default the VM's name and the time."""
    description: Plain = ""
    labels: Labels = {}
    volumes: bool = False
    """Whether to copy the volumes that the VM writes to as well. The guest is paused for the copy."""


class ForkVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms/{name}/fork`."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)] | None = None
    """The number of copies. Null for the number of names, or one."""
    names: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_COPIES)] | None = None
    """The names of the copies. Null for `<name>-fork-1` and so on, skipping names in use."""


class RestoreVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms` for a VM that continues from a snapshot. Members that the snapshot decides may be
    left out; otherwise they must match."""

    name: Name
    from_snapshot: Name
    cpu_cores: Cores | None = None
    memory_mb: MemoryMb | None = None
    plugin: Name | None = None
    labels: Labels = {}
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    """The boot mode after the first boot."""
    ttl: Duration | None = None
    """The lifetime after which the VM is deleted: a duration from `1s` to `366d`."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The durable state of a snapshot. Only the journal stores it."""

    id: str
    """The name of its directory, which is never used again."""
    name: str
    status: Literal["creating", "ready"] = "creating"
    vm: VmRow
    """The VM's row at that time."""
    volumes: bool = False
    """Whether it has the volumes that the VM wrote to."""
    description: str = ""
    labels: dict[str, str] = {}
    created_at: datetime
    paused_ms: float | None = None
    """How long the guest was paused."""
    size_bytes: int = 0
    """The size on disk."""
    move: str = ""
    """The id of the move or the replica that it is part of, and with which it is removed; empty if it is part of
    none."""
    source: str = ""
    """The reference and the digest that it was pulled from; empty if it was taken on this host. The VM of a pulled
    snapshot was never here, and has an id that no VM of this host gets."""

    @property
    def project(self) -> str:
        return self.vm.project

    @property
    def key(self) -> Key:
        """Its project and name."""
        return Key(self.project, self.name)

    @property
    def checkpoint(self) -> str:
        """The name of its checkpoint."""
        return f"{SNAPSHOT}{self.id}"

    @property
    def is_replica(self) -> bool:
        """Whether it is a replica, for a failover."""
        return bool(self.move) and self.name.startswith(REPLICA)

    @property
    def has_memory(self) -> bool:
        """Whether a VM can continue from it. Otherwise it has only the disk of a VM at rest that moves to another
        host."""
        return not self.move or not is_at_rest(self.vm)

    @property
    def is_listed(self) -> bool:
        """Whether clients see it in lists and events. Otherwise it belongs to a move or a replica."""
        return self.has_memory and not self.is_replica


class PushSnapshot(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The destination of a snapshot."""

    reference: SnapshotReference
    registry_secret: Name | None = None
    """A secret of the project: an auth file with credentials for the registry, instead of `Volant-Registry-Auth`."""


class PullSnapshot(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The snapshot to pull."""

    reference: SnapshotReference
    name: Name | None = None
    """Its name on this host. Null for its name when it was pushed."""
    registry_secret: Name | None = None
    """A secret of the project: an auth file with credentials for the registry, instead of `Volant-Registry-Auth`."""


class RegistrySnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot in a registry."""

    reference: str
    """The complete reference."""
    digest: str
    """The digest of its manifest, as `sha256:…`. It always identifies this snapshot."""
    size_bytes: int
    """The size of its chunks, before compression."""
    sent_bytes: int
    """The bytes sent, because the registry lacked them."""
    chunks: int
    sent_chunks: int
    """The number of chunks sent, because the registry lacked them."""


class TransferView(msgspec.Struct, frozen=True, kw_only=True):
    """A transfer of a snapshot to or from a registry."""

    kind: Literal["push", "pull"]
    project: str
    snapshot: str
    """The snapshot's name here; empty until known."""
    reference: str
    phase: Literal["waiting", "preparing", "moving", "finishing"]
    """`preparing`: files are read, or the layers and templates that the snapshot needs are fetched."""
    done_bytes: int
    """The size of the chunks that have arrived, before compression."""
    total_bytes: int
    """The size of all chunks; 0 if not known yet."""
    moved_bytes: int
    """The bytes sent or received, as transferred."""
    done_chunks: int
    total_chunks: int
    moved_chunks: int


class SnapshotView(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot as the API shows it."""

    name: str
    status: Literal["creating", "ready"]
    vm: str
    """The name of its VM, which may be deleted."""
    vm_id: int
    plugin: str
    cpu_cores: int
    memory_mb: int
    disk: Literal["none", "overlay"]
    description: str
    labels: Mapping[str, str]
    created_at: Time
    paused_ms: float | None
    """How long the guest was paused."""
    size_bytes: int
    """The size on disk; 0 until it is ready."""
    volumes: tuple[str, ...] = ()
    """The names of the volumes that it has copies of. A VM that continues from it gets volumes of its own."""
    secrets: tuple[str, ...] = ()
    """The names of its VM's secrets. Their values may be in the memory and on the disk of the snapshot."""
    project: str = DEFAULT_PROJECT
    source: str | None = None
    """The reference and digest that it was pulled from; null if it was taken on this host."""


def snapshot_view(snapshot: Snapshot) -> SnapshotView:
    """Returns the view of `snapshot`."""
    vm = snapshot.vm
    return SnapshotView(
        name=snapshot.name,
        status=snapshot.status,
        vm=vm.name,
        vm_id=vm.id,
        plugin=vm.plugin,
        cpu_cores=vm.cpu_cores,
        memory_mb=vm.memory_mb,
        disk="overlay" if vm.layer else "none",
        description=snapshot.description,
        labels=snapshot.labels,
        created_at=snapshot.created_at,
        paused_ms=snapshot.paused_ms,
        size_bytes=snapshot.size_bytes,
        volumes=tuple(mount.name for mount in copied_volumes(snapshot)),
        secrets=secrets_of(vm),
        project=snapshot.project,
        source=snapshot.source or None,
    )


def copied_volumes(snapshot: Snapshot) -> tuple[VolumeMount, ...]:
    """Returns the volumes that a snapshot has copies of, as its VM mounted them."""
    return written_volumes(snapshot.vm) if snapshot.volumes else ()


def written_volumes(vm: VmRow) -> tuple[VolumeMount, ...]:
    """Returns the volumes that a VM may write to."""
    return tuple(mount for mount in vm.volumes if not mount.read_only)


def name_of_copy(vm: str, volume: str) -> str:
    """Returns the name of the VM's own copy of a snapshot's volume."""
    return f"{vm}-{volume}"[:_NAME_CHARACTERS].rstrip("-")


def snapshot_name(vm: VmRow, snapshot_id: str, now: datetime) -> str:
    """Returns the default name of a snapshot."""
    return f"{vm.name[:40].rstrip('-')}-{now:%Y%m%d-%H%M%S}-{snapshot_id[:4]}"


def new_snapshot(request: TakeSnapshot, vm: VmRow, *, snapshot_id: str, now: datetime, move: str = "") -> Snapshot:
    """Returns the row of a new snapshot of `vm`, which may also be at rest if it is for a move. :raises Problem: 400;
    409, see `check_copyable`."""
    check_take(request)
    if not move or not is_at_rest(vm):
        check_copyable(vm, volumes=request.volumes)
    name = request.name or snapshot_name(vm, snapshot_id, now)
    return Snapshot(
        id=snapshot_id,
        name=check_name(name, "name"),
        vm=vm,
        volumes=request.volumes,
        description=request.description,
        labels=request.labels,
        created_at=now,
        move=move,
    )


def copied_row(vm: VmRow, *, vm_id: int, name: str, origin: Origin, checkpoint: str, now: datetime) -> VmRow:
    """Returns the row of a new VM that continues from a checkpoint of `vm`, with the status `pending`."""
    return VmRow(
        id=vm_id,
        name=name,
        project=vm.project,
        cpu_cores=vm.cpu_cores,
        memory_mb=vm.memory_mb,
        plugin=vm.plugin,
        runtime=vm.runtime,
        manifest=vm.manifest,
        start_workload=vm.start_workload,
        # Its agent is asked for the same workload as that of its origin.
        attach=vm.waits_for_client,
        kernel_cmdline=vm.kernel_cmdline,
        labels=vm.labels,
        env=vm.env,
        secret_env=vm.secret_env,
        secrets=vm.secrets,
        registry_secret=vm.registry_secret,
        restart_policy=vm.restart_policy,
        boot=vm.boot,
        created_at=now,
        updated_at=now,
        expires_at=vm.expires_at,
        layer=f"{vm_id}-{now:%Y%m%dT%H%M%S.%f}" if vm.layer else "",
        # Its machine has a NIC or none, as its origin's; an address and ports of the host can't be had twice.
        network=vm.network,
        network_reason=f"VM {vm.name}, which it is a copy of, has it",
        egress=vm.egress,
        volumes=vm.volumes,
        disk_iops=vm.disk_iops,
        disk_mbps=vm.disk_mbps,
        image=vm.image,
        balloon=vm.balloon,
        origin=origin,
        checkpoint=checkpoint,
    )


def restored_row(
    request: RestoreVm, snapshot: Snapshot, *, vm_id: int, now: datetime, volumes: Mapping[str, Volume]
) -> VmRow:
    """Returns the row of a new VM that continues from `snapshot`.

    :param volumes: the VM's own copies of `copied_volumes`, by the ids of the originals
    :raises Problem: 400; 409, it is not ready.
    """
    check_restore(request)
    if not snapshot.has_memory:
        raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
    if snapshot.status != "ready":
        raise Problem(
            409, "snapshot-not-ready", f"snapshot {snapshot.name!r} is still being taken", field="from_snapshot",
            hint="retry once it is `ready`",
        )  # fmt: skip
    vm = snapshot.vm
    for field in ("cpu_cores", "memory_mb", "plugin"):
        said, has = getattr(request, field), getattr(vm, field)
        if said is not None and said != has:
            raise invalid(
                field,
                f"{field} {said!r} is not what snapshot {snapshot.name!r} has: {has!r}",
                hint=f"leave {field} out: the snapshot decides it",
            )
    labels = {**vm.manifest.labels, **request.labels}
    check_labels(labels)
    ttl = parse_ttl(request.ttl)
    origin = Origin("snapshot", vm.name, vm.id, snapshot.name, snapshot.paused_ms, snapshot.id)
    row = copied_row(vm, vm_id=vm_id, name=request.name, origin=origin, checkpoint=snapshot.checkpoint, now=now)
    return msgspec.structs.replace(
        row,
        volumes=tuple(_own(mount, volumes) for mount in vm.volumes),
        labels=labels,
        restart_policy=request.restart_policy,
        boot=request.boot,
        expires_at=None if ttl is None else now + ttl,
    )


def _own(mount: VolumeMount, volumes: Mapping[str, Volume]) -> VolumeMount:
    volume = volumes.get(mount.id)
    if volume is None:
        return mount
    return msgspec.structs.replace(mount, id=volume.id, name=volume.name, writers=volume.writers)


def fork_names(request: ForkVm, vm: str, taken: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the copies. :raises Problem: 409, a name is in use."""
    if request.names is not None:
        for name in request.names:
            if name in taken:
                raise name_taken(name)
        return tuple(request.names)
    names: list[str] = []
    number = 0
    while len(names) < (request.count or 1):
        number += 1
        suffix = f"-fork-{number}"
        name = vm[: _NAME_CHARACTERS - len(suffix)].rstrip("-") + suffix
        if name not in taken:
            names.append(name)
    return tuple(names)


def check_fork(request: ForkVm) -> None:
    """Checks the rules that the types of `ForkVm` can't express. :raises Problem: 400 that names the field."""
    names = request.names
    if names is None:
        return
    for number, name in enumerate(names):
        check_name(name, f"names[{number}]")
        if name in names[:number]:
            raise invalid("names", f"{name!r} is there twice, and each copy needs a name of its own")
    if request.count is not None and request.count != len(names):
        raise invalid("count", f"count is {request.count}, and there are {len(names)} names", hint="leave count out")


def check_take(request: TakeSnapshot) -> None:
    """Checks the rules that the types of `TakeSnapshot` can't express. :raises Problem: 400 that names the field."""
    if request.name is not None:
        check_name(request.name, "name")
    check_plain(request.description, "description")
    check_labels(request.labels)


def check_restore(request: RestoreVm) -> None:
    """Checks the rules that the types of `RestoreVm` can't express. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_name(request.from_snapshot, "from_snapshot")
    if request.plugin is not None:
        check_name(request.plugin, "plugin")
    check_labels(request.labels)
    parse_ttl(request.ttl)


def check_copyable(vm: VmRow, *, volumes: bool = False) -> None:
    """Checks that a guest can be copied. :raises Problem: 409, it does not run, mounts a directory of the host, or
    writes to a volume without `volumes`, the flag for copying these too."""
    if not is_copyable(vm):
        shown = vm.status.value if vm.desired.value == vm.status.value else f"{vm.status.value}, to be {vm.desired}"
        raise Problem(
            409,
            "vm-not-running",
            f"VM {vm.name!r} is {shown}, and can be copied while it is running or paused",
            vm=vm.name,
            hint="wait until it runs" if vm.status is Status.STARTING else f"`volar vms start {vm.name}` starts it",
        )
    if vm.directories:
        raise Problem(
            409,
            "host-directory",
            f"VM {vm.name!r} mounts {vm.directories[0].source} of the host, which can't be copied with its memory",
            vm=vm.name,
            hint="create the VM without the directory, or keep the data in a volume",
        )
    written = written_volumes(vm)
    if written and not volumes:
        raise Problem(
            409,
            "volume-written",
            f"VM {vm.name!r} writes to the volume {written[0].name!r}, which its memory has parts of",
            vm=vm.name,
            hint="take a snapshot with its volumes (`volumes`, `volar vms snapshot --volumes`), or mount it read-only",
        )


def is_copyable(vm: VmRow) -> bool:
    """Returns whether the guest runs or is paused, and should stay in that state."""
    return vm.status in (Status.RUNNING, Status.PAUSED) and vm.desired.value == vm.status.value and not vm.phase


def has_disk_to_move(vm: VmRow) -> bool:
    """Returns whether a VM at rest has a disk to move. Otherwise it has none, or its first boot creates it."""
    has_booted = vm.boots > 0 and not has_failed_as_clone(vm)
    return bool(vm.layer) and (has_booted or vm.disk_from is not None)


def has_failed_as_clone(vm: VmRow) -> bool:
    """Returns whether the VM's only boot was a failed clone, which leaves a disk of unknown content."""
    return vm.fallback is not None and vm.boots == 1


def waits_for(vm: VmRow, checkpoint: str) -> bool:
    """Returns whether a VM is about to continue from a checkpoint, or its disk is there."""
    is_booting = vm.status in (Status.PENDING, Status.STARTING)
    return vm.disk_from == checkpoint or (vm.checkpoint == checkpoint and is_booting)


def no_such_snapshot(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a snapshot."""
    return Problem(
        404, "snapshot-not-found", f"there is no snapshot named {name[:80]!r}", field=field,
        hint="`volar snapshots list` shows what there is",
    )  # fmt: skip
