"""Keeps a copy of the fleet's keys in memory, so that reads need no request and go on without a quorum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from volant.concurrency import Backoff

from ._interface import Change, Compacted, Entry, EtcdError, KeyValues

_SILENCE_S = 15.0
"""After so long without a change, the watch is begun anew: a connection that the network has forgotten says nothing."""
_FIRST_PAUSE_S = 0.2
_MAX_PAUSE_S = 5.0


class Mirror:
    """All keys of a store, as etcd had them at one revision, which is never older than the last one.

    It says what is, and not what has happened: changes that follow each other may be seen as one.
    """

    def __init__(self, etcd: KeyValues, now: Callable[[], float]) -> None:
        """
        :param now: a clock in seconds that goes on while the host sleeps
        """
        self._etcd = etcd
        self._now = now
        self._sections: dict[str, dict[str, Entry]] = {}
        self._heard_at: float | None = None
        self._changed = trio.Event()
        self.revision = 0
        """Of the copy; 0: nothing has been read yet."""
        self.trouble: str | None = None
        """Why the copy may be old; None: changes arrive as they happen."""

    def section(self, name: str) -> Mapping[str, Entry]:
        """Returns the keys that begin with `name` and a slash, by what follows that. Not to be kept: the next change
        may change it."""
        return self._sections.get(name, {})

    @property
    def age_s(self) -> float | None:
        """For how many seconds nothing is known of etcd; None: nothing has been read yet."""
        return None if self._heard_at is None else self._now() - self._heard_at

    def clear(self) -> None:
        """Forgets everything. Cancel `keep` before."""
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
                # What has changed meanwhile is not kept any more.
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
        """Follows changes until nothing comes for a while."""
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
