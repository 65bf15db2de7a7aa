"""The interface and the errors of etcd, as the fleet needs them. `Etcd` implements it, and so does the simulated etcd
of `tests/simulated`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

import msgspec


class EtcdError(Exception):
    """An error of etcd, with a text for people."""


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
    """The requested revisions have expired, or never existed because etcd was restored from a backup. List again, and
    report that changes were missed."""

    def __init__(self) -> None:
        super().__init__("etcd does not keep the changes since the last one that is known")


class Entry(msgspec.Struct, frozen=True):
    """A key with its value."""

    key: str
    value: bytes
    created: int
    """The revision that created the key."""
    modified: int
    """The revision that wrote the value."""
    lease: int = 0
    """The lease with which it ends; 0 for none."""


class Change(msgspec.Struct, frozen=True):
    """A key that was written or deleted."""

    key: str
    entry: Entry | None
    """None if it was deleted."""
    revision: int


class Compare(msgspec.Struct, frozen=True):
    """A condition on the present state of a key."""

    key: str
    target: Literal["create", "mod", "value"]
    """The revision that created the key, 0 if it does not exist; the revision of its value; or the value."""
    wanted: int | bytes


def absent(key: str) -> Compare:
    """Returns the condition that a key does not exist."""
    return Compare(key, "create", 0)


def unchanged(entry: Entry) -> Compare:
    """Returns the condition that a key was not written, deleted or created again since."""
    return Compare(entry.key, "mod", entry.modified)


def equal(key: str, value: bytes) -> Compare:
    """Returns the condition that a key has a value."""
    return Compare(key, "value", value)


class Step(msgspec.Struct, frozen=True):
    """A step of a transaction for one key."""

    key: str
    kind: Literal["put", "delete", "fetch"]
    value: bytes = b""
    lease: int = 0


def put(key: str, value: bytes, *, lease: int = 0) -> Step:
    """Returns the step that writes a key, which is deleted with `lease`."""
    return Step(key, "put", value, lease)


def delete(key: str) -> Step:
    """Returns the step that deletes a key, if it exists."""
    return Step(key, "delete")


def fetch(key: str) -> Step:
    """Returns the step that reads a key."""
    return Step(key, "fetch")


class Transaction(msgspec.Struct, frozen=True):
    """The result of a transaction."""

    done: bool
    """Whether its conditions held."""
    revision: int
    reads: tuple[Entry | None, ...]
    """The results of its `fetch` steps, in order."""


class Lease(msgspec.Struct, frozen=True):
    """A lease that was granted."""

    id: int
    ttl_s: float


class Changes(msgspec.Struct, frozen=True):
    """The changes of one or more revisions, in order."""

    changes: Sequence[Change]
    revision: int
    """The newest revision."""


class Following(Protocol):
    """The changes after a revision."""

    async def receive(self) -> Changes:
        """Waits for the next changes.

        :raises Compacted: the changes have expired; list again.
        :raises EtcdUnavailable: the connection broke, or the member has lost the quorum; watch again.
        :raises EtcdRefused:
        """


class KeyValues(Protocol):
    """A key-value store that all hosts share. See `Etcd` for the errors of each method."""

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
