"""The images of one daemon: fetches each once for all its waiters, lists and removes them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import trio

from volant.concurrency import NoPlace, Places, open_helpers
from volant.host import Host
from volant.store import disk_errors

from ._errors import OciError
from ._fetch import Fetcher, FetchLimits, Resolved, Target
from ._manifest import AMD64, Platform
from ._prune import surplus
from ._reference import Reference, parse_reference
from ._report import Kind, Observe, PullEvent, Report
from ._service import PRIVATE, ImageSettings, ImageUser
from ._skopeo import Rights, Skopeo
from ._store import CachedImage, Store, Work, digits
from ._upload import ArchiveUpload, archive_kind

_logger = logging.getLogger("volant.oci")

_FETCHES_AT_ONCE = 2
"""Maximum concurrent fetches. Each uses a processor to decompress, and another to write."""
_CLEAR_S = 30.0
"""Maximum time for the removal of a working directory. The next start removes the rest."""
_RESOLVES_AT_ONCE = 8
"""Maximum concurrent look-ups of references. Each is a process of skopeo that waits for the network."""
_MAX_FETCHES = 64
"""Maximum fetches that run or wait. Each has a directory, and possibly credentials."""
_UPLOADS_AT_ONCE = 16
_UPLOADS_OF_ONE = 4
"""Maximum concurrent uploads per project."""
_UNATTENDED_S = 600.0
"""How long a fetch continues without a waiter: a VM was created, and its boot comes later."""


Users = Callable[[], Mapping[str, Sequence[ImageUser]]]
"""Returns the users of each image, by its digest, for texts."""


class Pull(msgspec.Struct, frozen=True):
    """A view of a fetch in progress."""

    reference: str
    digest: str | None
    report: Report
    waiting: int
    project: str


class Pruned(NamedTuple):
    """The images that `prune` has removed, as they were before."""

    images: list[CachedImage]
    freed_bytes: int


class _Fetch(msgspec.Struct, eq=False):
    """A fetch in progress, and its waiters."""

    reference: Reference
    name: Reference
    """The reference by which it is listed and found, or the name for a received archive."""
    scope: trio.CancelScope = msgspec.field(default_factory=trio.CancelScope)
    report: Report = msgspec.field(default_factory=Report)
    waiting: int = 0
    goes_on: bool = False
    """Whether it continues for some time without waiters."""
    is_first: bool = False
    """Whether it fetches the layers. Other fetches that found the same image wait for it."""
    resolved: trio.Event = msgspec.field(default_factory=trio.Event)
    found: Resolved | None = None
    done: trio.Event = msgspec.field(default_factory=trio.Event)
    result: CachedImage | None = None
    error: OciError | None = None

    def raise_error(self) -> NoReturn:
        """Raises a copy for each waiter: an exception collects tracebacks."""
        assert self.error is not None
        raise OciError(self.error.code, self.error.message, self.error.hint)


@asynccontextmanager
async def open_images(
    host: Host,
    directory: Path,
    skopeo: Skopeo,
    *,
    limits: FetchLimits | None = None,
    platform: Platform = AMD64,
    **options: Any,
) -> AsyncIterator[OciImages]:
    """Opens the images of a cache for the block, and removes the remains of killed fetches.

    :param directory: `oci` in the cache
    :param options: options of `OciImages`
    :raises OciError: the cache can't be used
    """
    async with open_helpers() as nursery:
        images = OciImages(
            host, Store(directory, skopeo.user), skopeo, nursery, limits or FetchLimits(), platform=platform, **options
        )
        await images.prepare()
        yield images


def load_images(
    host: Host, settings: ImageSettings, nursery: trio.Nursery, users: Users, observe: Observe
) -> OciImages:
    """Returns the images of a daemon; fetches run in a nursery. Call `prepare` first."""
    skopeo = Skopeo(
        host,
        settings.runtime_dir / PRIVATE,
        plain_http=settings.plain_http,
        environment=settings.environment,
        stalled_s=settings.stall_timeout_s,
        certificates=settings.certificates,
        auth_file=settings.auth_file,
        isolation=settings.isolation,
        registries=settings.registries,
    )
    limits = FetchLimits(timeout_s=settings.timeout_s, max_bytes=settings.max_bytes)
    store = Store(settings.cache_dir / "oci", skopeo.user)
    return OciImages(
        host, store, skopeo, nursery, limits,
        owner=settings.state_dir, max_cache_bytes=settings.max_cache_bytes, users=users, observe=observe,
    )  # fmt: skip


class OciImages:
    """The images of one daemon, from `open_images` or `load_images`."""

    parse = staticmethod(parse_reference)

    def __init__(
        self,
        host: Host,
        store: Store,
        skopeo: Skopeo,
        nursery: trio.Nursery,
        limits: FetchLimits,
        *,
        platform: Platform = AMD64,
        owner: Path | None = None,
        max_cache_bytes: float = math.inf,
        users: Users = dict,
        observe: Observe = lambda event: None,
    ) -> None:
        """
        :param nursery: runs the fetches
        :param owner: the daemon's state directory, which marks the images of its VMs for daemons that share the cache
        :param max_cache_bytes: unused images are removed after a fetch until all images take at most this
        :param users: returns the users of images
        :param observe: receives the events of fetches
        """
        self._store = store
        self._skopeo = skopeo
        self._nursery = nursery
        self._limits = limits
        self._owner = owner
        self._max_cache_bytes = max_cache_bytes
        self._users = users
        self._observe = observe
        self._fetcher = Fetcher(host=host, store=store, skopeo=skopeo, limits=limits, platform=platform)
        self._resolving = trio.CapacityLimiter(_RESOLVES_AT_ONCE)
        self._slots = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._uploads = Places(_UPLOADS_AT_ONCE, _UPLOADS_OF_ONE)
        self._under_way: dict[object, _Fetch] = {}

    async def prepare(self) -> None:
        """Removes the remains of killed fetches. :raises OciError: the cache can't be used."""
        await self._skopeo.forget_credentials()
        await trio.to_thread.run_sync(self._store.sweep)

    async def obtain(
        self, reference: Reference, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        """Returns a complete image in the cache; fetches it if the cache has no image for this reference. Files are
        read each time.

        If several callers request the same image, it is fetched once. A cancelled caller ends the fetch if there is no
        other. A reference to a file is read with the rights of the daemon, so the caller must check that the client may
        do that.

        :param auth: the content of an auth file; a fetch with credentials is only for this caller
        :param refresh: whether to resolve the tag at the registry again
        :param is_admin: whether the fetch may connect to hosts without a public address
        :raises OciError: see the list in `docs/explanation/oci.md`
        """
        if not refresh and (found := await self._recall(reference)) is not None:
            return found
        fetch = self._begin(reference, auth, is_admin=is_admin)
        with _waiting(fetch):
            await fetch.done.wait()
        return fetch.result or fetch.raise_error()

    async def resolve(
        self, reference: Reference, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> Resolved:
        """Returns the target of a reference once manifest and configuration are known and checked, without the network
        if the cache has them.

        The fetch of the layers begins, and continues for 10 minutes without a waiter. `obtain_digest` joins it, so only
        this call needs credentials. For the parameters see `obtain`.

        :raises OciError: it can't be resolved.
        """
        if not refresh and (found := await self._recall(reference)) is not None:
            return Resolved(reference=str(reference), digest=found.digest, config=found.config)
        fetch = self._begin(reference, auth, is_admin=is_admin)
        with _waiting(fetch):
            await fetch.resolved.wait()
            if fetch.found is None:
                fetch.raise_error()
            fetch.goes_on = True
            return fetch.found

    async def obtain_digest(
        self, digest: str, reference: Reference, *, auth: Callable[[], Awaitable[bytes]] | None = None
    ) -> CachedImage:
        """Returns an image that `resolve` has found: from the fetch under way, from the cache, or fetched again.

        :param auth: returns the content of an auth file, if the image must be fetched again; None for no credentials
        :raises OciError: `image_changed` if a file has another image now; others see `obtain`
        """
        found = await self._obtain_digest(digest, reference, auth)
        if self._owner is not None:
            await trio.to_thread.run_sync(self._store.note_user, digest, self._owner)
        return found

    async def _obtain_digest(
        self, digest: str, reference: Reference, auth: Callable[[], Awaitable[bytes]] | None
    ) -> CachedImage:
        fetch = self._fetch_of(digest)
        if fetch is None:
            found = await trio.to_thread.run_sync(self._store.use, digest)
            if found is not None:
                return found
            again = reference.with_digest(digest) if reference.registry else reference
            fetch = self._begin(again, None if auth is None else await auth())
        with _waiting(fetch):
            await fetch.resolved.wait()
            if fetch.found is not None and fetch.found.digest != digest:
                raise OciError(
                    "image_changed", f"{reference} has the image {fetch.found.digest} by now, not {digest}",
                    "create the VM again, or put the file back",
                )  # fmt: skip
            await fetch.done.wait()
        return fetch.result or fetch.raise_error()

    async def pull(
        self, reference: Reference, *, auth: bytes | None = None, refresh: bool = False, is_admin: bool = False
    ) -> CachedImage:
        """Returns a complete image in the cache like `obtain`. The fetch continues for some time if the caller is
        cancelled. :raises OciError: it failed."""
        found = await self.resolve(reference, auth=auth, refresh=refresh, is_admin=is_admin)
        return await self.obtain_digest(found.digest, reference)

    @asynccontextmanager
    async def receiving(self, project: str) -> AsyncIterator[ArchiveUpload]:
        """Receives an archive of an image in the block, which removes it at its end; see `load`.

        :param project: the client's project
        :raises OciError: `too_many_fetches`; the cache can't be written
        """
        try:
            with self._uploads.take(project):
                async with self._working() as work:
                    with (
                        disk_errors(OciError),
                        closing(ArchiveUpload(work.path / "archive", self._limits.max_bytes)) as upload,
                    ):
                        yield upload
        except NoPlace as full:
            raise OciError(
                "too_many_fetches", f"too many archives are being received already: {full}", "try again later"
            ) from None

    async def load(self, upload: ArchiveUpload, name: Reference) -> CachedImage:
        """Returns the image of a received archive, once it is in the cache.

        :param name: a name in a registry, which leads to this image from now on
        :raises OciError: it can't be used.
        """
        if not name.registry or not name.tag:
            raise OciError("bad_reference", f"{name} can't be the name of an archive", "write a name with a tag")
        await upload.flush()
        with disk_errors(OciError):
            kind = await trio.to_thread.run_sync(archive_kind, upload.path)
        fetch = self._begin(Reference(kind, str(upload.path)), None, name=name)
        with _waiting(fetch):
            await fetch.done.wait()
        return fetch.result or fetch.raise_error()

    def pulls(self) -> list[Pull]:
        """Returns the fetches in progress."""
        return [
            Pull(
                reference=str(fetch.name),
                digest=None if fetch.found is None else fetch.found.digest,
                report=fetch.report,
                waiting=fetch.waiting,
                project=fetch.name.project,
            )
            for fetch in self._under_way.values()
            if not fetch.scope.cancel_called
        ]

    # Finding and removing

    async def get(self, reference: Reference) -> CachedImage | None:
        """Returns the image to which a reference resolved last, if it is in the cache."""
        return await trio.to_thread.run_sync(self._known, reference)

    async def find(self, digest: str, project: str | None = None) -> CachedImage | None:
        """Returns an image by its digest or the digest's first digits, if a project sees it; with the project None, any
        image.

        :raises OciError: it is ambiguous or no digest
        """
        digests = await trio.to_thread.run_sync(self._store.digests, digest)
        seen = [image for image in await self.all(project) if image.digest in digests]
        if len(seen) > 1:
            raise OciError("bad_reference", f"{len(seen)} images begin with {digest}", "write more digits")
        return seen[0] if seen else None

    async def all(self, project: str | None = None) -> list[CachedImage]:
        """Returns the images that a project has a name of or uses; with None all images in the cache."""
        images = await trio.to_thread.run_sync(self._store.all, project)
        if project is None:
            return images
        users = self._users()
        return [
            image
            for image in images
            if image.names or any(user.project == project for user in users.get(image.digest, ()))
        ]

    async def forget(self, digest: str, project: str) -> bool:
        """Removes a project's names of an image, and the image if no one else has a name of it or uses it. Returns
        whether the image was removed.

        :raises OciError: `image_in_use`: the project uses it itself
        """
        own = [user.what for user in self._users().get(digest, ()) if user.project == project]
        if own:
            raise OciError("image_in_use", f"the image {digest} is used by {', '.join(own[:5])}", "delete them first")
        others = await trio.to_thread.run_sync(self._store.remove_names, digest, project)
        if others or await self.users_of(digest):
            return False
        return await self.remove(digest)

    async def used_bytes(self) -> int:
        """Returns the space that all layers and images take up."""
        return await trio.to_thread.run_sync(self._store.used_bytes)

    async def remove_name(self, reference: Reference) -> bool:
        """Removes a reference, not its image. Returns whether it existed. :raises OciError: it failed."""
        return await trio.to_thread.run_sync(self._store.remove_name, reference)

    async def remove(self, digest: str) -> bool:
        """Removes an image and its references. Returns whether it existed.

        :raises OciError: `image_in_use`
        """
        if users := await self.users_of(digest):
            raise OciError("image_in_use", f"the image {digest} is used by {', '.join(users[:5])}", "delete them first")
        return await trio.to_thread.run_sync(self._store.remove, digest)

    async def forget_project(self, project: str) -> None:
        """Removes all names of a project; the next `prune` removes images that nothing needs. :raises OciError: it
        failed."""
        await trio.to_thread.run_sync(self._store.remove_project, project)

    async def prune(self, max_bytes: int, *, unused_for_s: float = 0.0, dry_run: bool = False) -> Pruned:
        """Removes unused images, least recently used first, until all images take at most `max_bytes`.

        :param unused_for_s: only images that were not requested within this time
        :param dry_run: whether to remove none
        :raises OciError: it failed.
        """
        if self._owner is not None:
            used = {digits(digest) for digest in self._users()}
            with disk_errors(OciError):
                await trio.to_thread.run_sync(self._store.users.forget_others, self._owner, used)
        images = await self.all()
        users = {image.digest: await self.users_of(image.digest) for image in images}
        since = time.time() - unused_for_s
        gone, freed = surplus(images, max_bytes, lambda image: not users[image.digest] and image.used_at <= since)
        if dry_run:
            return Pruned(gone, freed)
        removed = []
        await trio.to_thread.run_sync(self._store.collect)
        for image in gone:
            try:
                if await self.remove(image.digest):
                    removed.append(image)
            except OciError as error:
                if error.code != "image_in_use":
                    raise
        return Pruned(removed, freed if len(removed) == len(gone) else sum(image.own_bytes for image in removed))

    async def users_of(self, digest: str) -> list[str]:
        """Returns the users of an image: VMs, snapshots, fetches."""
        found = [user.what for user in self._users().get(digest, ())]
        if self._owner is not None:
            owners = await trio.to_thread.run_sync(self._store.users.of, digits(digest))
            found += [f"the daemon of {owner}" for owner in owners if owner != self._owner]
        if self._fetch_of(digest) is not None:
            found.append("a fetch that is under way")
        return found

    # Fetching

    def _known(self, reference: Reference) -> CachedImage | None:
        digest = self._store.resolve(reference)
        return None if digest is None else self._store.find(digest, project=reference.project)

    def _use(self, reference: Reference) -> CachedImage | None:
        digest = self._store.resolve(reference)
        return None if digest is None else self._store.use(digest)

    async def _recall(self, reference: Reference) -> CachedImage | None:
        # A file may have changed, and is at hand.
        return await trio.to_thread.run_sync(self._use, reference) if reference.registry else None

    def _begin(
        self, reference: Reference, auth: bytes | None, *, is_admin: bool = False, name: Reference | None = None
    ) -> _Fetch:
        """Returns the fetch of a reference; starts it unless it is running. :raises OciError: there are too many."""
        key: object = (reference, is_admin) if auth is None else object()
        fetch = self._under_way.get(key)
        # Nobody waits for a cancelled one any more.
        if fetch is None or fetch.scope.cancel_called:
            if len(self._under_way) >= _MAX_FETCHES:
                raise OciError(
                    "too_many_fetches", f"{_MAX_FETCHES} images are being fetched already", "try again later"
                )
            fetch = self._under_way[key] = _Fetch(reference, name or reference)
            self._nursery.start_soon(self._run, key, fetch, auth, is_admin)
        return fetch

    def _fetch_of(self, digest: str, *, first: bool = False) -> _Fetch | None:
        """Returns a fetch that has found this image; with `first` only the one that fetches its layers."""
        for fetch in self._under_way.values():
            is_it = fetch.found is not None and fetch.found.digest == digest and not fetch.scope.cancel_called
            if is_it and (fetch.is_first or not first):
                return fetch
        return None

    async def _run(self, key: object, fetch: _Fetch, auth: bytes | None, is_admin: bool) -> None:
        # Kept if this task is cancelled.
        fetch.error = OciError("fetch_interrupted", f"{fetch.name}: the fetch was given up", "try again")
        try:
            with fetch.scope:
                fetch.result = await self._within_limits(fetch, auth, is_admin)
        except OciError as error:
            # A client does not know where its archive lies here.
            message = error.message.replace(str(fetch.reference), str(fetch.name))
            fetch.error = OciError(error.code, message, error.hint)
        except OSError as error:
            fetch.error = OciError("io_error", f"{fetch.name}: {error}", "check the daemon's directories")
        finally:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]
            fetch.resolved.set()
            fetch.done.set()

    async def _within_limits(self, fetch: _Fetch, auth: bytes | None, is_admin: bool) -> CachedImage:
        with trio.move_on_after(self._limits.timeout_s):
            async with self._skopeo.rights(auth, is_admin=is_admin) as rights, self._working() as work:
                # A file is copied already when it is resolved.
                async with self._resolving if fetch.reference.registry else self._slots:
                    target = await self._fetcher.resolve(fetch.reference, rights, work, fetch.report)
                fetch.report.total_bytes = target.total_bytes
                fetch.found = Resolved(
                    reference=str(fetch.reference), digest=target.digest, config=target.config,
                    total_bytes=target.total_bytes,
                )  # fmt: skip
                fetch.resolved.set()
                if not target.is_cached and not await self._wait_for_first(fetch, target):
                    await self._fetch_layers(fetch, target, rights, work)
            return await self._found(fetch.name, target.digest)
        raise OciError(
            "timeout", f"{fetch.name} did not arrive within {self._limits.timeout_s:g} s",
            "an administrator can allow more: oci_timeout_s",
        )  # fmt: skip

    async def _fetch_layers(self, fetch: _Fetch, target: Target, rights: Rights, work: Work) -> None:
        report = fetch.report

        def notify(kind: Kind, code: str = "", message: str = "") -> None:
            self._observe(
                PullEvent(
                    kind=kind, project=fetch.name.project, reference=str(fetch.name), digest=target.digest,
                    code=code, message=message, done_bytes=report.done_bytes, total_bytes=report.total_bytes,
                    layers_done=report.layers_done, layers_total=report.layers_total, bytes_per_s=report.bytes_per_s,
                )
            )  # fmt: skip

        fetch.is_first = True
        report.phase = "waiting"
        report.on_step = partial(notify, "progress")
        notify("started")
        failure: OciError | None = OciError("fetch_interrupted", "the fetch was given up", "try again")
        try:
            async with self._slots:
                await self._fetcher.fetch(target, rights, work, report)
        except OciError as error:
            failure = error
            raise
        else:
            failure = None
        finally:
            if failure is None:
                notify("done")
                self._nursery.start_soon(self._keep_limit)
            else:
                notify("failed", failure.code, failure.message)

    async def _keep_limit(self) -> None:
        """Removes images until the rest fits. An image that was just requested stays: its VM may have no row yet."""
        if self._max_cache_bytes == math.inf:
            return
        try:
            pruned = await self.prune(int(self._max_cache_bytes), unused_for_s=_UNATTENDED_S)
        except OciError as error:
            _logger.warning("OCI images can't be removed: %s", error)
            return
        for image in pruned.images:
            _logger.info("removed the OCI image %s (%s): the cache is full", image.digest, ", ".join(image.names))

    async def _wait_for_first(self, fetch: _Fetch, target: Target) -> bool:
        """Waits for an earlier fetch of the same image. Returns whether the cache has the image then."""
        while (first := self._fetch_of(target.digest, first=True)) is not None:
            fetch.report = first.report
            with _waiting(first):
                await first.done.wait()
            if first.result is not None:
                return True
        fetch.report = Report(total_bytes=target.total_bytes)
        return False

    async def _found(self, reference: Reference, digest: str) -> CachedImage:
        await trio.to_thread.run_sync(self._store.note, reference, digest)
        found = await trio.to_thread.run_sync(partial(self._store.find, digest, project=reference.project, use=True))
        if found is None:
            raise OciError("io_error", f"{reference} was stored and can't be read back", "check the cache's disk")
        return found

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[Work]:
        manager = self._store.working()
        work = await trio.to_thread.run_sync(manager.__enter__)
        try:
            with disk_errors(OciError):
                await self._skopeo.share(work.scratch)
            yield work
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)


@contextmanager
def _waiting(fetch: _Fetch) -> Iterator[None]:
    """Waits for a fetch in the block. When its last waiter leaves, the fetch ends, or continues for some time."""
    fetch.waiting += 1
    fetch.scope.deadline = math.inf
    try:
        yield
    finally:
        fetch.waiting -= 1
        if not fetch.waiting and not fetch.done.is_set():
            if fetch.goes_on:
                fetch.scope.deadline = trio.current_time() + _UNATTENDED_S
            else:
                fetch.scope.cancel()
