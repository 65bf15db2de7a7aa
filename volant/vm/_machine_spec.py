"""From a VM's row to the machine that the hypervisor runs.

Three decide about each of kernel, initramfs and root filesystem, the first that says something: the manifest of the
plugin as it was when the VM was created, the operator's settings, the built image.
"""

from __future__ import annotations

from pathlib import Path

from volant import images
from volant.hypervisor import AcceleratorName, MachineSpec, Nic, Template
from volant.model import USER, Artifact, Boot, Manifest, VmRow, is_checkpoint, is_restricted, kind_of
from volant.network import passt_socket
from volant.templates import template_at

from ._paths import MEMORY, STATE, checkpoint_at, memory_file, root_disk, vm_directory
from ._settings import VmSettings
from ._volume_disks import disk_limits, shared_directories, volume_disks

CUSTOM_IMAGE = "custom"
"""Replaces the image's digest if a boot uses nothing of the built image."""


def machine_spec(settings: VmSettings, row: VmRow, accelerator: AcceleratorName) -> MachineSpec:
    """Returns the machine of a VM's newest boot. Launching it and adopting it take the same."""
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
    """Returns the network interface of a VM's machine; None: it has none."""
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
    """Returns the DNS servers of a VM: its gateway, where the daemon answers, if it has an egress policy.

    :param usual: those of other VMs
    """
    return (row.lease.gateway,) if row.lease is not None and is_restricted(row.egress) else usual


def uses_passt(row: VmRow) -> bool:
    """Whether a passt process carries the VM's network traffic."""
    return row.lease is not None and kind_of(row.network) == USER


def uses_image(settings: VmSettings, manifest: Manifest) -> bool:
    """Whether VMs of that plugin boot a part of the built image, and so need the memory that it declares."""
    boot = manifest.boot or Boot()
    return (boot.kernel is None and settings.kernel is None) or (boot.initramfs is None and settings.initramfs is None)


def _template(settings: VmSettings, template: str) -> Template:
    if not is_checkpoint(template):
        return template_at(settings.template_dir, template)
    directory = checkpoint_at(settings.memory_dir, settings.snapshot_dir, template)
    return Template(directory / MEMORY, directory / STATE)


def _cached(settings: VmSettings, artifact: Artifact | None) -> Path | None:
    return None if artifact is None else images.artifact_path(settings.cache_dir, artifact.sha256)
