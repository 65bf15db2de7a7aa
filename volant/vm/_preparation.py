"""Prepares a boot: fetches its files, chooses its template or checkpoint, and makes the VM's layer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from volant import images
from volant.host import Host
from volant.hypervisor import Disk, Hypervisor, LaunchFailed
from volant.model import Origin, VmRow, has_failed_as_clone
from volant.secrets import SecretFailed, Secrets
from volant.templates import TemplateSpec, WarmPool, WarmProcess

from ._boot_files import BootFiles
from ._checkpoint_store import CheckpointLost, CheckpointStore
from ._layout import VmSettings, root_disk
from ._machine_spec import CUSTOM_IMAGE, check_volumes
from ._templates import VmTemplates
from .messages import StepError


class Prepared(NamedTuple):
    """The result of the preparation of a boot."""

    image: str
    """The digest of the built image; `CUSTOM_IMAGE` if it is not used."""
    template: str | None
    """The digest of the template, or the name of the checkpoint, from which the boot continues."""
    origin: Origin | None = None
    """The source of the copy, from its present row."""
    warm_process: WarmProcess | None = None
    """The process from the warm pool for the boot."""


class BootPreparation(msgspec.Struct):
    """Prepares the boots of one daemon's VMs."""

    host: Host
    hypervisor: Hypervisor
    files: BootFiles
    templates: VmTemplates
    warm_pool: WarmPool
    checkpoints: CheckpointStore
    secrets: Secrets
    settings: VmSettings

    async def prepare(self, row: VmRow) -> Prepared:
        """Returns what the boot begins with, once its files are in the cache and the VM's layer is made.

        :raises StepError: as `BootFiles` and `VmTemplates.find`, `check_volumes` and `_check_secrets`; `disk_missing`,
            `disk_failed`, `disk_too_small`;
            `checkpoint_failed`, `checkpoint_gone`, `checkpoint_damaged`, `checkpoint_unfit`.
        """
        await check_volumes(self.host, self.settings, row)
        await _check_secrets(self.secrets, row)
        if row.checkpoint is not None:
            return await self._prepare_copy(row, row.checkpoint)
        image = await self.files.fetch(row)
        disk = root_disk(self.settings, row)
        if disk is not None:
            return await self._prepare_disk(row, disk, image)
        found = await self.templates.find(row, image)
        if found is None:
            return Prepared(image, None)
        template, spec = found
        return Prepared(image, template.digest, warm_process=self._take_warm(row, spec))

    def _take_warm(self, row: VmRow, spec: TemplateSpec) -> WarmProcess | None:
        # A warm process is not where a VM that another host may start can be held back.
        return None if row.movable is not None else self.warm_pool.take(row.id, spec)

    def inspect(self) -> object:
        """Returns the running fetches, ready for JSON."""
        return self.files.inspect()

    async def _prepare_copy(self, row: VmRow, checkpoint: str) -> Prepared:
        """Prepares a copy: it has the image that its origin booted, and a copy of its layer."""
        try:
            found = await self.checkpoints.find(checkpoint)
        except CheckpointLost as error:
            raise StepError(error.code, str(error)) from error
        image = row.image or CUSTOM_IMAGE
        if image != CUSTOM_IMAGE and images.load(self.settings.cache_dir, image) is None:
            raise StepError("image_missing", f"the image {image[:12]}, which its origin booted, is gone from the cache")
        disk = root_disk(self.settings, row)
        if disk is not None:
            await self.files.fetch_root(row)
            await self._make_layer(disk, found.layer)
        # One that was moved is no copy of what it was.
        origin = (
            None
            if row.origin is None or row.arrived
            else msgspec.structs.replace(row.origin, paused_ms=found.paused_ms)
        )
        return Prepared(image, checkpoint, origin)

    async def _prepare_disk(self, row: VmRow, disk: Disk, image: str) -> Prepared:
        """Makes the layer, if it is the first boot here. The row that owns it was committed when the VM was created."""
        try:
            # A process that was taken for an earlier try would hold the layer.
            await self.warm_pool.clear(row.id)
        except OSError as error:
            raise StepError(
                "disk_failed", f"a warm process that was taken for the VM can't be ended: {error}"
            ) from error
        if row.disk_from is not None:
            try:
                brought = await self.checkpoints.disk(row.disk_from)
            except CheckpointLost as error:
                raise StepError(error.code, str(error)) from error
            await self._make_layer(disk, brought)
            return Prepared(image, None)
        clone_failed = has_failed_as_clone(row)
        if self.host.files.exists(disk.layer) and not clone_failed:
            # A template's memory does not fit its content any more.
            return Prepared(image, None)
        if row.boots and not clone_failed:
            raise StepError(
                "disk_missing", f"the VM's disk {disk.layer} is gone; put it back, or delete and create the VM again"
            )
        self._check_size(disk)
        found = await self.templates.find(row, image)
        if found is None:
            await self._make_layer(disk, None)
            return Prepared(image, None)
        template, spec = found
        warm_process = self._take_warm(row, spec)
        await self._make_layer(disk, template.layer, warm_process)
        return Prepared(image, template.digest, warm_process=warm_process)

    def _check_size(self, disk: Disk) -> None:
        """Checks the size of the disk. :raises StepError: the disk is smaller than the filesystem on it."""
        if disk.size_mb is None or disk.base is None:
            return
        try:
            least_mb = -(-self.host.files.size(disk.base) // 2**20)
        except OSError as error:
            raise StepError("disk_failed", f"the VM's root filesystem {disk.base} is gone") from error
        if disk.size_mb < least_mb:
            raise StepError(
                "disk_too_small", f"disk_mb is {disk.size_mb}, and the root filesystem alone has {least_mb} MiB"
            )

    async def _make_layer(self, disk: Disk, origin: Path | None, warm_process: WarmProcess | None = None) -> None:
        try:
            await self.host.files.mkdir(disk.layer.parent)
            if warm_process is not None and warm_process.layer is not None:
                await self.host.files.put_in_place(warm_process.layer, disk.layer)
            else:
                await self.hypervisor.make_layer(disk, origin)
        except LaunchFailed as error:
            raise StepError("disk_failed", str(error)) from error
        except OSError as error:
            raise StepError("disk_failed", f"the directory of the VM's disk can't be made: {error}") from error


async def _check_secrets(secrets: Secrets, row: VmRow) -> None:
    """Checks that the VM's secrets are readable. :raises StepError: `secret_missing`, `secret_unreadable`,
    `secret_unusable`."""
    try:
        await secrets.values_for(row)
    except SecretFailed as error:
        raise StepError(error.code, str(error)) from None
