"""An etcd in memory, with the promises of the real one and its faults. Times are those of Trio's clock."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import TypeVar

import trio

from actors import fault
from volant.fleet import (
    Change,
    Changes,
    Compacted,
    Compare,
    Entry,
    EtcdRefused,
    EtcdUnavailable,
    KeyValues,
    Lease,
    LeaseGone,
    OutcomeUnknown,
    Step,
    Transaction,
)

T = TypeVar("T")

FAULTS = {
    "etcd.unavailable": 0.05,
    "etcd.answer_lost": 0.05,
    "etcd.done_later": 0.03,
    "etcd.watch_breaks": 0.03,
    "etcd.watch_silent": 0.02,
    "etcd.compacts": 0.02,
    "etcd.lease_lasts": 0.2,
}
"""What can happen, with a chance for each request, each batch of a watch and each lease."""

_MAX_STEPS = 128
_MAX_BYTES = 1_500_000
_NO_LEADER_S = 4.0
"""After so long without a quorum, a member ends its watches."""
_AFTER_ELECTION_S = 10.0
"""A new leader extends all leases by as much as they had."""


class SimulatedEtcd(KeyValues):
    """A cluster. `run` it in a nursery: it ends leases."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._entries: dict[str, Entry] = {}
        self._changes: list[Change] = []
        """All since the last compaction, in their order."""
        self._leases: dict[int, tuple[int, float]] = {}
        """TTL and end of each."""
        self._moved = trio.Event()
        """Set when a watch may have something to see."""
        self._timed = trio.Event()
        """Set when something ends, or is to be done, at another time."""
        self._later: list[tuple[float, Callable[[], object]]] = []
        self.revision = 1
        self.compacted = 0
        """The newest revision that is not kept."""
        self.has_quorum = True

    @property
    def entries(self) -> dict[str, Entry]:
        """What the quorum agrees on."""
        return dict(self._entries)

    async def run(self) -> None:
        """Ends leases, and carries out what comes late."""
        while True:
            due = [end for _, end in self._leases.values()] + [at for at, _ in self._later]
            with trio.move_on_at(min(due, default=math.inf)):
                await self._timed.wait()
            now = trio.current_time()
            for lease, (_, end) in list(self._leases.items()):
                if end <= now and self.has_quorum:
                    self._end(lease)
            late = [work for at, work in self._later if at <= now]
            self._later = [(at, work) for at, work in self._later if at > now]
            for work in late:
                try:
                    work()
                except (EtcdRefused, LeaseGone):
                    pass
            if not self.has_quorum:
                await self._timed.wait()

    def lose_quorum(self) -> None:
        self.has_quorum = False
        self._move()
        self._time()

    def regain_quorum(self) -> None:
        """A new leader extends the leases."""
        self.has_quorum = True
        now = trio.current_time()
        self._leases = {lease: (ttl_s, max(end, now + ttl_s)) for lease, (ttl_s, end) in self._leases.items()}
        self._move()
        self._time()

    def compact(self, revision: int) -> None:
        self.compacted = max(self.compacted, min(revision, self.revision))
        self._changes = [change for change in self._changes if change.revision >= self.compacted]
        self._move()

    def forget(self) -> None:
        """Another cluster takes its place, with no keys."""
        self._entries, self._changes, self._leases = {}, [], {}
        self.revision, self.compacted = 1, 0
        self._move()

    # KeyValues

    async def get(self, key: str) -> Entry | None:
        return await self._ask(lambda: self._entries.get(key))

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        def read() -> tuple[Sequence[Entry], int]:
            return [entry for key, entry in sorted(self._entries.items()) if key.startswith(prefix)], self.revision

        return await self._ask(read)

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if max(len(conditions), len(steps), len(otherwise)) > _MAX_STEPS:
            raise EtcdRefused("etcdserver: too many operations in txn request")
        if sum(len(step.value) for step in (*steps, *otherwise)) > _MAX_BYTES:
            raise EtcdRefused("etcdserver: request is too large")
        for branch in (steps, otherwise):
            puts = [step.key for step in branch if step.kind == "put"]
            deletes = {step.key for step in branch if step.kind == "delete"}
            if len(set(puts)) < len(puts) or deletes.intersection(puts):
                raise EtcdRefused("etcdserver: duplicate key given in txn request")

        def work() -> Transaction:
            done = all(map(self._holds, conditions))
            return self._carry_out(done, steps if done else otherwise)

        return await self._ask(work, changes=True)

    async def grant(self, ttl_s: int) -> Lease:
        def work() -> Lease:
            lease = self._rng.getrandbits(62)
            self._leases[lease] = (ttl_s, self._end_of(ttl_s))
            self._time()
            return Lease(lease, float(ttl_s))

        return await self._ask(work, changes=True)

    async def keep_alive(self, lease: int) -> float:
        def work() -> float:
            found = self._leases.get(lease)
            if found is None:
                raise LeaseGone(f"the lease {lease:x} has ended")
            end = self._end_of(found[0])
            self._leases[lease] = (found[0], end)
            if end < found[1]:
                self._time()
            return float(found[0])

        return await self._ask(work, changes=True)

    async def revoke(self, lease: int) -> None:
        await self._ask(lambda: self._end(lease), changes=True)

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[_Following]:
        await self._pause()
        if not self.has_quorum or fault("etcd.unavailable"):
            raise EtcdUnavailable("simulated: no member begins a watch")
        if after < self.compacted - 1 or after > self.revision:
            raise Compacted
        yield _Following(self, prefix, after)

    # What requests do

    async def _ask(self, work: Callable[[], T], *, changes: bool = False) -> T:
        await self._pause()
        if not self.has_quorum or fault("etcd.unavailable"):
            raise EtcdUnavailable("simulated: no member has answered")
        if changes and fault("etcd.done_later"):
            self._later.append((trio.current_time() + self._rng.uniform(0, 10), work))
            self._time()
            raise OutcomeUnknown("simulated: the request is still on its way")
        if fault("etcd.compacts"):
            self.compact(self.revision)
        answer = work()
        await self._pause()
        if fault("etcd.answer_lost"):
            error = OutcomeUnknown if changes else EtcdUnavailable
            raise error("simulated: the connection broke")
        return answer

    async def _pause(self) -> None:
        await trio.sleep(self._rng.uniform(0.0005, 0.005))

    def _holds(self, compare: Compare) -> bool:
        entry = self._entries.get(compare.key)
        match compare.target:
            case "create":
                return (entry.created if entry else 0) == compare.wanted
            case "mod":
                return (entry.modified if entry else 0) == compare.wanted
            case _:
                return entry is not None and entry.value == compare.wanted

    def _carry_out(self, done: bool, steps: Sequence[Step]) -> Transaction:
        written = [step.key for step in steps if step.kind != "fetch"]
        if len(set(written)) < len(written):
            raise EtcdRefused("etcdserver: duplicate key given in txn request")
        if any(step.lease and step.lease not in self._leases for step in steps):
            raise LeaseGone("etcdserver: requested lease not found")
        revision = self.revision + 1
        reads: list[Entry | None] = []
        changes: list[Change] = []
        for step in steps:
            before = self._entries.get(step.key)
            if step.kind == "fetch":
                reads.append(before)
            elif step.kind == "put":
                created = before.created if before else revision
                entry = Entry(step.key, step.value, created, revision, step.lease)
                self._entries[step.key] = entry
                changes.append(Change(step.key, entry, revision))
            elif before is not None:
                del self._entries[step.key]
                changes.append(Change(step.key, None, revision))
        self._record(changes)
        return Transaction(done, self.revision, tuple(reads))

    def _record(self, changes: Sequence[Change]) -> None:
        if changes:
            self.revision += 1
            self._changes += changes
            self._move()

    def _end_of(self, ttl_s: int) -> float:
        extra_s = _AFTER_ELECTION_S if fault("etcd.lease_lasts") else 0.0
        return trio.current_time() + ttl_s + extra_s

    def _end(self, lease: int) -> None:
        if self._leases.pop(lease, None) is None:
            return
        gone = [key for key, entry in self._entries.items() if entry.lease == lease]
        for key in gone:
            del self._entries[key]
        self._record([Change(key, None, self.revision + 1) for key in gone])

    def _move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    def _time(self) -> None:
        self._timed.set()
        self._timed = trio.Event()


class _Following:
    """A watch of the simulated etcd."""

    def __init__(self, etcd: SimulatedEtcd, prefix: str, after: int) -> None:
        self._etcd = etcd
        self._prefix = prefix
        self._after = after

    async def receive(self) -> Changes:
        etcd = self._etcd
        while True:
            moved = etcd._moved
            if not etcd.has_quorum:
                await trio.sleep(_NO_LEADER_S)
                raise EtcdUnavailable("simulated: etcdserver: no leader")
            if self._after < etcd.compacted - 1:
                # Only if it is slow: what was kept until now would have been sent.
                raise Compacted
            found = [
                change
                for change in etcd._changes
                if change.revision > self._after and change.key.startswith(self._prefix)
            ]
            if found:
                if fault("etcd.watch_breaks"):
                    raise EtcdUnavailable("simulated: the watch broke")
                if fault("etcd.watch_silent"):
                    await trio.sleep_forever()
                self._after = etcd.revision
                await etcd._pause()
                return Changes(found, max(change.revision for change in found))
            self._after = max(self._after, etcd.revision)
            await moved.wait()
