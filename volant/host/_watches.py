"""The facet that waits for changes of files, with one inotify instance, as a user may have only 128 of them.

No background task reads the instance, as a `Host` has no nursery: one of the waiters reads for all, and hands over when
it leaves. The instance stays open after its first use, as closing one blocks the event loop for 8 ms.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import inotify_simple
import trio


class FileWatch(Protocol):
    """A watch on one file or directory, for one task."""

    async def wait(self) -> None:
        """Waits until the file has changed since the last `wait()` returned, or since the watch began.

        Read to the end of the file, then wait, and repeat: no write in between is missed.
        """


class Watches(Protocol):
    def open(self, path: Path) -> AbstractContextManager[FileWatch]:
        """Watches an existing file for writes, or a directory for new names. Raises OSError."""


class _Watch:
    __slots__ = ("_watches", "changed", "wake")

    def __init__(self, watches: LinuxWatches) -> None:
        self._watches = watches
        self.changed = False
        self.wake: trio.Event | None = None

    async def wait(self) -> None:
        await self._watches.wait(self)


class LinuxWatches(Watches):
    def __init__(self) -> None:
        self._inotify: Any = None
        self._by_wd: dict[int, list[_Watch]] = {}
        self._waiting: dict[_Watch, None] = {}
        self._reader: _Watch | None = None

    @contextmanager
    def open(self, path: Path) -> Iterator[FileWatch]:
        if self._inotify is None:
            self._inotify = inotify_simple.INotify(nonblocking=True)
            weakref.finalize(self, self._inotify.close)
        wd = self._inotify.add_watch(path, inotify_simple.flags.MODIFY | inotify_simple.flags.CREATE)
        watch = _Watch(self)
        self._by_wd.setdefault(wd, []).append(watch)
        try:
            yield watch
        finally:
            watches = self._by_wd[wd]
            watches.remove(watch)
            if not watches:
                del self._by_wd[wd]
                try:
                    self._inotify.rm_watch(wd)
                except OSError:
                    pass  # the file is gone, and its watch with it

    async def wait(self, watch: _Watch) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not watch.changed:
            wake = watch.wake = trio.Event()
            self._waiting[watch] = None
            try:
                if self._reader is None:
                    self._reader = watch
                    await trio.lowlevel.wait_readable(self._inotify.fileno())
                    self._dispatch()
                else:
                    await wake.wait()
            finally:
                del self._waiting[watch]
                if self._reader is watch:
                    self._reader = None
                if self._reader is None:
                    # Also when this one never read: it may have been woken to do so, and leaves instead.
                    self._wake_next_reader()
        watch.changed = False
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _dispatch(self) -> None:
        for event in self._inotify.read(timeout=0):
            if event.mask & inotify_simple.flags.Q_OVERFLOW:
                touched = [watch for watches in self._by_wd.values() for watch in watches]
            else:
                touched = self._by_wd.get(event.wd, [])
            for watch in touched:
                watch.changed = True
                if watch.wake is not None:
                    watch.wake.set()

    def _wake_next_reader(self) -> None:
        for watch in self._waiting:
            if watch.wake is not None and not watch.wake.is_set():
                watch.wake.set()
                return
