"""The parts of a boot that need no actor: what it boots from, which paths, which command.

What a VM boots from is decided by three, the first that has something to say: the manifest of its plugin as it was when
the VM was created, the operator's settings, the image that is built. Each kernel, initramfs and root filesystem on its
own.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import msgspec

from actors import ActorDown, AskTimeout
from volant import images
from volant.host import inside
from volant.hypervisor import AcceleratorName, Disk, LaunchFailed, MachineSpec, Template
from volant.model import NONE, Artifact, Boot, Manifest, Origin, Problem, VmRow, is_checkpoint
from volant.templates import GuestConfig, ReadyTemplate, TemplateKey, TemplateSpec, WarmProcess, template_at
from volant.templates.messages import Build

from ._checkpoints import MEMORY, STATE, CheckpointLost, checkpoint_at
from ._doors import VmDoors, VmSettings
from ._errors import StepError
from ._network import nic_of

CUSTOM_IMAGE = "custom"
"""Stands for the digest where nothing of the built image is used."""

_BUILD_S = 300.0
"""What building a template may take besides its guest's boot: others may wait before it."""


class Prepared(NamedTuple):
    """What a boot begins with."""

    image: str
    """The digest of the built image, `CUSTOM_IMAGE` where it is not used."""
    template: str | None
    """The digest of the template, or the name of the checkpoint, that it goes on from."""
    origin: Origin | None = None
    """What is known now of whose copy it is."""
    standby: WarmProcess | None = None
    """The process that has taken the template over, and waits."""


async def prepare_boot(doors: VmDoors, row: VmRow) -> Prepared:
    """When this returns, all that the VM boots from is in the cache, and its layer is made.

    :raises StepError: `image_missing`, `image_failed`, `memory_too_small`; `media_missing`, `media_unreachable`,
        `media_mismatch`, `media_too_large`, `media_timeout`, `cache_full`, `cache_unwritable`, `io_error`;
        `disk_missing`, `disk_failed`, `disk_too_small`; `template_failed`; `capture_failed`, `capture_gone`,
        `capture_damaged`, `capture_unfit`.
    """
    if row.checkpoint is not None:
        return await _prepare_copy(doors, row, row.checkpoint)
    digest = await prepare_artifacts(doors, row)
    disk = root_disk(doors.settings, row)
    if disk is not None:
        return await _prepare_layer(doors, row, disk, digest)
    found = await _find_template(doors, row, digest)
    if found is None:
        return Prepared(digest, None)
    template, template_spec = found
    return Prepared(digest, template.digest, standby=doors.warm_pool.take(row.id, template_spec))


async def _prepare_copy(doors: VmDoors, row: VmRow, checkpoint: str) -> Prepared:
    """What goes on from a checkpoint has the image that its origin has booted, and a copy of its layer."""
    try:
        found = await doors.checkpoints.find(checkpoint)
    except CheckpointLost as error:
        raise StepError(error.code, str(error)) from error
    digest = row.image or CUSTOM_IMAGE
    if digest != CUSTOM_IMAGE and images.load(doors.settings.cache_dir, digest) is None:
        raise StepError("image_missing", f"the image {digest[:12]}, which its origin booted, is gone from the cache")
    disk = root_disk(doors.settings, row)
    if disk is not None:
        if row.manifest.boot is not None and row.manifest.boot.rootfs is not None:
            await _obtain(doors, row.manifest.boot.rootfs)
        await _make_layer(doors, disk, found.layer)
    origin = None if row.origin is None else msgspec.structs.replace(row.origin, paused_ms=found.paused_ms)
    return Prepared(digest, checkpoint, origin)


async def prepare_artifacts(doors: VmDoors, row: VmRow) -> str:
    """The digest of the built image, as `Prepared` has it. All that the VM boots from is in the cache then.

    :raises StepError: as `prepare_boot`.
    """
    settings = doors.settings
    boot = row.manifest.boot or Boot()
    for path, brought, what in (
        (settings.kernel, boot.kernel, "VOLANT_KERNEL"),
        (settings.initramfs, boot.initramfs, "VOLANT_INITRAMFS"),
    ):
        if path is not None and brought is None and not doors.host.files.exists(path):
            raise StepError("image_missing", f"{what} is {path}, and there is no such file")
    digest = await _prepare_image(doors, row) if uses_image(settings, row.manifest) else CUSTOM_IMAGE
    for artifact in (boot.kernel, boot.initramfs, boot.rootfs):
        if artifact is not None:
            await _obtain(doors, artifact)
    return digest


async def _prepare_image(doors: VmDoors, row: VmRow) -> str:
    settings = doors.settings
    try:
        image = await images.ensure(
            settings.cache_dir, deadline_s=settings.image_timeout_s, owner=doors.store.path.parent
        )
    except images.ImageError as error:
        raise StepError("image_failed", f"the boot image could not be built: {error}") from error
    if row.memory_mb < image.min_memory_mb:
        raise StepError(
            "memory_too_small",
            f"the image needs at least {image.min_memory_mb} MiB of memory, the VM has {row.memory_mb}",
        )
    return image.digest


async def _obtain(doors: VmDoors, artifact: Artifact) -> None:
    try:
        await doors.artifacts.obtain(artifact)
    except images.ImageError as error:
        code = "media_timeout" if error.code == "timeout" else error.code
        raise StepError(code, f"the VM can't boot from {error}") from error


async def _prepare_layer(doors: VmDoors, row: VmRow, disk: Disk, image: str) -> Prepared:
    """Make the layer, if it is the first boot. The row that owns it was committed when the VM was created."""
    try:
        # A process that was taken for an earlier try would hold it.
        await doors.warm_pool.clear(row.id)
    except OSError as error:
        raise StepError("disk_failed", f"a process that was to become the VM is left: {error}") from error
    # What a clone that failed has left is not what anybody was told of.
    fails_first = row.fallback is not None and row.boots == 1
    if doors.host.files.exists(disk.layer) and not fails_first:
        # Its content is no longer what a template's memory knows of it.
        return Prepared(image, None)
    if row.boots and not fails_first:
        raise StepError(
            "disk_missing", f"the VM's disk {disk.layer} is gone; put it back, or delete the VM and create it anew"
        )
    _check_size(doors, disk)
    found = await _find_template(doors, row, image)
    if found is None:
        await _make_layer(doors, disk, None)
        return Prepared(image, None)
    template, template_spec = found
    standby = doors.warm_pool.take(row.id, template_spec)
    await _make_layer(doors, disk, template.layer, standby)
    return Prepared(image, template.digest, standby=standby)


def _check_size(doors: VmDoors, disk: Disk) -> None:
    """:raises StepError: the disk is smaller than what lies on it."""
    if disk.size_mb is None:
        return
    try:
        least_mb = -(-doors.host.files.size(disk.base) // 2**20)
    except OSError as error:
        raise StepError("disk_failed", f"{disk.base}, over which the VM's disk is made, is not there") from error
    if disk.size_mb < least_mb:
        raise StepError(
            "disk_too_small", f"disk_mb is {disk.size_mb}, and the root filesystem alone has {least_mb} MiB"
        )


async def _make_layer(doors: VmDoors, disk: Disk, like: Path | None, standby: WarmProcess | None = None) -> None:
    try:
        await doors.host.files.mkdir(disk.layer.parent)
        if standby is not None and standby.layer is not None:
            await doors.host.files.put_in_place(standby.layer, disk.layer)
        else:
            await doors.hypervisor.make_layer(disk, like)
    except LaunchFailed as error:
        raise StepError("disk_failed", str(error)) from error
    except OSError as error:
        raise StepError("disk_failed", f"the directory of the VM's disk can't be made: {error}") from error


async def _find_template(doors: VmDoors, row: VmRow, image: str) -> tuple[ReadyTemplate, TemplateSpec] | None:
    """What the VM is to go on from, and is there; None: it boots cold. :raises StepError: it must not."""
    if row.boot == "cold" or row.fallback is not None or (row.boot == "auto" and not doors.templates.enabled):
        return None
    try:
        template_spec = await template_spec_of(doors, row, image)
        found = await doors.templates.find(template_spec.key, template_spec.digest)
        if found is None and row.boot == "template":
            await _have_built(doors, template_spec)
            found = await doors.templates.find(template_spec.key, template_spec.digest)
    except (OSError, Problem, ActorDown, AskTimeout) as error:
        if row.boot == "auto":
            return None
        why = error.detail if isinstance(error, Problem) else str(error)
        raise StepError("template_failed", f"the VM is to be a clone, and there is no template: {why}") from error
    if found is None and row.boot == "template":
        raise StepError("template_failed", "the VM is to be a clone, and its template was there and is gone again")
    return None if found is None else (found, template_spec)


async def _have_built(doors: VmDoors, template_spec: TemplateSpec) -> None:
    """Wait for the template, and before that for the end of a drain. Raises Problem, ActorDown, AskTimeout."""
    while True:
        await doors.store.projection.undrained()
        try:
            await doors.builder.ask(Build(template_spec), timeout_s=doors.settings.agent_timeout_s + _BUILD_S)
            return
        except Problem as problem:
            if problem.code != "draining":
                raise


async def template_spec_of(doors: VmDoors, row: VmRow, image: str) -> TemplateSpec:
    """What a template must be made of for such a VM to go on from it. What it boots from is in the cache.

    :raises OSError: it is not.
    """
    accelerator = await doors.hypervisor.accelerator()
    spec = machine_spec(doors.settings, msgspec.structs.replace(row, image=image), accelerator)
    boot = row.manifest.boot or Boot()

    def part(artifact: Artifact | None, path: Path | None) -> str:
        if artifact is not None:
            return f"sha256 {artifact.sha256}"
        return f"image {image}" if path is None else f"file {path} {doors.host.files.fingerprint(path)}"

    workload = workload_spec(row)
    config = None
    if row.manifest.template.after == "workload" and workload is not None:
        config = GuestConfig(guest_manifest(row), workload)
    key = TemplateKey(
        hypervisor=await doors.hypervisor.fingerprint(),
        kernel=part(boot.kernel, doors.settings.kernel),
        initramfs=part(boot.initramfs, doors.settings.initramfs),
        rootfs=boot.rootfs.sha256 if boot.rootfs is not None else None,
        cmdline=spec.cmdline,
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        disk_mb=row.disk_mb,
        config=config,
        has_nic=row.network != NONE,
    )
    return TemplateSpec(
        key=key,
        digest=key.digest,
        plugin=row.plugin,
        kernel=spec.kernel,
        initramfs=spec.initramfs,
        rootfs=None if spec.root is None else spec.root.base,
        accelerator=accelerator,
    )


def guest_manifest(row: VmRow) -> dict[str, object]:
    """The body of `PUT /v1/daemon/manifest`: all of it but `boot`, as a guest has no business with the host's paths."""
    told: dict[str, object] = msgspec.to_builtins(msgspec.structs.replace(row.manifest, boot=None))
    return told


def workload_spec(row: VmRow) -> dict[str, object] | None:
    """The body of `PUT /v1/daemon/workload`: the manifest's workload with the VM's own environment over it."""
    workload = row.manifest.workload
    if workload is None:
        return None
    spec: dict[str, object] = msgspec.to_builtins(workload)
    spec["env"] = {**workload.env, **row.env}
    return spec


def machine_id(instance: str, row: VmRow) -> str:
    """What a clone has as its machine id: of this VM and of no other, and the same in each boot."""
    return hashlib.sha256(f"{instance} {row.id} {row.created_at.isoformat()}".encode()).hexdigest()[:32]


def uses_image(settings: VmSettings, manifest: Manifest) -> bool:
    """Whether VMs of that plugin boot a part of the built image, and so need the memory that it declares."""
    boot = manifest.boot or Boot()
    return (boot.kernel is None and settings.kernel is None) or (boot.initramfs is None and settings.initramfs is None)


def machine_spec(settings: VmSettings, row: VmRow, accelerator: AcceleratorName) -> MachineSpec:
    """What the hypervisor needs to know of this boot; the same for whoever launches and for whoever adopts."""
    image = images.load(settings.cache_dir, row.image or "")
    # An image that is gone is no reason not to adopt; who launches is told by the path that does not exist.
    gone = settings.cache_dir / f"image-{row.image}-is-gone"
    boot = row.manifest.boot or Boot()
    kernel = _artifact_path(settings, boot.kernel) or settings.kernel
    initramfs = _artifact_path(settings, boot.initramfs) or settings.initramfs
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
        template=None if row.template is None else _source(settings, row.template),
        balloon=row.balloon,
        nic=nic_of(settings, row),
    )


def _source(settings: VmSettings, template: str) -> Template:
    """Where what a boot goes on from lies."""
    if not is_checkpoint(template):
        return template_at(settings.template_dir, template)
    directory = checkpoint_at(settings.memory_dir, settings.snapshot_dir, template)
    return Template(directory / MEMORY, directory / STATE)


def _artifact_path(settings: VmSettings, artifact: Artifact | None) -> Path | None:
    return None if artifact is None else images.artifact_path(settings.cache_dir, artifact.sha256)


def root_disk(settings: VmSettings, row: VmRow) -> Disk | None:
    """The disk with a VM's root filesystem, if it has one."""
    rootfs = row.manifest.boot.rootfs if row.manifest.boot is not None else None
    if rootfs is None or not row.layer:
        return None
    base = images.artifact_path(settings.cache_dir, rootfs.sha256)
    return Disk(base, layer_directory(settings, row) / "root.qcow2", row.disk_mb)


def layer_directory(settings: VmSettings, row: VmRow) -> Path:
    """What a VM with a layer has on the disk beside its row."""
    return inside(settings.disk_dir, row.layer)


def vm_directory(settings: VmSettings, vm_id: int) -> Path:
    """Sockets and console of a VM; there while a process of it may be."""
    return settings.runtime_dir / "vms" / str(vm_id)


def memory_file(settings: VmSettings, vm_id: int) -> Path:
    """The guest's memory."""
    return settings.memory_dir / f"{vm_id}.mem"


def instance_of(state_dir: Path) -> str:
    """A short name of a state directory, the same over restarts of the daemon."""
    return hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:10]


def tag_of(instance: str, row: VmRow) -> str:
    """The tag of the next boot of a VM."""
    return f"volant-{instance}-{row.id}.{row.boots + 1}"


def parse_tag(instance: str, tag: str) -> tuple[int, int] | None:
    """The id and the boot of the VM whose process carries this tag; None when it is none of this instance's."""
    found = re.fullmatch(rf"volant-{re.escape(instance)}-([1-9][0-9]{{0,17}})\.([1-9][0-9]{{0,17}})", tag)
    return (int(found[1]), int(found[2])) if found else None
