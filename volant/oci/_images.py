"""The images of one daemon: fetches each once for all that wait for it, lists, removes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from volant.concurrency import open_helpers
from volant.host import Host

from ._errors import OciError
from ._fetch import FetchLimits, Report, fetch_image
from ._manifest import AMD64, Platform
from ._reference import Reference
from ._skopeo import Skopeo
from ._store import CachedImage, Store, Work

_FETCHES_AT_ONCE = 2
"""Each uses a processor to decompress, and another to write."""
_CLEAR_S = 30.0
"""For the removal of a working directory. The next start removes what is left."""


@dataclass
class _Fetch:
    """A fetch in progress, and those that wait for it."""

    reference: Reference
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    report: Report = field(default_factory=Report)
    waiting: int = 0
    done: trio.Event = field(default_factory=trio.Event)
    result: CachedImage | None = None
    error: OciError | None = None


@asynccontextmanager
async def open_images(
    host: Host, directory: Path, skopeo: Skopeo, *, limits: FetchLimits | None = None, platform: Platform = AMD64
) -> AsyncIterator[OciImages]:
    """Opens the images of a cache for a block, and removes what killed fetches left in it.

    :param directory: `oci` in the cache
    :raises OciError: the cache can't be used
    """
    store = Store(directory)
    await skopeo.forget_credentials()
    await trio.to_thread.run_sync(store.sweep)
    async with open_helpers() as nursery:
        yield OciImages(host, store, skopeo, nursery, limits or FetchLimits(), platform)


class OciImages:
    """Get it from `open_images`."""

    def __init__(
        self, host: Host, store: Store, skopeo: Skopeo, nursery: trio.Nursery, limits: FetchLimits, platform: Platform
    ) -> None:
        self._host = host
        self._store = store
        self._skopeo = skopeo
        self._nursery = nursery
        self._limits = limits
        self._platform = platform
        self._slots = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._under_way: dict[object, _Fetch] = {}

    async def obtain(self, reference: Reference, *, auth: bytes | None = None, refresh: bool = False) -> CachedImage:
        """Returns an image, whole and in the cache; fetches it if the cache has no image under this reference. Files
        are read each time.

        If several callers ask for the same image, it is fetched once. A cancelled caller ends the fetch if no other
        waits. A reference to a file is read with the rights of the daemon: the caller decides who may do that.

        :param auth: the content of an auth file; a fetch with credentials is for this caller alone
        :param refresh: asks the registry again what the tag means
        :raises OciError: see the list in `docs/explanation/oci.md`
        """
        # A file may have changed, and is at hand.
        is_tag_known = reference.transport == "docker" and not refresh
        if is_tag_known and (found := await trio.to_thread.run_sync(self._known, reference)) is not None:
            return found
        key: object = reference if auth is None else object()
        fetch = self._under_way.get(key)
        if fetch is None:
            fetch = self._under_way[key] = _Fetch(reference)
            self._nursery.start_soon(self._run, key, fetch, auth)
        fetch.waiting += 1
        try:
            await fetch.done.wait()
        finally:
            fetch.waiting -= 1
            if not fetch.waiting and not fetch.done.is_set():
                # Whoever asks from now on starts another one.
                self._under_way.pop(key, None)
                fetch.scope.cancel()
        if fetch.result is None:
            assert fetch.error is not None
            raise OciError(fetch.error.code, fetch.error.message, fetch.error.hint)
        return fetch.result

    def inspect(self) -> list[dict[str, object]]:
        """Returns the fetches in progress, for JSON."""
        return [
            {
                "reference": str(fetch.reference),
                "phase": fetch.report.phase,
                "done_bytes": fetch.report.done_bytes,
                "total_bytes": fetch.report.total_bytes,
                "waiting": fetch.waiting,
            }
            for fetch in self._under_way.values()
        ]

    async def get(self, reference: Reference) -> CachedImage | None:
        """Returns the image to which a reference resolved last, if it is in the cache."""
        return await trio.to_thread.run_sync(partial(self._known, reference, use=False))

    async def all(self) -> list[CachedImage]:
        """Returns all images of the cache."""
        return await trio.to_thread.run_sync(self._store.all)

    async def used_bytes(self) -> int:
        """Returns the space that all layers and images take."""
        return await trio.to_thread.run_sync(self._store.used_bytes)

    async def remove_name(self, reference: Reference) -> bool:
        """Removes a reference. The image goes with its last one, by `prune`. :raises OciError:"""
        return await trio.to_thread.run_sync(self._store.remove_name, reference)

    async def remove(self, digest: str, *, in_use: Callable[[str], bool] = lambda digest: False) -> bool:
        """Removes an image unless it is in use, and returns whether it was removed. :raises OciError:"""
        if in_use(digest):
            return False
        return await trio.to_thread.run_sync(self._store.remove, digest)

    async def prune(self, max_bytes: int, *, in_use: Callable[[str], bool] = lambda digest: False) -> list[str]:
        """Removes the images that were not used longest, until all take at most `max_bytes`. :raises OciError:"""
        return await trio.to_thread.run_sync(self._store.prune, max_bytes, in_use)

    # Fetching

    def _known(self, reference: Reference, *, use: bool = True) -> CachedImage | None:
        digest = self._store.resolve(reference)
        return None if digest is None else self._store.find(digest, use=use)

    async def _run(self, key: object, fetch: _Fetch, auth: bytes | None) -> None:
        # Kept if this task is cancelled.
        fetch.error = OciError("fetch_interrupted", f"{fetch.reference}: the fetch was given up", "try again")
        try:
            with fetch.scope:
                fetch.result = await self._within_limits(fetch, auth)
        except OciError as error:
            fetch.error = error
        finally:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]
            fetch.done.set()

    async def _within_limits(self, fetch: _Fetch, auth: bytes | None) -> CachedImage:
        with trio.move_on_after(self._limits.timeout_s):
            async with self._slots, self._skopeo.credentials(auth) as auth_file, self._working() as work:
                return await fetch_image(
                    self._host, self._store, self._skopeo, fetch.reference, auth_file, work,
                    limits=self._limits, platform=self._platform, report=fetch.report,
                )  # fmt: skip
        raise OciError(
            "timeout", f"{fetch.reference} did not arrive within {self._limits.timeout_s:g} s", "allow more time"
        )

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[Work]:
        manager = self._store.working()
        work = await trio.to_thread.run_sync(manager.__enter__)
        try:
            yield work
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                await trio.to_thread.run_sync(manager.__exit__, None, None, None)
