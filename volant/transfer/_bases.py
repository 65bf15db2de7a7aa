"""The files that a snapshot needs: boot image, kernel, root filesystem, OCI image; identified by digest, never by name.

A guest's memory contains parts of the files that it booted from, as laid out on the disk. Another file with the same
name would corrupt the guest silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import trio

from volant import images, oci
from volant.images import ArtifactCache, ImageError
from volant.model import Artifact, Boot, Manifest, OciImage, VmRow, is_at_rest
from volant.oci import ImageLibrary, OciError
from volant.vm import CUSTOM_IMAGE, VmSettings

from ._document import Bases
from ._transfer import TransferError

_PIECE = 1024 * 1024


class BaseFiles(msgspec.Struct, frozen=True):
    """The base files of the snapshots of one daemon."""

    artifacts: ArtifactCache
    oci: ImageLibrary
    settings: VmSettings

    async def of(self, vm: VmRow) -> Bases:
        """Returns the base files of a VM of this host. :raises TransferError: `base_missing`, one does not exist any
        more."""
        boot = vm.manifest.boot or Boot()
        settings = self.settings
        return Bases(
            # One at rest boots the newest image.
            boot_image=None if vm.image in (None, CUSTOM_IMAGE) or is_at_rest(vm) else vm.image,
            kernel=await _digest_of(settings.kernel) if boot.kernel is None and settings.kernel else None,
            initramfs=await _digest_of(settings.initramfs) if boot.initramfs is None and settings.initramfs else None,
            image_files=await self._image_files(boot.image.digest, vm.project) if boot.image is not None else (),
        )

    async def obtain(self, manifest: Manifest, bases: Bases, project: str, auth: bytes | None) -> None:
        """Fetches missing base files of a snapshot, and checks that all are byte-identical.

        :param auth: credentials, for the OCI image
        :raises TransferError: `base_missing`, `base_mismatch`
        """
        boot, settings = manifest.boot or Boot(), self.settings
        digest = bases.boot_image
        if digest is not None and await trio.to_thread.run_sync(images.load, settings.cache_dir, digest) is None:
            raise TransferError(
                "base_missing",
                f"the snapshot's guest has booted the boot image {digest}, which this host lacks",
                f"copy the directory images/{digest} from the cache of a host that has it (`volar boot-images list`) "
                f"to {settings.cache_dir}/images",
            )
        for what, artifact in (
            ("kernel", boot.kernel), ("initramfs", boot.initramfs), ("root filesystem", boot.rootfs)
        ):  # fmt: skip
            if artifact is not None:
                await self._obtain_artifact(what, artifact)
        for what, path, wanted, brought in (
            ("kernel", settings.kernel, bases.kernel, boot.kernel),
            ("initramfs", settings.initramfs, bases.initramfs, boot.initramfs),
        ):
            found = await _digest_of(path) if path is not None and brought is None else None
            if found != wanted:
                here = "no such setting" if found is None else f"a file with {found}"
                there = "the built boot image's" if wanted is None else f"a file with the SHA-256 {wanted}"
                raise TransferError(
                    "base_mismatch",
                    f"the snapshot's guest has booted with {there} as {what}, and this host has {here}",
                    f"set {what} as on the host that the snapshot is from",
                )
        if boot.image is not None:
            await self._obtain_image(boot.image, project, auth)
            if await self._image_files(boot.image.digest, project) != bases.image_files:
                raise TransferError(
                    "base_mismatch",
                    f"the OCI image {boot.image.digest} is laid out differently here than where the snapshot is from",
                    "install the same version of erofs-utils on both hosts, and delete the image here",
                )

    async def _obtain_artifact(self, what: str, artifact: Artifact) -> None:
        if await self.artifacts.has(artifact):
            return
        why = "its manifest names a file of the other host"
        if images.local_path(artifact.url) is None:
            try:
                await self.artifacts.obtain(artifact)
            except ImageError as error:
                why = str(error)
            else:
                return
        raise TransferError(
            "base_missing",
            f"the snapshot needs the {what} with the SHA-256 {artifact.sha256}, which this host lacks: {why}",
            "send the file with `volar plugins upload`",
        )

    async def _obtain_image(self, image: OciImage, project: str, auth: bytes | None) -> None:
        if await self.oci.find(image.digest, project) is not None:
            return
        reference = oci.parse_reference(image.reference, project)
        why = "it is from a file of the other host"
        if reference.registry:
            try:
                await self.oci.pull(str(reference.with_digest(image.digest)), project, auth=auth)
            except OciError as error:
                why = str(error)
            else:
                return
        raise TransferError(
            "base_missing",
            f"the snapshot needs the OCI image {image.digest}, which this host lacks ({reference}): {why}",
            "`volar images pull NAME@DIGEST` fetches it from any registry that has it, and `volar images load` sends "
            "an archive",
        )

    async def _image_files(self, digest: str, project: str) -> tuple[str, ...]:
        found = await self.oci.find(digest, project)
        if found is None:
            raise TransferError(
                "base_missing", f"the OCI image {digest}, which the snapshot needs, is not in the cache",
                "pull it by its digest: `volar images pull NAME@DIGEST`",
            )  # fmt: skip
        return tuple([await _digest_of(path) for path in (found.metadata, *found.layers)])


async def _digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file. :raises TransferError: `base_missing`"""
    digest = hashlib.sha256()

    def read(at: int) -> int:
        with path.open("rb") as file:
            file.seek(at)
            for _ in range(32):
                piece = file.read(_PIECE)
                digest.update(piece)
                at += len(piece)
                if not piece:
                    return -1
        return at

    at = 0
    try:
        while at >= 0:
            at = await trio.to_thread.run_sync(read, at)
    except OSError as error:
        raise TransferError("base_missing", f"{path} can't be read: {error.strerror}") from error
    return digest.hexdigest()


def registries(artifacts: ArtifactCache, is_admin: bool) -> oci.Resolve:
    """Returns a resolver for the registries that clients may have the daemon connect to, with their token services and
    storage: the hosts from which artifacts may be fetched, and for administrators all hosts."""

    async def resolve(host: str, port: int, *, must_exist: bool) -> list[str]:
        try:
            return await artifacts.addresses(host, port, anywhere=is_admin, must_exist=must_exist)
        except ImageError as error:
            if is_admin:
                raise OSError(f"{host[:100]} has no address") from error
            raise OciError(
                "registry_not_allowed", f"{host[:100]} has no public address, and this client may use no other",
                "an administrator can allow its network in artifact_allow_cidr",
            ) from error  # fmt: skip

    return resolve
