"""Keeps a copy of the fleet's keys in memory, so that reads need no request and work without a quorum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from volant.concurrency import Backoff

from ._interface import Change, Compacted, Entry, EtcdError, KeyValues

_SILENCE_S = 15.0
"""The watch is restarted after this time without a change, as a dropped connection is silent."""
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0


class Mirror:
    """All keys of a store at one revision, which never goes back.

    It shows states, not events: several changes may appear as one.
    """

    def __init__(self, etcd: KeyValues, now: Callable[[], float]) -> None:
        """
        :param now: a clock in seconds that continues while the host sleeps
        """
        self._etcd = etcd
        self._now = now
        self._sections: dict[str, dict[str, Entry]] = {}
        self._heard_at: float | None = None
        self._changed = trio.Event()
        self.revision = 0
        """The revision of the copy; 0 if nothing has been read yet."""
        self.trouble: str | None = None
        """Why the copy may be old; None if changes arrive as they happen."""

    def section(self, name: str) -> Mapping[str, Entry]:
        """Returns the keys below `name` and a slash, by the rest of the key. Don't store the result: the next change
        may modify it."""
        return self._sections.get(name, {})

    @property
    def age_s(self) -> float | None:
        """The seconds since the last news from etcd; None if nothing has been read yet."""
        return None if self._heard_at is None else self._now() - self._heard_at

    def clear(self) -> None:
        """Removes everything. Cancel `keep` first."""
        self._sections = {}
        self.revision = 0
        self._notify()

    async def changed(self) -> None:
        """Waits until something has changed, or until `trouble` has."""
        await self._changed.wait()

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the copy until cancelled. Starts at once, also without etcd."""
        backoff = Backoff(_FIRST_PAUSE_S, _MAX_PAUSE_S, steady_s=_SILENCE_S)
        task_status.started()
        while True:
            try:
                if not self.revision:
                    await self._list()
                await self._watch()
            except Compacted:
                # Etcd no longer has the changes in between.
                self.revision = 0
                await backoff.pause()
            except EtcdError as error:
                self.trouble = str(error)
                self._notify()
                await backoff.pause()

    async def _list(self) -> None:
        entries, revision = await self._etcd.list("")
        self._sections = {}
        for entry in entries:
            self._apply(Change(entry.key, entry, entry.modified))
        self.revision = revision
        self._hear()

    async def _watch(self) -> None:
        """Follows changes until none arrives for some time."""
        async with self._etcd.watch("", after=self.revision) as watch:
            self._hear()
            while True:
                with trio.move_on_after(_SILENCE_S) as silence:
                    found = await watch.receive()
                if silence.cancelled_caught:
                    return
                for change in found.changes:
                    self._apply(change)
                self.revision = max(self.revision, found.revision)
                self._hear()

    def _apply(self, change: Change) -> None:
        name, _, rest = change.key.partition("/")
        section = self._sections.setdefault(name, {})
        if change.entry is None:
            section.pop(rest, None)
        else:
            section[rest] = change.entry

    def _hear(self) -> None:
        self._heard_at = self._now()
        self.trouble = None
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
