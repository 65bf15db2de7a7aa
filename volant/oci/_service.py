"""The images of a daemon. No part of them is loaded, and no file is read, before the first request for an image."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import trio

from volant.host import Host

from ._errors import OciError
from ._isolation import Isolation

if TYPE_CHECKING:
    from ._fetch import Resolved
    from ._images import OciImages, Pruned, Pull
    from ._proxy import Resolve
    from ._report import Observe
    from ._store import CachedImage
    from ._upload import ArchiveUpload


_logger = logging.getLogger("volant.oci")

PRIVATE = "registries"
"""The directory of credentials, in the runtime directory."""


class ImageUser(NamedTuple):
    """A VM or snapshot that uses an image."""

    project: str
    what: str
    """The user's name, such as `VM web` or `snapshot warm`."""


class ImageSource(Protocol):
    """The source of OCI images for VMs. References are texts."""

    async def resolve(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> Resolved:
        """Returns an image whose manifest and configuration are known and checked; its layers are being fetched.

        :param project: the project in which the reference is looked up
        :param auth: the content of an auth file
        :param refresh: whether to resolve the tag at the registry again
        :param is_admin: whether the fetch may connect to hosts without a public address. A later one of
            `obtain_digest` may not
        :raises OciError: it can't be resolved.
        """

    async def obtain_digest(
        self, digest: str, reference: str, project: str, *, auth: Callable[[], Awaitable[bytes]] | None = None
    ) -> CachedImage:
        """Returns the complete image that `resolve` has found, once it is in the cache.

        :param auth: returns the content of an auth file, if the image must be fetched again; None for no credentials of
            the caller
        :raises OciError: it failed; and the errors of `auth`
        """


class ImageLibrary(ImageSource, Protocol):
    """The images of the cache, for clients. Callers set their own deadlines."""

    async def pull(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        """Returns a complete image in the cache. The fetch continues for some time if the caller is cancelled. For the
        parameters see `resolve`. :raises OciError: it failed."""

    def receiving(self, project: str) -> AbstractAsyncContextManager[ArchiveUpload]:
        """Receives an archive of an image of a project in the block, which removes it at its end; see `load`.

        :raises OciError: it failed.
        """

    async def load(self, upload: ArchiveUpload, name: str, project: str) -> CachedImage:
        """Returns the image of a received archive. From now on `name` leads to it in that project. :raises OciError: it
        can't be used."""

    def pulls(self) -> list[Pull]:
        """Returns the fetches in progress."""

    async def all(self, project: str | None = None) -> list[CachedImage]:
        """Returns the images that a project has a name of or uses; with None all. :raises OciError: they can't be
        read."""

    async def get(self, reference: str, project: str) -> CachedImage | None:
        """Returns the image to which a reference last resolved in a project. :raises OciError: it is malformed."""

    async def find(self, digest: str, project: str | None = None) -> CachedImage | None:
        """Returns an image by its digest or the digest's first digits, if a project sees it; with the project None, any
        image.

        :raises OciError: it is ambiguous or no digest
        """

    async def forget(self, digest: str, project: str) -> bool:
        """Removes a project's names of an image, and the image if no one else has a name of it or uses it. Returns
        whether the image was removed.

        :raises OciError: `image_in_use`: the project uses it itself
        """

    async def forget_project(self, project: str) -> None:
        """Removes all names of a project; the next prune removes images that nothing needs. :raises OciError: it
        failed."""

    def users(self) -> Mapping[str, Sequence[ImageUser]]:
        """Returns the VMs and snapshots that use each image, by its digest."""

    async def remove(self, digest: str) -> bool:
        """Removes an image with its references. Returns whether it existed. :raises OciError: `image_in_use`"""

    async def remove_name(self, reference: str, project: str) -> bool:
        """Removes a reference of a project, not its image. Returns whether it existed. :raises OciError: it failed."""

    async def prune(self, max_bytes: int, *, unused_for_s: float = 0.0, dry_run: bool = False) -> Pruned:
        """Removes unused images, least recently used first, until all images take at most `max_bytes`.

        :raises OciError: it failed.
        """


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's settings for images."""

    state_dir: Path | None = None
    """The state directory, by which other daemons that share the cache identify this one."""
    cache_dir: Path
    max_cache_bytes: float = math.inf
    """Maximum size of the cache. After a fetch, unused images are removed until all images fit."""
    runtime_dir: Path
    """The directory for credentials, on a file system in memory."""
    timeout_s: float = 1800.0
    """Maximum time for a whole fetch."""
    stall_timeout_s: float = 60.0
    """Maximum time for a fetch without progress."""
    max_bytes: int = 64 * 1024**3
    """Maximum size of an image's layers, as fetched."""
    isolation: Isolation | None = None
    """The isolation of the programs that fetch and convert; None for no sandbox."""
    plain_http: frozenset[str] = frozenset()
    """Registries that may be used without TLS, including their ports, at any address."""
    certificates: Path | None = None
    """A directory of CA certificates for registries."""
    auth_file: Path | None = None
    """An auth file for clients that send no credentials."""
    environment: Mapping[str, str] = {}
    """The environment variables with the operator's proxies."""
    registries: Callable[[bool], Resolve] | None = None
    """Returns the resolver for administrators (True) or others (False); None if everyone may use all registries."""


class ImageService(msgspec.Struct):
    """The images of one daemon, while `keep` runs."""

    host: Host
    settings: ImageSettings
    users: Callable[[], Mapping[str, Sequence[ImageUser]]] = dict
    """Returns the users of each image, by its digest, for texts."""
    observe: Observe = lambda event: None
    """Receives the events of fetches."""
    _nursery: trio.Nursery | None = None
    _images: OciImages | None = None
    _lock: trio.Lock = msgspec.field(default_factory=trio.Lock)

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs fetches until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                if self._has_leftovers():
                    nursery.start_soon(self._clear)
                await trio.sleep_forever()
            finally:
                self._nursery = self._images = None

    async def resolve(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> Resolved:
        images = await self._open()
        return await images.resolve(images.parse(reference, project), auth=auth, refresh=refresh, is_admin=is_admin)

    async def obtain_digest(
        self, digest: str, reference: str, project: str, *, auth: Callable[[], Awaitable[bytes]] | None = None
    ) -> CachedImage:
        images = await self._open()
        return await images.obtain_digest(digest, images.parse(reference, project), auth=auth)

    async def pull(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        images = await self._open()
        return await images.pull(images.parse(reference, project), auth=auth, refresh=refresh, is_admin=is_admin)

    @asynccontextmanager
    async def receiving(self, project: str) -> AsyncIterator[ArchiveUpload]:
        images = await self._open()
        async with images.receiving(project) as upload:
            yield upload

    async def load(self, upload: ArchiveUpload, name: str, project: str) -> CachedImage:
        images = await self._open()
        return await images.load(upload, images.parse(name, project))

    def pulls(self) -> list[Pull]:
        return [] if self._images is None else self._images.pulls()

    async def all(self, project: str | None = None) -> list[CachedImage]:
        return await (await self._open()).all(project)

    async def get(self, reference: str, project: str) -> CachedImage | None:
        images = await self._open()
        return await images.get(images.parse(reference, project))

    async def find(self, digest: str, project: str | None = None) -> CachedImage | None:
        return await (await self._open()).find(digest, project)

    async def forget(self, digest: str, project: str) -> bool:
        return await (await self._open()).forget(digest, project)

    async def forget_project(self, project: str) -> None:
        if self.host.files.exists(self.settings.cache_dir / "oci"):
            await (await self._open()).forget_project(project)

    async def remove(self, digest: str) -> bool:
        return await (await self._open()).remove(digest)

    async def remove_name(self, reference: str, project: str) -> bool:
        images = await self._open()
        return await images.remove_name(images.parse(reference, project))

    async def prune(self, max_bytes: int, *, unused_for_s: float = 0.0, dry_run: bool = False) -> Pruned:
        return await (await self._open()).prune(max_bytes, unused_for_s=unused_for_s, dry_run=dry_run)

    def _has_leftovers(self) -> bool:
        """Returns whether an earlier daemon was killed in a fetch and left credentials and working directories."""
        files, places = self.host.files, (self.settings.runtime_dir / PRIVATE, self.settings.cache_dir / "oci" / "work")
        return any(files.exists(place) and files.names(place) for place in places)

    async def _clear(self) -> None:
        try:
            await self._open()
        except (OciError, OSError) as error:
            _logger.warning("what an earlier daemon left of fetches of images can't be removed: %s", error)

    async def _open(self) -> OciImages:
        """Returns the loaded images. :raises OciError: the cache can't be used."""
        async with self._lock:
            nursery = self._nursery
            if nursery is None:
                raise OciError("images_stopped", "the daemon fetches no images now", "try again")
            if self._images is not None:
                return self._images
            module = await trio.to_thread.run_sync(import_module, f"{__package__}._images")
            images: OciImages = module.load_images(self.host, self.settings, nursery, self.users, self.observe)
            await images.prepare()
            if self._nursery is nursery:
                self._images = images
            return images
