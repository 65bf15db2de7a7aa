"""Snapshots and forks: copies of a running guest. A snapshot stays; a fork's checkpoint goes once its copies run."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from ._problem import Problem, invalid, name_taken
from ._row import SNAPSHOT, BootMode, Origin, RestartPolicy, Status, VmRow
from ._spec import parse_ttl
from ._text import Duration, Labels, Name, Plain, Time, check_labels, check_name, check_plain

MAX_COPIES = 32
"""Of one fork."""
_NAME_CHARACTERS = 63

Cores = Annotated[int, msgspec.Meta(ge=1, le=256)]
MemoryMb = Annotated[int, msgspec.Meta(ge=64, le=16 * 1024 * 1024)]


class TakeSnapshot(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms/{name}/snapshots`."""

    name: Name | None = None
    """None: the VM's name and the time."""
    description: Plain = ""
    labels: Labels = {}


class ForkVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms/{name}/fork`."""

    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)] | None = None
    """The number of copies. None: the number of names, or one."""
    names: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_COPIES)] | None = None
    """Names of the copies. None: `<name>-fork-1` and so on, as far as they are free."""


class RestoreVm(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The body of `POST /api/v1/vms` for a VM that continues from a snapshot. Members that the snapshot decides may be
    left out, and must agree otherwise."""

    name: Name
    from_snapshot: Name
    cpu_cores: Cores | None = None
    memory_mb: MemoryMb | None = None
    plugin: Name | None = None
    labels: Labels = {}
    restart_policy: RestartPolicy = "never"
    boot: BootMode = "auto"
    """For the boots after the first one."""
    ttl: Duration | None = None
    """A duration from `1s` to `366d`. The VM is deleted so long after its creation."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The durable state of a snapshot. Only the journal stores it."""

    id: str
    """The name of its directory, which is never used again."""
    name: str
    status: Literal["creating", "ready"] = "creating"
    vm: VmRow
    """The row of its VM at that time."""
    description: str = ""
    labels: dict[str, str] = {}
    created_at: datetime
    paused_ms: float | None = None
    """How long the guest was paused."""
    size_bytes: int = 0
    """The size on the disk."""

    @property
    def checkpoint(self) -> str:
        """The name of its checkpoint."""
        return f"{SNAPSHOT}{self.id}"


class SnapshotView(msgspec.Struct, frozen=True, kw_only=True):
    """The view of a snapshot that clients get."""

    name: str
    status: Literal["creating", "ready"]
    vm: str
    """The name of its VM, which may be gone."""
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
    """The size on the disk; 0 until it is ready."""


def snapshot_view(snapshot: Snapshot) -> SnapshotView:
    """Returns what clients see of `snapshot`."""
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
    )


def new_snapshot(request: TakeSnapshot, vm: VmRow, *, snapshot_id: str, now: datetime) -> Snapshot:
    """Returns the row of a new snapshot of `vm`. :raises Problem: 400; 409 see `check_copyable`."""
    check_take(request)
    check_copyable(vm)
    name = request.name
    if name is None:
        name = f"{vm.name[:40].rstrip('-')}-{now:%Y%m%d-%H%M%S}-{snapshot_id[:4]}"
    return Snapshot(
        id=snapshot_id,
        name=check_name(name, "name"),
        vm=vm,
        description=request.description,
        labels=request.labels,
        created_at=now,
    )


def copied_row(vm: VmRow, *, vm_id: int, name: str, origin: Origin, checkpoint: str, now: datetime) -> VmRow:
    """Returns the row of a new VM that continues from a checkpoint of `vm`, with the status `pending`."""
    return VmRow(
        id=vm_id,
        name=name,
        cpu_cores=vm.cpu_cores,
        memory_mb=vm.memory_mb,
        plugin=vm.plugin,
        runtime=vm.runtime,
        manifest=vm.manifest,
        kernel_cmdline=vm.kernel_cmdline,
        labels=vm.labels,
        env=vm.env,
        restart_policy=vm.restart_policy,
        boot=vm.boot,
        created_at=now,
        updated_at=now,
        expires_at=vm.expires_at,
        layer=f"{vm_id}-{now:%Y%m%dT%H%M%S.%f}" if vm.layer else "",
        # Its machine has a NIC or none, as its origin's; an address and ports of the host can't be had twice.
        network=vm.network,
        network_reason=f"VM {vm.name}, which it is a copy of, has it",
        image=vm.image,
        balloon=vm.balloon,
        origin=origin,
        checkpoint=checkpoint,
    )


def restored_row(request: RestoreVm, snapshot: Snapshot, *, vm_id: int, now: datetime) -> VmRow:
    """Returns the row of a new VM that continues from `snapshot`. :raises Problem: 400; 409 it is not ready."""
    check_restore(request)
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
    origin = Origin("snapshot", vm.name, vm.id, snapshot.name, snapshot.paused_ms)
    row = copied_row(vm, vm_id=vm_id, name=request.name, origin=origin, checkpoint=snapshot.checkpoint, now=now)
    return msgspec.structs.replace(
        row,
        labels=labels,
        restart_policy=request.restart_policy,
        boot=request.boot,
        expires_at=None if ttl is None else now + ttl,
    )


def fork_names(request: ForkVm, vm: str, taken: frozenset[str]) -> tuple[str, ...]:
    """Returns the names of the copies. :raises Problem: 409 one is taken."""
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
    """Checks what the types of `ForkVm` can't say. :raises Problem: 400 that names the field."""
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
    """Checks what the types of `TakeSnapshot` can't say. :raises Problem: 400 that names the field."""
    if request.name is not None:
        check_name(request.name, "name")
    check_plain(request.description, "description")
    check_labels(request.labels)


def check_restore(request: RestoreVm) -> None:
    """Checks what the types of `RestoreVm` can't say. :raises Problem: 400 that names the field."""
    check_name(request.name, "name")
    check_name(request.from_snapshot, "from_snapshot")
    if request.plugin is not None:
        check_name(request.plugin, "plugin")
    check_labels(request.labels)
    parse_ttl(request.ttl)


def check_copyable(vm: VmRow) -> None:
    """:raises Problem: 409 the guest can't be copied."""
    if not is_copyable(vm):
        shown = vm.status.value if vm.desired.value == vm.status.value else f"{vm.status.value}, to be {vm.desired}"
        raise Problem(
            409,
            "vm-not-running",
            f"VM {vm.name!r} is {shown}, and can be copied while it is running or paused",
            vm=vm.name,
            hint="wait until it runs" if vm.status is Status.STARTING else f"`volar vms start {vm.name}` starts it",
        )


def is_copyable(vm: VmRow) -> bool:
    """Returns whether the guest runs or is paused, and should stay so."""
    return vm.status in (Status.RUNNING, Status.PAUSED) and vm.desired.value == vm.status.value and not vm.phase


def waits_for(vm: VmRow, checkpoint: str) -> bool:
    """Returns whether a VM is about to continue from a checkpoint."""
    return vm.checkpoint == checkpoint and vm.status in (Status.PENDING, Status.STARTING)


def no_such_snapshot(name: str, *, field: str | None = None) -> Problem:
    """Returns the 404 for the name of a snapshot."""
    return Problem(
        404, "snapshot-not-found", f"there is no snapshot named {name[:80]!r}", field=field,
        hint="`volar snapshots list` shows what there is",
    )  # fmt: skip
