"""The daemon's cache of artifacts: fetches each once, receives uploads, removes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from volant.concurrency import NoPlace, Places
from volant.host import is_below
from volant.model import Artifact
from volant.store import disk_errors

from . import _artifacts
from ._artifacts import CachedArtifact
from ._child import run_child
from ._errors import ImageError
from ._origins import ANYWHERE, PUBLIC, Origins, checked, shown
from ._part import Part
from ._progress import Progress

_FETCHES_AT_ONCE = 4
_UPLOADS_AT_ONCE = 16
_UPLOADS_OF_ONE = 4
"""The limit for one project."""
_PLACED_AT_ONCE = 4
"""The maximum number of received files that are renamed at the same time, each by a thread."""
_PIECE = 1024 * 1024
"""The number of bytes of an upload that are written at once."""


class _Fetch:
    """A fetch in progress. Later callers wait for its outcome."""

    def __init__(self, url: str) -> None:
        self.url = url
        """Callers that want the artifact from another URL do not share the error."""
        self.done = trio.Event()
        self.error: ImageError | None = None
        self.progress: Progress | None = None


class ArtifactCache:
    """The artifacts of a cache folder."""

    def __init__(
        self, cache_dir: Path, owner: Path, *, timeout_s: float, max_mb: int, origins: Origins = PUBLIC
    ) -> None:
        """
        :param owner: the daemon's state directory, which marks its artifacts for daemons that share the cache
        :param timeout_s: maximum time for one artifact to arrive
        :param max_mb: the largest artifact, in MiB
        :param origins: from where artifacts may be fetched
        """
        self._origins = origins
        self._uploads = Places(_UPLOADS_AT_ONCE, _UPLOADS_OF_ONE)
        self._placed = trio.CapacityLimiter(_PLACED_AT_ONCE)
        self._cache_dir = cache_dir
        self._owner = owner
        self._timeout_s = timeout_s
        self._max_bytes = max_mb * 2**20
        self._under_way: dict[str, _Fetch] = {}
        self._slots = trio.CapacityLimiter(_FETCHES_AT_ONCE)
        self._removing: dict[str, trio.Event] = {}
        """Artifacts that are being removed. Callers that need one wait, and fetch it again."""

    async def obtain(self, artifact: Artifact) -> CachedArtifact:
        """Returns an artifact, verified and in the cache; fetches it if the cache lacks it. It stays there until this
        daemon removes it.

        Cancelling ends the fetch; if others wait for it, one of them starts it again.

        :raises ImageError: as `fetch`; `timeout` after `timeout_s`
        """
        with trio.move_on_after(self._timeout_s):
            while True:
                if (removing := self._removing.get(artifact.sha256)) is not None:
                    await removing.wait()
                found = await self._find(artifact)
                if found is not None:
                    return found
                other = self._under_way.get(artifact.sha256)
                if other is None:
                    await self._fetch(artifact)
                    continue
                await other.done.wait()
                if other.error is not None and other.url == artifact.url:
                    raise ImageError(other.error.code, other.error.message, other.error.hint)
        raise ImageError(
            "timeout",
            f"{_named(artifact)}: it did not arrive within {self._timeout_s:g} s",
            "raise VOLANT_ARTIFACT_TIMEOUT_S, or fetch it beforehand with `volar boot-images fetch`",
        )

    def may_read(self, path: Path) -> bool:
        """Returns whether files at this path may be fetched for every client; does not access the file."""
        return is_below(self._origins.directories, path)

    async def may_connect(self, host: str, port: int) -> bool:
        """Returns whether clients may make the daemon connect to a host: all its addresses are public or allowed, and
        it can be looked up now."""
        try:
            await trio.to_thread.run_sync(checked, host, port, self._origins, abandon_on_cancel=True)
        except (ImageError, OSError):
            return False
        return True

    async def addresses(self, host: str, port: int, *, anywhere: bool, must_exist: bool = True) -> list[str]:
        """Returns the addresses of a host, all of which clients may make the daemon connect to.

        :param anywhere: whether all addresses are allowed
        :param must_exist: whether a host without an address is an error
        :raises ImageError: `artifact_refused` :raises OSError: the name can't be looked up at present
        """
        look_up = partial(checked, host, port, ANYWHERE if anywhere else self._origins, must_exist=must_exist)
        found = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True)
        return [str(address[0]) for _, address in found]

    async def has(self, artifact: Artifact) -> bool:
        """Returns whether an artifact is in the cache. Then it stays there until this daemon removes it."""
        return await self._find(artifact) is not None

    @asynccontextmanager
    async def receiving(self, digest: str, project: str) -> AsyncIterator[Upload]:
        """Yields an upload of a client. What was received is removed at the end, unless `Upload.finish` was called.

        :param project: the client's project
        :raises ImageError: `cache_busy`: too many uploads at once; `cache_unwritable`; `timeout` after `timeout_s`
        """
        upload = Upload(self, digest)
        try:
            with (
                self._uploads.take(project),
                trio.move_on_after(self._timeout_s) as scope,
                _artifacts.new_part(self._cache_dir) as path,
            ):
                upload.part = Part(path, self._max_bytes)
                try:
                    yield upload
                finally:
                    upload.part.close()
        except NoPlace as full:
            raise ImageError(
                "cache_busy", f"too many files are uploaded already: {full}", "try again when one of them is done"
            ) from None
        if scope.cancelled_caught:
            raise ImageError(
                "timeout", f"the upload took longer than {self._timeout_s:g} s", "raise VOLANT_ARTIFACT_TIMEOUT_S"
            )

    async def keep(self, part: Path, digest: str) -> CachedArtifact:
        """Moves a received file to its place. :raises ImageError: the disk fails."""
        # Waits while the same artifact is being fetched. If this is cancelled, the caller removes the part.
        await trio.to_thread.run_sync(
            _artifacts.place_received, self._cache_dir, part, digest, abandon_on_cancel=True, limiter=self._placed
        )
        found = await self._find(Artifact("", digest))
        if found is None:
            raise ImageError("io_error", "it was written and can't be read back", "check the cache folder's disk")
        return found

    async def _find(self, artifact: Artifact) -> CachedArtifact | None:
        return await trio.to_thread.run_sync(
            _artifacts.use_artifact, self._cache_dir, artifact.sha256, self._owner, abandon_on_cancel=True
        )

    async def remove(self, digest: str, *, in_use: Callable[[], bool]) -> bool:
        """Removes an artifact, unless it is `in_use` or another daemon uses it; returns whether it was removed.

        A VM's row exists before the VM asks for its artifacts. So `in_use` sees a VM that asked before; one that asks
        later waits until the file is gone, and fetches it again.

        :raises ImageError: it can't be removed
        """
        if digest in self._under_way or digest in self._removing or in_use():
            return False
        removed = self._removing[digest] = trio.Event()
        try:
            return await trio.to_thread.run_sync(_artifacts.remove_artifact, self._cache_dir, digest, self._owner)
        finally:
            del self._removing[digest]
            removed.set()

    def inspect(self) -> dict[str, object]:
        """Returns the fetches in progress by digest, for JSON."""
        return {
            digest: {"done_bytes": fetch.progress.done, "total_bytes": fetch.progress.total} if fetch.progress else {}
            for digest, fetch in self._under_way.items()
        }

    async def _fetch(self, artifact: Artifact) -> None:
        under_way = self._under_way[artifact.sha256] = _Fetch(artifact.url)

        def record(progress: Progress) -> None:
            under_way.progress = progress

        arguments = ["fetch", "--cache", str(self._cache_dir), "--url", artifact.url, "--sha256", artifact.sha256]
        arguments += ["--max-bytes", str(self._max_bytes)]
        for directory in self._origins.directories:
            arguments += ["--allow-directory", str(directory)]
        for network in self._origins.networks:
            arguments += ["--allow-network", str(network)]
        try:
            async with self._slots:
                await run_child(arguments, record)
        except ImageError as error:
            under_way.error = ImageError(error.code, f"{_named(artifact)}: {error.message}", error.hint)
            raise under_way.error from error
        finally:
            del self._under_way[artifact.sha256]
            under_way.done.set()


class Upload:
    """An artifact that a client sends: `write` the pieces, then `finish`."""

    def __init__(self, cache: ArtifactCache, digest: str) -> None:
        self._cache = cache
        self._digest = digest
        self._pending = bytearray()
        self.part: Part

    def expect(self, size: int) -> None:
        """Announces the size. :raises ImageError: `artifact_too_large`."""
        self.part.expect(size)

    async def write(self, data: bytes) -> None:
        """Writes the next bytes. :raises ImageError: `artifact_too_large`, `cache_full`, `io_error`."""
        self._pending += data
        if len(self._pending) >= _PIECE:
            await self._flush()

    async def finish(self) -> CachedArtifact:
        """Returns the artifact, verified and in the cache.

        :raises ImageError: `artifact_mismatch`: it has another digest; and as `write`
        """
        await self._flush()
        with disk_errors(ImageError):
            actual = await trio.to_thread.run_sync(self.part.finish)
        if actual != self._digest:
            raise ImageError(
                "artifact_mismatch",
                f"what was sent has another SHA-256 than {self._digest}",
                "correct the manifest, or the file",
            )
        return await self._cache.keep(self.part.path, self._digest)

    async def _flush(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        with disk_errors(ImageError):
            await trio.to_thread.run_sync(self.part.write, data)


def _named(artifact: Artifact) -> str:
    return f"{shown(artifact.url)} (SHA-256 {artifact.sha256})"
