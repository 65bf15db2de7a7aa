"""The daemon's door to boot artifacts: each is fetched once, whoever needs it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path

import trio

from volant.host import Reader, is_below, open_as
from volant.model import Artifact

from . import _artifacts
from ._artifacts import CachedArtifact, Part
from ._child import run_child
from ._errors import ImageError
from ._fetch import FULL, local_path, shown
from ._origins import PUBLIC, Origins
from ._packages import Progress

_AT_ONCE = 4
_UPLOADS_AT_ONCE = 4
_OPEN_S = 10.0
"""A file that takes longer to open lies on a file system that does not answer."""
_PIECE = 1024 * 1024
"""Of an upload, so much is written at a time."""


class _Fetch:
    """One fetch under way; who comes later waits for its outcome."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: ImageError | None = None
        self.progress: Progress | None = None


class ArtifactCache:
    """The boot artifacts of a cache folder."""

    def __init__(
        self, cache_dir: Path, owner: Path, *, timeout_s: float, max_mb: int, origins: Origins = PUBLIC
    ) -> None:
        """
        :param owner: the daemon's state directory, by which others that share the cache know of it
        :param timeout_s: how long one may take to arrive
        :param max_mb: how large one may be, in MiB
        :param origins: what may be fetched, whoever asks
        """
        self._origins = origins
        self._uploads = trio.CapacityLimiter(_UPLOADS_AT_ONCE)
        self._opens = trio.CapacityLimiter(_AT_ONCE)
        self._places = trio.CapacityLimiter(_UPLOADS_AT_ONCE)
        self._cache_dir = cache_dir
        self._owner = owner
        self._timeout_s = timeout_s
        self._max_bytes = max_mb * 2**20
        self._under_way: dict[str, _Fetch] = {}
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._going: dict[str, trio.Event] = {}
        """Those that are being removed: whoever wants one waits, and fetches it anew."""

    async def obtain(self, artifact: Artifact) -> CachedArtifact:
        """Returns an artifact, verified and in the cache; fetches it if the cache lacks it. It stays there until this
        daemon removes it.

        Cancelling ends the fetch, unless others wait for it: then one of them begins anew.

        :raises ImageError: it is not to be had, and why; see `fetch`. `timeout` when it has taken too long.
        """
        return await self._obtain(artifact, partial(self._fetch, artifact))

    def may_read(self, path: Path) -> bool:
        """Whether a file of this host may be fetched, whoever asks. Looks at no file."""
        return is_below(self._origins.directories, path)

    async def has(self, artifact: Artifact) -> bool:
        """Whether it is in the cache, and stays there until this daemon removes it."""
        return await self._find(artifact) is not None

    async def take(self, artifact: Artifact, reader: Reader) -> CachedArtifact:
        """Return an artifact that is a file of this host, as `obtain`; read with the rights of `reader`, now.

        :raises ImageError: as `obtain`. `media_missing` says no more than that there is none for this reader.
        """
        path = local_path(artifact.url)
        assert path is not None
        with ExitStack() as opened:
            try:
                with trio.fail_after(_OPEN_S):
                    fd = await trio.to_thread.run_sync(
                        open_as, reader, path, abandon_on_cancel=True, limiter=self._opens
                    )
                opened.callback(os.close, fd)
            except (OSError, trio.TooSlowError):
                # What is said of a file that is another one than the manifest says.
                source: Sequence[int] = ()
            else:
                source = (fd,)
            return await self._obtain(artifact, partial(self._fetch, artifact, source))

    @asynccontextmanager
    async def receiving(self, digest: str) -> AsyncIterator[Upload]:
        """For the length of a block: an artifact that a client sends. Without `Upload.finish` nothing is left of it.

        :raises ImageError: `cache_busy` too many are sent at once; `cache_unwritable`; `timeout` it has taken too long
        """
        try:
            self._uploads.acquire_on_behalf_of_nowait(upload := Upload(self, digest))
        except trio.WouldBlock:
            raise ImageError(
                "cache_busy", f"{_UPLOADS_AT_ONCE} files are uploaded already", "try again when one of them is done"
            ) from None
        try:
            with trio.move_on_after(self._timeout_s) as scope, _artifacts.new_part(self._cache_dir) as path:
                upload.part = Part(path, self._max_bytes)
                try:
                    yield upload
                finally:
                    upload.part.close()
            if scope.cancelled_caught:
                raise ImageError(
                    "timeout", f"the upload took longer than {self._timeout_s:g} s", "raise VOLANT_ARTIFACT_TIMEOUT_S"
                )
        finally:
            self._uploads.release_on_behalf_of(upload)

    async def keep(self, part: Path, digest: str) -> CachedArtifact:
        """Give what was received its place. :raises ImageError: it can't be given."""
        # It waits for who fetches the same one, perhaps from a slow server; whoever gives that up takes the part away.
        await trio.to_thread.run_sync(
            _artifacts.place_received, self._cache_dir, part, digest, abandon_on_cancel=True, limiter=self._places
        )
        found = await self._find(Artifact("", digest))
        if found is None:
            raise ImageError("io_error", "it was written and can't be read back", "check the cache folder's disk")
        return found

    async def _find(self, artifact: Artifact) -> CachedArtifact | None:
        return await trio.to_thread.run_sync(
            _artifacts.use_artifact, self._cache_dir, artifact.sha256, self._owner, abandon_on_cancel=True
        )

    async def _obtain(self, artifact: Artifact, fetch: Callable[[], Awaitable[None]]) -> CachedArtifact:
        with trio.move_on_after(self._timeout_s):
            while True:
                if (going := self._going.get(artifact.sha256)) is not None:
                    await going.wait()
                found = await self._find(artifact)
                if found is not None:
                    return found
                other = self._under_way.get(artifact.sha256)
                if other is None:
                    await fetch()
                    continue
                await other.done.wait()
                if other.error is not None:
                    raise ImageError(other.error.code, other.error.message, other.error.hint)
        raise ImageError(
            "timeout",
            f"{_named(artifact)}: it did not arrive within {self._timeout_s:g} s",
            "raise VOLANT_ARTIFACT_TIMEOUT_S, or fetch it beforehand with `volar images fetch`",
        )

    async def remove(self, digest: str, *, in_use: Callable[[], bool]) -> bool:
        """Remove an artifact unless it is `in_use`, or another daemon uses it; return whether it is gone.

        A VM's row exists before the VM asks for its artifacts. So `in_use` sees a VM that asked before; one that asks
        later waits until the file is gone, and fetches it again.

        :raises ImageError: it can't be removed.
        """
        if digest in self._under_way or digest in self._going or in_use():
            return False
        gone = self._going[digest] = trio.Event()
        try:
            return await trio.to_thread.run_sync(_artifacts.remove_artifact, self._cache_dir, digest, self._owner)
        finally:
            del self._going[digest]
            gone.set()

    def inspect(self) -> dict[str, object]:
        """What is on its way, by digest; ready for JSON."""
        return {
            digest: {"done_bytes": fetch.progress.done, "total_bytes": fetch.progress.total} if fetch.progress else {}
            for digest, fetch in self._under_way.items()
        }

    async def _fetch(self, artifact: Artifact, source: Sequence[int] = ()) -> None:
        under_way = self._under_way[artifact.sha256] = _Fetch()

        def heard(progress: Progress) -> None:
            under_way.progress = progress

        arguments = ["fetch", "--cache", str(self._cache_dir), "--url", artifact.url, "--sha256", artifact.sha256]
        arguments += ["--max-bytes", str(self._max_bytes)]
        for directory in self._origins.directories:
            arguments += ["--allow-directory", str(directory)]
        for network in self._origins.networks:
            arguments += ["--allow-network", str(network)]
        for fd in source:
            arguments += ["--descriptor", str(fd)]
        try:
            async with self._slots:
                await run_child(arguments, heard, source)
        except ImageError as error:
            under_way.error = ImageError(error.code, f"{_named(artifact)}: {error.message}", error.hint)
            raise under_way.error from error
        finally:
            del self._under_way[artifact.sha256]
            under_way.done.set()


class Upload:
    """An artifact that a client sends: write the pieces, then finish."""

    def __init__(self, artifacts: ArtifactCache, digest: str) -> None:
        self._artifacts = artifacts
        self._digest = digest
        self._pending = bytearray()
        self.part: Part

    def expect(self, size: int) -> None:
        """Say how many bytes it will have. :raises ImageError: `media_too_large`"""
        self.part.expect(size)

    async def write(self, data: bytes) -> None:
        """Take the next bytes. :raises ImageError: `media_too_large`, `cache_full`, `io_error`"""
        self._pending += data
        if len(self._pending) >= _PIECE:
            await self._flush()

    async def finish(self) -> CachedArtifact:
        """Return the artifact, verified and in the cache.

        :raises ImageError: `media_mismatch` it has another digest; and as `write`
        """
        await self._flush()
        with _told():
            actual = await trio.to_thread.run_sync(self.part.finish)
        if actual != self._digest:
            raise ImageError(
                "media_mismatch",
                f"what was sent has another SHA-256 than {self._digest}",
                "correct the manifest, or the file",
            )
        return await self._artifacts.keep(self.part.path, self._digest)

    async def _flush(self) -> None:
        data, self._pending = bytes(self._pending), bytearray()
        with _told():
            await trio.to_thread.run_sync(self.part.write, data)


@contextmanager
def _told() -> Iterator[None]:
    """What the disk refuses becomes an ImageError."""
    try:
        yield
    except OSError as error:
        code = "cache_full" if error.errno in FULL else "io_error"
        raise ImageError(code, f"the cache can't be written: {error.strerror or error}", "make room there") from error


def _named(artifact: Artifact) -> str:
    return f"{shown(artifact.url)} (SHA-256 {artifact.sha256})"
