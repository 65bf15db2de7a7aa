"""Gets the current image for the daemon, and builds it if there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import trio

from . import _store
from ._child import run_child
from ._errors import ImageError
from ._progress import Progress
from ._store import Image, users


async def ensure(
    cache_dir: Path,
    *,
    deadline_s: float,
    owner: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    arguments: tuple[str, ...] = (),
) -> Image:
    """Returns the current image of the cache; builds it if there is none. Several callers share one build.

    Cancelling kills the build.

    :param deadline_s: how long it may take in all
    :param owner: a daemon's state directory; daemons that share the cache do not remove its image
    :param progress: called with the progress of the build, in the caller's task
    :param arguments: further arguments of `python -m volant.images build`, for instance `--mirror URL`
    :raises ImageError: the image can't be built; `timeout` after `deadline_s`
    """
    found = await trio.to_thread.run_sync(_used, cache_dir, _store.find, owner)
    if found is not None:
        return found
    with trio.move_on_after(deadline_s):
        outcome = await run_child(["build", "--cache", str(cache_dir), *arguments], progress)
        image = outcome.get("image")
        digest = str(image.get("digest")) if isinstance(image, dict) else ""
        found = await trio.to_thread.run_sync(_used, cache_dir, partial(_store.load, digest=digest), owner)
        if found is None:
            raise ImageError(
                "build_failed", "The image was built and can't be read back", "check the cache folder's disk"
            )
        return found
    raise ImageError(
        "timeout",
        f"The image was not built within {deadline_s:g} s",
        "check the network, or build it beforehand with `volar boot-images build`",
    )


def _used(cache_dir: Path, find: Callable[[Path], Image | None], owner: Path | None) -> Image | None:
    found = find(cache_dir)
    if found is not None and owner is not None and not users(cache_dir).is_noted(found.digest, owner):
        # Nobody removes anything from a cache that can't be written to.
        with suppress(OSError):
            users(cache_dir).note(found.digest, owner)
    return found
