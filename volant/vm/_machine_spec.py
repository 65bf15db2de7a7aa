"""Builds a hypervisor's machine from a VM's row.

Kernel, initramfs and root filesystem each come from the first of these that has one: the plugin's manifest at the
creation of the VM, the operator's settings, the built image.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from volant import images
from volant.directories import directory_socket, directory_tag
from volant.host import Host
from volant.hypervisor import AcceleratorName, DiskLimits, MachineSpec, Nic, SharedDirectory, Template, VolumeDisk
from volant.model import (
    USER,
    Artifact,
    Boot,
    Manifest,
    VmRow,
    VolumeMount,
    is_checkpoint,
    is_restricted,
    kind_of,
    mounts_of,
)
from volant.network import passt_socket
from volant.templates import template_at
from volant.volumes import needs_replay, volume_path

from ._layout import MEMORY, STATE, VmSettings, checkpoint_at, memory_file, root_disk, vm_directory
from .messages import StepError

_SERIAL = "vol-"


def serial_of(volume_id: str) -> str:
    """Returns the serial number of a volume's disk."""
    return f"{_SERIAL}{volume_id}"


def volume_id_of(serial: str) -> str:
    """Returns the id of the volume whose disk has this serial number."""
    return serial.removeprefix(_SERIAL)


def volume_disks(settings: VmSettings, row: VmRow) -> tuple[VolumeDisk, ...]:
    """Returns the disks of a VM's volumes."""
    return tuple(
        VolumeDisk(volume_path(settings.volume_dir, mount.id), serial_of(mount.id), mount.read_only)
        for mount in row.volumes
    )


def shared_directories(settings: VmSettings, row: VmRow) -> tuple[SharedDirectory, ...]:
    """Returns the devices of a VM's directories of the host."""
    return tuple(
        SharedDirectory(directory_tag(number), directory_socket(settings.runtime_dir, row.id, number))
        for number in range(len(row.directories))
    )


def disk_limits(row: VmRow) -> DiskLimits | None:
    """Returns the limits of a VM's disks; None if there are none."""
    if row.disk_iops is None and row.disk_mbps is None:
        return None
    return DiskLimits(row.disk_iops, None if row.disk_mbps is None else row.disk_mbps * 2**20)


def guest_volumes(row: VmRow) -> list[dict[str, object]]:
    """Returns the volumes and directories that a guest mounts, in that order, for its agent."""
    found: list[dict[str, object]] = []
    for mount in mounts_of(row):
        entry: dict[str, object] = {"path": mount.path, "read_only": mount.read_only}
        if isinstance(mount, VolumeMount):
            entry["serial"] = serial_of(mount.id)
            if mount.nocopy:
                # Agents that copy nothing don't know the member.
                entry["nocopy"] = True
        else:
            entry["tag"] = directory_tag(row.directories.index(mount))
        found.append(entry)
    return found


async def check_volumes(host: Host, settings: VmSettings, row: VmRow) -> None:
    """Checks the files of a VM's volumes. :raises StepError: `volume_missing`; `volume_not_clean`; `volume_failed`, the
    disk fails."""
    for mount in row.volumes:
        path = volume_path(settings.volume_dir, mount.id)
        try:
            if mount.read_only and await needs_replay(host, path):
                raise StepError(
                    "volume_not_clean",
                    f"the volume {mount.name} was not unmounted by the last VM that wrote to it, and a reader "
                    f"can't replay its journal; run 'volar volumes repair {mount.name}', or start a VM that writes",
                )
            exists = host.files.exists(path)
        except FileNotFoundError:
            exists = False
        except OSError as error:
            raise StepError("volume_failed", f"the volume {mount.name} can't be read: {error}") from error
        if not exists:
            raise StepError(
                "volume_missing", f"the volume {mount.name} has no file {path}; put it back, or create the VM anew"
            )


def guest_manifest(row: VmRow) -> dict[str, object]:
    """Returns the body of `PUT /v1/daemon/manifest`: the manifest, with the VM's own environment over that of `exec`.
    It lacks `boot`, because a guest must not learn paths of the host."""
    defaults = row.manifest.exec
    if defaults is not None:
        defaults = msgspec.structs.replace(defaults, env={**defaults.env, **row.env})
    manifest: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(row.manifest, boot=None, exec=defaults))
    return manifest


def workload_spec(row: VmRow) -> dict[str, object] | None:
    """Returns the body of `PUT /v1/daemon/workload`: the manifest's workload with the VM's own environment over it,
    without secrets."""
    workload = row.manifest.workload
    if workload is None or not row.start_workload:
        return None
    # Members with their default values are left out, so agents that do not know them take the rest. What happens to the
    # VM at the end of the workload is the daemon's to do.
    spec: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(workload, on_exit="keep"))
    spec["env"] = {**workload.env, **row.env}
    if row.waits_for_client:
        spec["attach"] = True
    return spec


def machine_id(instance: str, row: VmRow) -> str:
    """Returns a clone's machine id: unlike that of any other VM, and the same in each boot."""
    return hashlib.sha256(f"{instance} {row.id} {row.created_at.isoformat()}".encode()).hexdigest()[:32]


CUSTOM_IMAGE = "custom"
"""Replaces the image's digest if a boot uses nothing of the built image."""


def machine_spec(settings: VmSettings, row: VmRow, accelerator: AcceleratorName) -> MachineSpec:
    """Returns the machine of a VM's newest boot. Launch and adoption use the same."""
    image = images.load(settings.cache_dir, row.image or "")
    # Adoption needs no image, and a launch fails because this path does not exist.
    gone = settings.cache_dir / f"image-{row.image}-is-gone"
    boot = row.manifest.boot or Boot()
    kernel = _cached(settings, boot.kernel) or settings.kernel
    initramfs = _cached(settings, boot.initramfs) or settings.initramfs
    return MachineSpec(
        vm_id=row.id,
        name=row.name,
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        kernel=kernel or (image.kernel if image is not None else gone),
        initramfs=initramfs or (image.initramfs if image is not None else gone),
        cmdline=" ".join((*(image.kernel_parameters if image is not None else ()), row.kernel_cmdline)).strip(),
        directory=vm_directory(settings, row.id),
        memory_file=memory_file(settings, row.id),
        tag=row.tag,
        accelerator=accelerator,
        root=root_disk(settings, row),
        template=None if row.template is None else _template(settings, row.template),
        balloon=row.balloon,
        nic=nic_of(settings, row),
        volumes=volume_disks(settings, row),
        directories=shared_directories(settings, row),
        disk_limits=disk_limits(row),
    )


def nic_of(settings: VmSettings, row: VmRow) -> Nic | None:
    """Returns the network interface of a VM's machine, None if it has none."""
    lease = row.lease
    if lease is None:
        return None
    return Nic(
        mac=lease.mac,
        tap=lease.tap or None,
        socket=passt_socket(settings.runtime_dir, row.id) if uses_passt(row) else None,
        address=f"{lease.address}/{lease.prefix}",
        gateway=lease.gateway,
        nameservers=nameservers_of(row, settings.nameservers),
    )


def nameservers_of(row: VmRow, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the DNS servers of a VM. With an egress policy that is its gateway, where the daemon answers.

    :param usual: the DNS servers of other VMs
    """
    return (row.lease.gateway,) if row.lease is not None and is_restricted(row.egress) else usual


def uses_passt(row: VmRow) -> bool:
    """Whether a passt process carries the VM's network traffic."""
    return row.lease is not None and kind_of(row.network) == USER


def uses_image(settings: VmSettings, manifest: Manifest) -> bool:
    """Returns whether VMs of that plugin boot a part of the built image, and so need the memory that it declares."""
    boot = manifest.boot or Boot()
    return (boot.kernel is None and settings.kernel is None) or (boot.initramfs is None and settings.initramfs is None)


def _template(settings: VmSettings, template: str) -> Template:
    if not is_checkpoint(template):
        return template_at(settings.template_dir, template)
    directory = checkpoint_at(settings.memory_dir, settings.snapshot_dir, template)
    return Template(directory / MEMORY, directory / STATE)


def _cached(settings: VmSettings, artifact: Artifact | None) -> Path | None:
    return None if artifact is None else images.artifact_path(settings.cache_dir, artifact.sha256)
