"""Fetches the files that VMs boot from into the cache: the built image, and a plugin's artifacts."""

from __future__ import annotations

from functools import partial

import msgspec

from volant import images
from volant.host import Host
from volant.images import ArtifactCache
from volant.journal import Store
from volant.model import Artifact, Boot, Key, Problem, VmRow
from volant.oci import ImageSource, OciError, read_auth_file
from volant.secrets import Secrets

from ._layout import VmSettings
from ._machine_spec import CUSTOM_IMAGE, uses_image
from .messages import StepError


class BootFiles(msgspec.Struct):
    """The boot files of one daemon's VMs."""

    host: Host
    store: Store
    artifacts: ArtifactCache
    oci: ImageSource
    secrets: Secrets
    settings: VmSettings

    async def fetch(self, row: VmRow) -> str:
        """Returns the digest of the built image, or `CUSTOM_IMAGE`, once all files of the boot are in the cache.

        :raises StepError: `image_missing`, `image_failed`, `memory_too_small`, or as `fetch_artifact`.
        """
        settings, boot = self.settings, row.manifest.boot or Boot()
        for path, brought, setting in (
            (settings.kernel, boot.kernel, "VOLANT_KERNEL"),
            (settings.initramfs, boot.initramfs, "VOLANT_INITRAMFS"),
        ):
            if path is not None and brought is None and not self.host.files.exists(path):
                raise StepError("image_missing", f"{setting} is {path}, and there is no such file")
        digest = await self._build_image(row) if uses_image(settings, row.manifest) else CUSTOM_IMAGE
        for artifact in (boot.kernel, boot.initramfs):
            if artifact is not None:
                await self.fetch_artifact(artifact)
        await self.fetch_root(row)
        return digest

    async def fetch_root(self, row: VmRow) -> None:
        """Fetches the files of a VM's root filesystem that are not in the cache.

        :raises StepError: as `fetch_artifact`; an error of `docs/explanation/oci.md` with the prefix `image_`;
            `secret_missing` or `secret_unreadable`, for the credentials of its registry.
        """
        boot = row.manifest.boot or Boot()
        if boot.rootfs is not None:
            await self.fetch_artifact(boot.rootfs)
        if boot.image is not None:
            auth = None if row.registry_secret is None else partial(self._auth, Key(row.project, row.registry_secret))
            try:
                await self.oci.obtain_digest(boot.image.digest, boot.image.reference, row.project, auth=auth)
            except OciError as error:
                raise StepError(error.code, f"the VM can't boot from {error}") from error

    async def _auth(self, secret: Key) -> bytes:
        """Returns the auth file in a secret. :raises StepError: :raises OciError: the secret is not an auth file."""
        try:
            return read_auth_file(await self.secrets.value(secret), secret=secret.name)
        except Problem as problem:
            code = "secret_missing" if problem.status == 404 else "secret_unreadable"
            raise StepError(
                code, f"the VM's image has to be fetched again with the credentials in a secret: {problem.detail}"
            ) from problem

    async def fetch_artifact(self, artifact: Artifact) -> None:
        """Fetches an artifact that is not in the cache.

        :raises StepError: `artifact_missing`, `artifact_unreachable`, `artifact_mismatch`, `artifact_too_large`,
            `artifact_timeout`, `cache_full`, `cache_unwritable`, `io_error`.
        """
        try:
            await self.artifacts.obtain(artifact)
        except images.ImageError as error:
            code = "artifact_timeout" if error.code == "timeout" else error.code
            raise StepError(code, f"the VM can't boot from {error}") from error

    def inspect(self) -> object:
        """Returns the running fetches, ready for JSON."""
        return self.artifacts.inspect()

    async def _build_image(self, row: VmRow) -> str:
        settings, state_dir = self.settings, self.store.path.parent
        try:
            image = await images.ensure(settings.cache_dir, deadline_s=settings.image_timeout_s, owner=state_dir)
        except images.ImageError as error:
            raise StepError("image_failed", f"the boot image could not be built: {error}") from error
        if row.memory_mb < image.min_memory_mb:
            raise StepError(
                "memory_too_small",
                f"the image needs at least {image.min_memory_mb} MiB of memory, the VM has {row.memory_mb}",
            )
        return image.digest
