"""Where the files of VMs and checkpoints lie on the host."""

from __future__ import annotations

from pathlib import Path

from volant import images, oci
from volant.host import inside
from volant.hypervisor import Disk
from volant.model import SNAPSHOT, VmRow

from ._settings import VmSettings

MEMORY, STATE, LAYER, RECORD = "memory", "state", "root.qcow2", "checkpoint.json"
"""The files of a checkpoint."""


def vm_directory(settings: VmSettings, vm_id: int) -> Path:
    """Returns the directory with a VM's sockets and console. It exists while a process of the VM may."""
    return settings.runtime_dir / "vms" / str(vm_id)


def memory_file(settings: VmSettings, vm_id: int) -> Path:
    """Returns the file that holds a guest's memory."""
    return settings.memory_dir / f"{vm_id}.mem"


def layer_directory(settings: VmSettings, row: VmRow) -> Path:
    """Returns the directory of a VM's layer."""
    return inside(settings.disk_dir, row.layer)


def root_disk(settings: VmSettings, row: VmRow) -> Disk | None:
    """Returns the disk with a VM's root filesystem; None: it has none."""
    boot = row.manifest.boot
    if boot is None or not row.layer:
        return None
    layer = layer_directory(settings, row) / "root.qcow2"
    if boot.image is not None:
        return Disk(None, layer, row.disk_mb, oci.disk_path(settings.cache_dir, boot.image.digest))
    if boot.rootfs is None:
        return None
    return Disk(images.artifact_path(settings.cache_dir, boot.rootfs.sha256), layer, row.disk_mb)


def checkpoint_at(memory_dir: Path, snapshot_dir: Path, checkpoint: str) -> Path:
    """Returns the directory of a checkpoint, whether or not it exists."""
    return inside(snapshot_dir if checkpoint.startswith(SNAPSHOT) else memory_dir, checkpoint)
