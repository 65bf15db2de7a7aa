"""A registry, and the cache of OCI images of the simulated machine: fetches fail, take long, and bring what was not
asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from actors import fault
from volant.oci import AMD64, CachedImage, ImageConfig, ImageUser, OciError, Pruned, Pull, Resolved, parse_reference

from .file_system import File

if TYPE_CHECKING:
    from volant.oci import ArchiveUpload

    from .calls import Calls

_PIECES = ("blob", "blob", "blob", "layer.unfinished")
"""The file to which each step of a fetch writes: the last one converts."""
_LAYER_BYTES = 1 << 20
_PIECE_S = 2.0
_SLOW_S = 900.0


class SimRegistry(msgspec.Struct):
    """The registries of the world: which image is under which complete reference."""

    images: dict[str, ImageConfig] = msgspec.field(default_factory=dict)
    pulls: int = 0
    """How often layers were fetched."""

    def push(self, reference: str, config: ImageConfig | None = None) -> str:
        """Puts an image under a reference. Returns its digest."""
        name = str(parse_reference(reference))
        self.images[name] = config or ImageConfig(platform=AMD64, diff_ids=(_sha256(name),), cmd=("serve",))
        return digest_of_config(self.images[name])


class SimImages:
    """Implements `volant.oci.ImageLibrary` for one daemon."""

    def __init__(self, registry: SimRegistry, calls: Calls, cache_dir: Path) -> None:
        self._registry = registry
        self._calls = calls
        self._directory = cache_dir / "oci"

    async def resolve(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> Resolved:
        name = str(parse_reference(reference))

        def ask() -> Resolved:
            if fault("oci.refuses"):
                raise OciError(
                    "registry_unreachable", f"{name} can't be fetched: the simulated registry is down", "try again"
                )
            if (config := self._registry.images.get(name)) is None:
                raise OciError("image_not_found", f"{name} can't be fetched: manifest unknown", "check name and tag")
            digest = digest_of_config(config)
            size = 0 if self._find(digest, config) else _LAYER_BYTES * len(config.diff_ids)
            return Resolved(reference=name, digest=digest, config=config, total_bytes=size)

        return await self._calls.run(ask)

    async def obtain_digest(
        self, digest: str, reference: str, project: str, *, auth: Callable[[], Awaitable[bytes]] | None = None
    ) -> CachedImage:
        config = next((each for each in self._registry.images.values() if digest_of_config(each) == digest), None)
        if config is None:
            raise OciError("image_not_found", f"{reference} can't be fetched: manifest unknown", "check name and tag")
        found = await self._calls.run(lambda: self._find(digest, config))
        if found is not None:
            return found
        self._registry.pulls += 1
        files, work = self._calls.machine.files, self._directory / "work" / self._calls.machine.new_id()
        for name in _PIECES:
            # A daemon that is killed here leaves what it has so far.
            await self._calls.run(partial(self._write, work / name, b"x"))
            await trio.sleep(_SLOW_S if fault("oci.slow") else _PIECE_S)
            if fault("oci.fails"):
                await self._calls.run(lambda: files.remove_tree(work))
                raise OciError("fetch_interrupted", f"{reference} can't be fetched: unexpected EOF", "try again")
        if fault("oci.wrong_digest"):
            await self._calls.run(lambda: files.remove_tree(work))
            raise OciError("image_mismatch", f"the digest of a layer of {reference} is wrong", "fetch it again")

        def commit() -> CachedImage:
            files.remove_tree(work)
            image = self._image(digest, config)
            for path in (*image.layers, image.disk, image.metadata):
                self._write(path, b"erofs")
            return image

        return await self._calls.run(commit)

    async def pull(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        found = await self.resolve(reference, project, auth=auth, refresh=refresh)
        return await self.obtain_digest(found.digest, reference, project)

    def receiving(self, project: str) -> AbstractAsyncContextManager[ArchiveUpload]:
        raise OciError("images_stopped", "the simulated host takes no archives", "use a registry")

    async def load(self, upload: ArchiveUpload, name: str, project: str) -> CachedImage:
        raise OciError("images_stopped", "the simulated host takes no archives", "use a registry")

    def pulls(self) -> list[Pull]:
        return []

    async def all(self, project: str | None = None) -> list[CachedImage]:
        known = {digest_of_config(config): config for config in self._registry.images.values()}
        found = await self._calls.run(lambda: [self._find(digest, config) for digest, config in known.items()])
        return [image for image in found if image is not None]

    async def get(self, reference: str, project: str) -> CachedImage | None:
        config = self._registry.images.get(str(parse_reference(reference)))
        if config is None:
            return None
        return await self._calls.run(lambda: self._find(digest_of_config(config), config))

    async def find(self, digest: str, project: str | None = None) -> CachedImage | None:
        return next((image for image in await self.all() if image.digest == digest), None)

    def users(self) -> Mapping[str, Sequence[ImageUser]]:
        return {}

    async def remove(self, digest: str) -> bool:
        directory = self._directory / "images" / digest.removeprefix("sha256:")
        await self._calls.run(lambda: self._calls.machine.files.remove_tree(directory))
        return True

    async def forget_project(self, project: str) -> None:
        return

    async def forget(self, digest: str, project: str) -> bool:
        return await self.remove(digest)

    async def remove_name(self, reference: str, project: str) -> bool:
        return False

    async def prune(self, max_bytes: int, *, unused_for_s: float = 0.0, dry_run: bool = False) -> Pruned:
        images = await self.all()
        for image in images:
            await self.remove(image.digest)
        return Pruned(images, sum(image.size_bytes for image in images))

    def _write(self, path: Path, data: bytes) -> None:
        self._calls.check_space(path)
        files = self._calls.machine.files
        files.mkdir(path.parent)
        # On the disk at once: what has a name is whole.
        files.put(path, File(bytearray(data), len(data), data))
        files.sync_directory(path.parent)

    def _find(self, digest: str, config: ImageConfig) -> CachedImage | None:
        image = self._image(digest, config)
        return image if self._calls.machine.files.find(image.metadata) is not None else None

    def _image(self, digest: str, config: ImageConfig) -> CachedImage:
        directory = self._directory / "images" / digest.removeprefix("sha256:")
        size = _LAYER_BYTES * len(config.diff_ids)
        return CachedImage(
            digest=digest,
            config=config,
            metadata=directory / "metadata.erofs",
            disk=directory / "disk.vmdk",
            layers=tuple(directory / f"{number}.erofs" for number in range(len(config.diff_ids))),
            names=(),
            size_bytes=size,
            own_bytes=size,
            used_at=0.0,
            layer_bytes=(_LAYER_BYTES,) * len(config.diff_ids),
        )


def digest_of_config(config: ImageConfig) -> str:
    """Returns the digest of the manifest of a simulated image."""
    return _sha256(msgspec.json.encode(config).decode())


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
