"""The parts of a boot that need no actor: which image, which paths, which command."""

from __future__ import annotations

import hashlib
from pathlib import Path

from volant import images
from volant.hypervisor import AcceleratorName, MachineSpec
from volant.model import VmRow

from ._doors import VmDoors, VmSettings

CUSTOM_IMAGE = "custom"
"""Stands for the digest where the operator's settings say what to boot."""


class StepError(Exception):
    """A step came to nothing. `code` becomes the reason's code, the text its message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def prepare_image(doors: VmDoors, row: VmRow) -> str:
    """The digest of the image to boot, which then lies in the cache.

    :raises StepError: `image_missing`, `image_failed`, `memory_too_small`.
    """
    settings = doors.settings
    for path, what in ((settings.kernel, "VOLANT_KERNEL"), (settings.initramfs, "VOLANT_INITRAMFS")):
        if path is not None and not doors.host.exists(path):
            raise StepError("image_missing", f"{what} is {path}, and there is no such file")
    if settings.kernel is not None and settings.initramfs is not None:
        return CUSTOM_IMAGE
    try:
        image = await images.ensure(settings.cache_dir, deadline_s=settings.image_timeout_s)
    except images.ImageError as error:
        raise StepError("image_failed", f"the boot image could not be built: {error}") from error
    if row.memory_mb < image.min_memory_mb:
        raise StepError(
            "memory_too_small",
            f"the image needs at least {image.min_memory_mb} MiB of memory, the VM has {row.memory_mb}",
        )
    return image.digest


def machine_spec(settings: VmSettings, row: VmRow, accelerator: AcceleratorName) -> MachineSpec:
    """What the hypervisor needs to know of this boot; the same for whoever launches and for whoever adopts."""
    image = images.load(settings.cache_dir, row.image or "")
    # An image that is gone is no reason not to adopt; who launches is told by the path that does not exist.
    gone = settings.cache_dir / f"image-{row.image}-is-gone"
    return MachineSpec(
        vm_id=row.id,
        name=row.name,
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        kernel=settings.kernel or (image.kernel if image is not None else gone),
        initramfs=settings.initramfs or (image.initramfs if image is not None else gone),
        cmdline=" ".join((*(image.kernel_parameters if image is not None else ()), row.kernel_cmdline)).strip(),
        directory=vm_directory(settings, row.id),
        memory_file=memory_file(settings, row.id),
        mark=row.mark,
        accelerator=accelerator,
    )


def vm_directory(settings: VmSettings, vm_id: int) -> Path:
    """Sockets and console of a VM; there while a process of it may be."""
    return settings.runtime_dir / "vms" / str(vm_id)


def memory_file(settings: VmSettings, vm_id: int) -> Path:
    """The guest's memory."""
    return settings.memory_dir / f"{vm_id}.mem"


def instance_of(state_dir: Path) -> str:
    """A short name of a state directory, the same over restarts of the daemon."""
    return hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:10]


def mark_of(instance: str, row: VmRow) -> str:
    """The mark of the next boot of a VM."""
    return f"volant-{instance}-{row.id}.{row.boots + 1}"
