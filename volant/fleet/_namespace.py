"""The keys of one fleet: several fleets, and other programs, can share an etcd cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec

from ._interface import Change, Changes, Compare, Entry, Following, KeyValues, Step, Transaction, Wrapper


class Namespace(Wrapper):
    """The keys of another store with a prefix, which is removed. Each method raises the errors of the store."""

    def __init__(self, etcd: KeyValues, prefix: str) -> None:
        """Creates it. `prefix` ends with a slash."""
        super().__init__(etcd)
        self._prefix = prefix

    async def get(self, key: str) -> Entry | None:
        return self._inner(await self._etcd.get(self._prefix + key))

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        entries, revision = await self._etcd.list(self._prefix + prefix)
        return [self._named(entry) for entry in entries], revision

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        done = await self._etcd.transact(
            [msgspec.structs.replace(each, key=self._prefix + each.key) for each in conditions],
            [msgspec.structs.replace(each, key=self._prefix + each.key) for each in steps],
            [msgspec.structs.replace(each, key=self._prefix + each.key) for each in otherwise],
        )
        return msgspec.structs.replace(done, reads=tuple(map(self._inner, done.reads)))

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Following]:
        async with self._etcd.watch(self._prefix + prefix, after=after) as watch:
            yield _Inner(self, watch)

    def changed(self, change: Change) -> Change:
        """Returns a change of the store, with the key in this namespace."""
        return msgspec.structs.replace(
            change, key=change.key.removeprefix(self._prefix), entry=self._inner(change.entry)
        )

    def _inner(self, entry: Entry | None) -> Entry | None:
        return None if entry is None else self._named(entry)

    def _named(self, entry: Entry) -> Entry:
        return msgspec.structs.replace(entry, key=entry.key.removeprefix(self._prefix))


class _Inner:
    def __init__(self, namespace: Namespace, watch: Following) -> None:
        self._namespace = namespace
        self._watch = watch

    async def receive(self) -> Changes:
        found = await self._watch.receive()
        return Changes([self._namespace.changed(each) for each in found.changes], found.revision)
