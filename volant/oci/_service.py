"""The images of a daemon: nothing of them is loaded, and no file is looked at, before somebody asks for an image."""

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
    """`VM web`, `snapshot warm`."""


class ImageSource(Protocol):
    """Where VMs get OCI images. References are texts, as people write them."""

    async def resolve(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> Resolved:
        """Returns an image whose manifest and configuration are known and checked; its layers are being fetched.

        :param project: the project in which the reference is looked up
        :param auth: the content of an auth file
        :param refresh: asks the registry again what the tag means
        :param is_admin: whether the fetch may connect to hosts without a public address. A later one of
            `obtain_digest` may not
        :raises OciError:
        """

    async def obtain_digest(
        self, digest: str, reference: str, project: str, *, auth: Callable[[], Awaitable[bytes]] | None = None
    ) -> CachedImage:
        """Returns the whole image that `resolve` has found, once it is in the cache.

        :param auth: returns the content of an auth file, if the image has to be fetched again; None: without
            credentials of the caller
        :raises OciError: and what `auth` raises
        """


class ImageLibrary(ImageSource, Protocol):
    """The images of the cache, for clients. Whoever waits for nothing but an answer has a deadline of its own."""

    async def pull(
        self, reference: str, project: str, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        """Returns an image, whole and in the cache. The fetch goes on for a while if the caller is cancelled. Its
        parameters are those of `resolve`. :raises OciError:"""

    def receiving(self, project: str) -> AbstractAsyncContextManager[ArchiveUpload]:
        """Receives an archive of an image of a project in a block; see `load`. Nothing of it stays after the block.

        :raises OciError:
        """

    async def load(self, upload: ArchiveUpload, name: str, project: str) -> CachedImage:
        """Returns the image in an archive that was received. From now on `name` leads to it
        in that project. :raises OciError:"""

    def pulls(self) -> list[Pull]:
        """Returns the fetches in progress."""

    async def all(self, project: str | None = None) -> list[CachedImage]:
        """Returns the images that a project sees: those that it has a name of or uses; None: all. :raises OciError:"""

    async def get(self, reference: str, project: str) -> CachedImage | None:
        """Returns the image to which a reference resolved last in a project. :raises OciError: it is no reference"""

    async def find(self, digest: str, project: str | None = None) -> CachedImage | None:
        """Returns an image that a project sees (None: any) by its digest, or the first digits of it.

        :raises OciError: ambiguous, or no digest
        """

    async def forget(self, digest: str, project: str) -> bool:
        """Removes the names that a project has of an image, and the image if nobody else has a name or uses it. Returns
        whether the image is gone.

        :raises OciError: `image_in_use`: the project uses it itself
        """

    async def forget_project(self, project: str) -> None:
        """Removes all names of a project; images that nothing needs go when the cache is pruned. :raises OciError:"""

    def users(self) -> Mapping[str, Sequence[ImageUser]]:
        """Returns the VMs and snapshots that use each image, by its digest."""

    async def remove(self, digest: str) -> bool:
        """Removes an image with its references. Returns whether it was there. :raises OciError: `image_in_use`"""

    async def remove_name(self, reference: str, project: str) -> bool:
        """Removes a reference of a project, not its image. Returns whether it was there. :raises OciError:"""

    async def prune(self, max_bytes: int, *, unused_for_s: float = 0.0, dry_run: bool = False) -> Pruned:
        """Removes images that nothing uses, the least recently used first, until all take at most `max_bytes`.

        :raises OciError:
        """


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's settings that images depend on."""

    state_dir: Path | None = None
    """Names the daemon to others that share the cache."""
    cache_dir: Path
    max_cache_bytes: float = math.inf
    """Images that nothing uses are removed after a fetch until all take at most so much."""
    runtime_dir: Path
    """For credentials, on a file system in memory."""
    timeout_s: float = 1800.0
    """For a whole fetch."""
    stall_timeout_s: float = 60.0
    """For a fetch that does not grow."""
    max_bytes: int = 64 * 1024**3
    """Of the layers of an image, as they are fetched."""
    isolation: Isolation | None = None
    """Of the programs that fetch and convert; None: they have no sandbox."""
    plain_http: frozenset[str] = frozenset()
    """Registries that may be used without TLS, with their ports, and named at any address."""
    certificates: Path | None = None
    """A directory of CA certificates for registries."""
    auth_file: Path | None = None
    """An auth file for clients that give no credentials."""
    environment: Mapping[str, str] = {}
    """With the variables of the operator's proxies."""
    registries: Callable[[bool], Resolve] | None = None
    """Looks hosts up for administrators (True) and others; None: everybody may use all."""


class ImageService(msgspec.Struct):
    """The images of one daemon, while `keep` runs."""

    host: Host
    settings: ImageSettings
    users: Callable[[], Mapping[str, Sequence[ImageUser]]] = dict
    """Returns who needs which image, by its digest, for texts."""
    observe: Observe = lambda event: None
    """Is given what happens to fetches."""
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
        """Whether an earlier daemon was killed in a fetch: credentials and working directories are left."""
        files, places = self.host.files, (self.settings.runtime_dir / PRIVATE, self.settings.cache_dir / "oci" / "work")
        return any(files.exists(place) and files.names(place) for place in places)

    async def _clear(self) -> None:
        try:
            await self._open()
        except (OciError, OSError) as error:
            _logger.warning("what an earlier daemon left of fetches of images can't be removed: %s", error)

    async def _open(self) -> OciImages:
        """Returns the images, loaded. :raises OciError: the cache can't be used"""
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
