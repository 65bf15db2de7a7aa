"""What the fleet wants from etcd, and what can go wrong with it. `Etcd` implements it, and so does the simulated etcd
of `tests/simulated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec


class EtcdError(Exception):
    """Something is wrong with etcd; the text says what, for people."""


class EtcdUnavailable(EtcdError):
    """No member has answered. The request has changed nothing."""


class OutcomeUnknown(EtcdError):
    """The request was sent and has no answer: it may have changed something, now or soon. Read again before you
    decide."""


class EtcdRefused(EtcdError):
    """etcd has refused the request, which has changed nothing: wrong credentials, no space, a request that is too
    large."""


class LeaseGone(EtcdError):
    """The lease has expired or was revoked, and its keys are deleted."""


class Compacted(EtcdError):
    """The revisions that are asked for are not kept any more, or were never there: etcd was restored from a backup.
    List again, and say that changes were missed."""

    def __init__(self) -> None:
        super().__init__("etcd does not keep the changes since the last one that is known")


class Entry(msgspec.Struct, frozen=True):
    """A key with its value."""

    key: str
    value: bytes
    created: int
    """The revision that made the key."""
    modified: int
    """The revision that wrote the value."""
    lease: int = 0
    """The lease that it ends with; 0: none."""


class Change(msgspec.Struct, frozen=True):
    """A key that was written or deleted."""

    key: str
    entry: Entry | None
    """None: it was deleted."""
    revision: int


class Compare(msgspec.Struct, frozen=True):
    """A condition of a transaction: what the key has now."""

    key: str
    target: Literal["create", "mod", "value"]
    """The revision that made the key, 0 if it is not there; the one that wrote it; or its value."""
    wanted: int | bytes


def absent(key: str) -> Compare:
    """There is no such key."""
    return Compare(key, "create", 0)


def unchanged(entry: Entry) -> Compare:
    """Nobody has written, deleted or made the key anew since."""
    return Compare(entry.key, "mod", entry.modified)


def equal(key: str, value: bytes) -> Compare:
    """The key has this value."""
    return Compare(key, "value", value)


class Step(msgspec.Struct, frozen=True):
    """What a transaction does to a key."""

    key: str
    kind: Literal["put", "delete", "fetch"]
    value: bytes = b""
    lease: int = 0


def put(key: str, value: bytes, *, lease: int = 0) -> Step:
    """Writes a key. `lease`: deletes it when that ends."""
    return Step(key, "put", value, lease)


def delete(key: str) -> Step:
    """Deletes a key, if it is there."""
    return Step(key, "delete")


def fetch(key: str) -> Step:
    """Reads a key."""
    return Step(key, "fetch")


class Transaction(msgspec.Struct, frozen=True):
    """What a transaction has done."""

    done: bool
    """Whether its conditions held."""
    revision: int
    reads: tuple[Entry | None, ...]
    """What its `fetch` steps have found, in their order."""


class Lease(msgspec.Struct, frozen=True):
    """A lease that was granted."""

    id: int
    ttl_s: float


class Changes(msgspec.Struct, frozen=True):
    """What one or more revisions have changed, in their order."""

    changes: Sequence[Change]
    revision: int
    """The newest of them."""


class Following(Protocol):
    """The changes after a revision."""

    async def receive(self) -> Changes:
        """Waits for the next changes.

        :raises Compacted: what it has to report is not kept any more; list again.
        :raises EtcdUnavailable: the connection broke, or the member has lost the quorum; watch again.
        :raises EtcdRefused:
        """


class KeyValues(Protocol):
    """A store of keys and values that all hosts share. See `Etcd` for what each method raises."""

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]: ...

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction: ...

    async def grant(self, ttl_s: int) -> Lease: ...

    async def keep_alive(self, lease: int) -> float: ...

    async def revoke(self, lease: int) -> None: ...

    def watch(self, prefix: str, *, after: int) -> AbstractAsyncContextManager[Following]: ...


class Wrapper(KeyValues):
    """Passes all calls on to another store. Subclasses change some of them."""

    def __init__(self, etcd: KeyValues) -> None:
        self._etcd = etcd

    async def get(self, key: str) -> Entry | None:
        return await self._etcd.get(key)

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        return await self._etcd.list(prefix)

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        return await self._etcd.transact(conditions, steps, otherwise)

    async def grant(self, ttl_s: int) -> Lease:
        return await self._etcd.grant(ttl_s)

    async def keep_alive(self, lease: int) -> float:
        return await self._etcd.keep_alive(lease)

    async def revoke(self, lease: int) -> None:
        await self._etcd.revoke(lease)

    def watch(self, prefix: str, *, after: int) -> AbstractAsyncContextManager[Following]:
        return self._etcd.watch(prefix, after=after)
