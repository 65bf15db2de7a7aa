"""The daemon's door to boot media: each is fetched once, whoever needs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import trio

from volant.model import Artifact

from . import _media
from ._child import run_child
from ._errors import ImageError
from ._fetch import shown
from ._media import Medium
from ._packages import Progress

_AT_ONCE = 4


class _Fetch:
    """One fetch under way; who comes later waits for its outcome."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: ImageError | None = None
        self.progress: Progress | None = None


class BootMedia:
    """The boot media of a cache folder."""

    def __init__(self, cache_dir: Path, owner: Path, *, timeout_s: float, max_mb: int) -> None:
        """
        :param owner: the daemon's state directory, by which others that share the cache know of it
        :param timeout_s: how long one may take to arrive
        :param max_mb: how large one may be, in MiB
        """
        self._cache_dir = cache_dir
        self._owner = owner
        self._timeout_s = timeout_s
        self._max_bytes = max_mb * 2**20
        self._under_way: dict[str, _Fetch] = {}
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self._going: dict[str, trio.Event] = {}
        """Those that are being removed: whoever wants one waits, and fetches it anew."""

    async def obtain(self, artifact: Artifact) -> Medium:
        """Return a medium, verified and in the cache; fetched first where the cache lacks it. It stays there until this
        daemon removes it.

        Cancelling ends the fetch, unless others wait for it: then one of them begins anew.

        :raises ImageError: it is not to be had, and why; see `fetch`. `timeout` when it has taken too long.
        """
        with trio.move_on_after(self._timeout_s):
            while True:
                if (going := self._going.get(artifact.sha256)) is not None:
                    await going.wait()
                found = await trio.to_thread.run_sync(
                    _media.use_medium, self._cache_dir, artifact.sha256, self._owner, abandon_on_cancel=True
                )
                if found is not None:
                    return found
                other = self._under_way.get(artifact.sha256)
                if other is None:
                    await self._fetch(artifact)
                    continue
                await other.done.wait()
                if other.error is not None:
                    raise ImageError(other.error.code, other.error.message, other.error.hint)
        raise ImageError(
            "timeout",
            f"{_named(artifact)}: it did not arrive within {self._timeout_s:g} s",
            "raise VOLANT_MEDIA_TIMEOUT_S, or fetch it beforehand with `volar images fetch`",
        )

    async def remove(self, digest: str, *, in_use: Callable[[], bool]) -> bool:
        """Remove a medium unless it is `in_use`, or another daemon uses it; return whether it is gone.

        A VM's row is there before it asks for its media. So one that asks before this is seen by `in_use`, and one that
        asks later waits until the file is gone, and finds that it has to be fetched.

        :raises ImageError: it can't be removed.
        """
        if digest in self._under_way or digest in self._going or in_use():
            return False
        gone = self._going[digest] = trio.Event()
        try:
            return await trio.to_thread.run_sync(_media.remove_medium, self._cache_dir, digest, self._owner)
        finally:
            del self._going[digest]
            gone.set()

    def inspect(self) -> dict[str, object]:
        """What is on its way, by digest; ready for JSON."""
        return {
            digest: {"done_bytes": fetch.progress.done, "total_bytes": fetch.progress.total} if fetch.progress else {}
            for digest, fetch in self._under_way.items()
        }

    async def _fetch(self, artifact: Artifact) -> None:
        under_way = self._under_way[artifact.sha256] = _Fetch()

        def heard(progress: Progress) -> None:
            under_way.progress = progress

        arguments = ["fetch", "--cache", str(self._cache_dir), "--url", artifact.url, "--sha256", artifact.sha256]
        arguments += ["--max-bytes", str(self._max_bytes)]
        try:
            async with self._slots:
                await run_child(arguments, heard)
        except ImageError as error:
            under_way.error = ImageError(error.code, f"{_named(artifact)}: {error.message}", error.hint)
            raise under_way.error from error
        finally:
            del self._under_way[artifact.sha256]
            under_way.done.set()


def _named(artifact: Artifact) -> str:
    return f"{shown(artifact.url)} (SHA-256 {artifact.sha256})"
