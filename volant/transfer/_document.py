"""The description of a snapshot for other hosts: its VM, its machine, the base of its disk, and its files.

The document only has the parts of the VM's row that a restored VM receives: no address, no process, no project. It is
not trusted, so it becomes a row only after the same checks as rows of a foreign database. Names of files and ids are
this host's own.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal

import msgspec

from volant.chunks import Description, check as check_description
from volant.hypervisor import MachineKind
from volant.model import (
    FIRST_FOREIGN_ID,
    Egress,
    Key,
    Manifest,
    Problem,
    SecretFile,
    Snapshot,
    VmRow,
    VolumeMount,
    check_env,
    check_labels,
    check_manifest,
    check_plain,
    copied_volumes,
    has_disk_to_move,
    is_at_rest,
)
from volant.model.stored import BadMember, check_stored_snapshot

from ._transfer import TransferError

MAX_DOCUMENT_BYTES = 4 * 1024 * 1024
MAX_STATE_BYTES = 16 * 1024 * 1024
"""Maximum size of the device state, the same as in the hypervisor's driver."""
MEMORY, STATE, LAYER = "memory", "state", "root.qcow2"
"""The files of a checkpoint."""
_MAX_TEXT = 4096
_MAX_WORD = 256

_Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=_MAX_TEXT)]


class Bases(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The base files of the snapshot besides the artifacts in the manifest, by digest."""

    boot_image: _Sha256 | None = None
    """The built image that the guest booted from."""
    kernel: _Sha256 | None = None
    """The file of the other host's setting `kernel`, if the guest booted from it; `initramfs` likewise."""
    initramfs: _Sha256 | None = None
    image_files: Annotated[tuple[_Sha256, ...], msgspec.Meta(max_length=256)] = ()
    """The files of an OCI image: its metadata and its layers, lowest first. The guest's memory has parts of them as
    laid out there, and another `mkfs.erofs` may lay out the same layers differently."""


class VolumeOfVm(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A volume whose copy is the file `volume-<n>`, with the number in the list."""

    name: _Text
    path: _Text
    nocopy: bool = False


class VmOfSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The data for a VM that continues from the snapshot. The members are those of `VmRow`."""

    id: int
    name: _Text
    created_at: datetime
    plugin: _Text
    runtime: _Text
    manifest: Manifest
    cpu_cores: int
    memory_mb: int
    disk_mb: int | None = None
    start_workload: bool = True
    attach: bool = False
    """Whether this boot's workload has waited for a client."""
    kernel_cmdline: _Text = ""
    labels: dict[str, str] = {}
    env: dict[str, str] = {}
    secret_env: dict[str, str] = {}
    secrets: tuple[SecretFile, ...] = ()
    restart_policy: Literal["never", "on-failure", "always"] = "never"
    boot: Literal["auto", "cold", "template"] = "auto"
    network: _Text = "none"
    egress: Egress
    volumes: tuple[VolumeOfVm, ...] = ()
    disk_iops: int | None = None
    disk_mbps: int | None = None
    balloon: bool = False
    template: _Text | None = None
    """The template of its own first boot: a template with the same digest has most of its memory."""


class SnapshotDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A snapshot."""

    version: int
    name: _Text
    description: _Text = ""
    labels: dict[str, str] = {}
    created_at: datetime
    paused_ms: float = 0.0
    architecture: _Text
    """The architecture of the host's processor."""
    machine: MachineKind | None = None
    """None for the disk of a VM at rest, which moves from one host of a fleet to another."""
    protocol: Annotated[int, msgspec.Meta(ge=1, le=10**6)] = 1
    """The newest protocol that the guest's agent is known to support."""
    vm: VmOfSnapshot
    bases: Bases
    files: Description


class _Head(msgspec.Struct, frozen=True):
    version: int


VERSION = 1


def file_names(snapshot: Snapshot) -> list[str]:
    """Returns the names of a snapshot's files in a document, in order."""
    volumes = range(len(copied_volumes(snapshot)))
    if is_at_rest(snapshot.vm):
        return [LAYER] if has_disk_to_move(snapshot.vm) else []
    return [MEMORY, STATE, *([LAYER] if snapshot.vm.layer else []), *(f"volume-{number}" for number in volumes)]


def document_of(
    snapshot: Snapshot, kind: MachineKind | None, protocol: int, bases: Bases, files: Description
) -> SnapshotDocument:
    """Returns the data of a snapshot for other hosts. :raises TransferError: `snapshot_elsewhere`"""
    vm = snapshot.vm
    copied = copied_volumes(snapshot)
    if elsewhere := [mount.name for mount in vm.volumes if mount not in copied]:
        raise TransferError(
            "snapshot_elsewhere",
            f"snapshot {snapshot.name!r} relies on the volume {elsewhere[0]!r} of this host, which it has no copy of",
            "take a snapshot with its volumes (`volar vms snapshot --volumes`) of a VM that mounts none read-only",
        )
    shared = {name: getattr(vm, name) for name in VmOfSnapshot.__struct_fields__ if name != "volumes"}
    shared["attach"] = vm.waits_for_client
    volumes = tuple(VolumeOfVm(name=mount.name, path=mount.path, nocopy=mount.nocopy) for mount in copied)
    return SnapshotDocument(
        version=VERSION,
        name=snapshot.name,
        description=snapshot.description,
        labels=snapshot.labels,
        created_at=snapshot.created_at,
        paused_ms=snapshot.paused_ms or 0.0,
        architecture=platform.machine(),
        machine=kind,
        protocol=protocol,
        vm=VmOfSnapshot(**shared, volumes=volumes),
        bases=bases,
        files=files,
    )


def encode(document: SnapshotDocument) -> bytes:
    """Returns the document as JSON. The same snapshot always has the same bytes."""
    return msgspec.json.encode(document, order="deterministic")


def decode(data: bytes, *, max_bytes: int) -> SnapshotDocument:
    """Parses an untrusted document, and checks its numbers.

    :param max_bytes: the maximum size of the files on disk
    :raises TransferError: `snapshot_invalid`, `snapshot_unsupported`, `snapshot_too_large` :raises ChunkError:
    """
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.version != VERSION:
            raise TransferError(
                "snapshot_unsupported",
                f"the snapshot has format {head.version}, and this version of Volant reads format {VERSION}",
                "update the daemon" if head.version > VERSION else "push it again with a present daemon",
            )
        document = msgspec.json.decode(data, type=SnapshotDocument)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _invalid(str(error)[:300]) from error
    check_description(document.files, max_bytes=max_bytes)
    sizes = {file.name: file.size for file in document.files.files}
    machine = document.machine
    if machine is None:
        if list(sizes) not in ([], [LAYER]):
            raise _invalid("it has other files than a disk")
        return document
    if max(len(machine.version), len(machine.machine)) > _MAX_WORD:
        raise _invalid("its kind of machine has a long text")
    volumes = [f"volume-{number}" for number in range(len(document.vm.volumes))]
    names = [MEMORY, STATE, *volumes]
    if list(sizes) not in (names, [MEMORY, STATE, LAYER, *volumes]):
        raise _invalid("it has other files than a snapshot")
    if sizes[MEMORY] != document.vm.memory_mb * 2**20:
        raise _invalid(f"its VM has {document.vm.memory_mb} MiB of memory, and {MEMORY} has {sizes[MEMORY]} bytes")
    if not 0 < sizes[STATE] <= MAX_STATE_BYTES:
        raise _invalid(f"the state of its devices has {sizes[STATE]} bytes")
    if any(sizes[name] == 0 or sizes[name] % 2**20 for name in volumes):
        raise _invalid("the size of a volume is no number of MiB")
    return document


def has_layer(document: SnapshotDocument) -> bool:
    """Returns whether the snapshot has a disk."""
    return any(file.name == LAYER for file in document.files.files)


def own_names(document: SnapshotDocument, names: Sequence[str]) -> Description:
    """Returns the description of the document's files with names of this host."""
    files = document.files
    return msgspec.structs.replace(
        files,
        files=tuple(msgspec.structs.replace(file, name=name) for file, name in zip(files.files, names, strict=True)),
    )


def snapshot_of(
    document: SnapshotDocument, key: Key, snapshot_id: str, volume_ids: Sequence[str], source: str, now: datetime
) -> Snapshot:
    """Returns the row of a received snapshot.

    :param volume_ids: new ids, for the copies of its volumes
    :param source: where it was pulled from
    :raises TransferError: `snapshot_invalid`
    """
    vm = document.vm
    own = ("id", "volumes", "template")
    same = {name: getattr(vm, name) for name in VmOfSnapshot.__struct_fields__ if name not in own}
    mounts = tuple(
        VolumeMount(name=volume.name, id=volume_id, path=volume.path, nocopy=volume.nocopy)
        for volume, volume_id in zip(vm.volumes, volume_ids, strict=True)
    )
    vm_id = _foreign_id(vm)
    row = VmRow(
        **same,
        id=vm_id,
        project=key.project,
        updated_at=document.created_at,
        layer=f"{vm_id}-pulled" if has_layer(document) else "",
        volumes=mounts,
        image=document.bases.boot_image,
    )
    snapshot = Snapshot(
        id=snapshot_id,
        name=key.name,
        vm=row,
        volumes=bool(mounts),
        description=document.description,
        labels=document.labels,
        created_at=now,
        paused_ms=document.paused_ms,
        source=source,
    )
    try:
        check_manifest(vm.manifest)
        check_labels(vm.labels)
        check_labels(document.labels)
        check_env(vm.env, "env")
        check_env(dict.fromkeys(vm.secret_env, ""), "secret_env")
        check_plain(document.description, "description")
        check_stored_snapshot(snapshot)
    except Problem as problem:
        raise _invalid(problem.detail) from problem
    except BadMember as bad:
        raise _invalid(str(bad)) from bad
    disk = vm.manifest.boot is not None and (vm.manifest.boot.rootfs or vm.manifest.boot.image) is not None
    if disk != has_layer(document) and document.machine is not None:
        raise _invalid("its VM has a root filesystem without a disk, or a disk without one")
    return snapshot


def _foreign_id(vm: VmOfSnapshot) -> int:
    """Returns the id of a VM of another host, which is the same for all of its snapshots."""
    digest = hashlib.sha256(repr((vm.id, vm.name, vm.created_at)).encode()).hexdigest()
    # 44 bits more are below `MAX_ID`.
    return FIRST_FOREIGN_ID + int(digest[:11], 16)


def _invalid(why: str) -> TransferError:
    return TransferError(
        "snapshot_invalid", f"it is no snapshot that this host can use: {why}", "push it again from its host"
    )
