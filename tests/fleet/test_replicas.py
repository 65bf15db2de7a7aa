"""A VM whose host is gone goes on from its newest replica, and never on two hosts, whatever dies in the middle:
simulated hosts with a real etcd's faults. And the tests notice if a condition is left out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.fleet.test_fence import NAME, SLACK_S, TTL_S, SimHost, Steps, found, runs as fence_runs, started
from tests.fleet.test_moves import MovingHost
from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import (
    Claim,
    Claims,
    Compare,
    EtcdError,
    Fence,
    OutcomeUnknown,
    ReplicaRecord,
    Replicas,
    Step,
    Transaction,
    claim_of,
    delete,
    put,
    replica_of,
)
from volant.fleet._interface import Wrapper
from volant.model import Failover

RUNS = 8
"""By hand, with `RUNS=5000` in the environment, more."""
AT = datetime(2026, 1, 1, tzinfo=UTC)


class Copy(msgspec.Struct, frozen=True):
    """A replica that a host has on its disk."""

    vm: str
    name: str
    arrival: str
    number: int
    """The later it was taken, the higher."""


class ReplicatingHost(MovingHost):
    """A host whose VMs are restored from replicas, and also move."""

    failover: Failover = "restore"
    moves_within_s = 150.0
    numbers = itertools.count(1)
    """Of all hosts together."""
    restored = 0

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.copies: dict[str, Copy] = {}
        """By the names of their snapshots."""
        self._from: dict[str, str] = {}
        """The snapshots that VMs have gone on from, by their ids."""
        # One for all: the least number that a VM may go on from.
        self._least: dict[str, int] = self._recorder.__dict__.setdefault("least", {})
        self._changed_at: dict[str, float] = self._recorder.__dict__.setdefault("changed_at", {})

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        return snapshot in self.copies and await super().has_room(name, spec, snapshot)

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        assert claim.snapshot, f"{claim.vm} boots from its image"
        if claim.snapshot.startswith("moved-"):
            await super().start(name, claim, spec)
            self._least[claim.vm] = next(self.numbers)
            return
        copy = self.copies.get(claim.snapshot)
        assert copy is not None, f"{claim.vm} is lost: {self.name} has no {claim.snapshot}"
        assert copy.vm == claim.vm
        assert copy.number >= self._least.get(claim.vm, 0), f"{claim.vm} goes on from an old replica"
        await SimHost.start(self, name, claim, spec)
        self._from[claim.vm] = claim.snapshot
        ReplicatingHost.restored += 1

    async def _create(self, claims: Claims, fence: Fence) -> None:
        replicas = Replicas(self.way, self.name, claims)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super()._create, claims, fence)
            nursery.start_soon(self._replicate, replicas, fence)
            nursery.start_soon(self._remove_copies, replicas)

    async def _replicate(self, replicas: Replicas, fence: Fence) -> None:
        while True:
            await trio.sleep(self._rng.uniform(0.5, 5))
            due = [
                (name, claim)
                for name, claim in self._claims.items()
                if claim.vm in self._booted and name not in self._in_hand and claim.failover != "never"
            ]
            if not due or not fence.is_open:
                continue
            lacking = [each for each in due if f"replicas/vms/{each[0]}" not in self.etcd.entries]
            name, claim = self._rng.choice(lacking or due)
            number = next(self.numbers)
            copies: dict[str, tuple[str, str]] = {}
            for other in self._rng.sample(list(self.others.values()), self._rng.randint(1, 2)):
                assert isinstance(other, ReplicatingHost)
                arrival = f"{number}-{other.name}"
                await trio.sleep(self._rng.uniform(0, 3))
                with suppress(EtcdError):
                    if other._alive is not None and not self._fails(0.1):
                        other.copies[f"replica-{arrival}"] = Copy(claim.vm, name, arrival, number)
                        await other._alive.note_arrival(arrival)
                        copies[other.name] = (arrival, f"replica-{arrival}")
            await trio.sleep(self._rng.uniform(0, 2))
            with suppress(EtcdError):
                if copies and await replicas.commit(name, claim, AT, copies):
                    self._least[claim.vm] = max(number, self._least.get(claim.vm, 0))
                    self._changed_at[claim.vm] = trio.current_time()

    async def _remove_copies(self, replicas: Replicas) -> None:
        """As `SentSnapshots`."""
        while True:
            await trio.sleep(self._rng.uniform(1, 8))
            for snapshot, copy in list(self.copies.items()):
                if self._fails(0.3):
                    continue
                held = self._claims.get(copy.name)
                if held is not None and self._from.get(held.vm) == snapshot:
                    is_needed = held.vm not in self._booted
                else:
                    try:
                        is_needed = await replicas.is_needed(copy.name, copy.arrival, snapshot)
                    except EtcdError:
                        continue
                if not is_needed:
                    self.copies.pop(snapshot, None)

    def check(self, there: Mapping[str, Claim]) -> None:
        for key, entry in self.etcd.entries.items():
            record = replica_of(entry) if key.startswith("replicas/") else None
            owner = None if record is None or record.vm not in there else there[record.vm].owner
            if record is None or self.name not in record.copies or owner in (None, self.name):
                continue
            snapshot = record.copies[self.name]
            # One that the VM has gone on from here is not kept, though it is the newest until the VM is copied again.
            was_used = self._from.get(record.vm) == snapshot
            assert was_used or snapshot in self.copies, f"{self.name} has lost {key}"

    def check_end(self, there: Mapping[str, Claim]) -> None:
        for snapshot, copy in self.copies.items():
            record = replica_of(self.etcd.entries.get(f"replicas/vms/{copy.name}"))
            is_newest = record is not None and record.copies.get(self.name) == snapshot
            # One that is about to be the newest, or was until just now.
            is_new = copy.number >= self._least.get(copy.vm, 0)
            was_newest = trio.current_time() - self._changed_at.get(copy.vm, 0.0) < 10
            assert is_newest or (copy.vm in there and (is_new or was_newest)), f"{self.name} keeps {snapshot}"
        for name, claim in self._claims.items():
            if claim.failover == "restore":
                record = replica_of(self.etcd.entries.get(f"replicas/vms/{name}"))
                assert record is not None, f"{name} has no replica"
                assert (record.vm, record.epoch) == (claim.vm, claim.epoch)


@pytest.mark.simulation
def test_a_vm_is_restored_from_its_newest_replica_and_runs_on_one_host() -> None:
    """And moves, and etcd loses all it has, and hosts are frozen or deleted, as in the tests of the fence."""
    ReplicatingHost.restored = 0
    count = int(os.environ.get("RUNS", RUNS))
    assert fence_runs(count, of=ReplicatingHost) > 0
    assert ReplicatingHost.restored > 2 * count


@pytest.mark.simulation
@pytest.mark.parametrize("left_out", ["refusing", "claim"])
def test_without_a_condition_one_goes_on_from_what_is_gone_or_old(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse_arrival(self: Claims, move: str) -> None:
        del self, move

    async def commit(
        self: Replicas, name: str, mine: Claim, at: datetime, copies: Mapping[str, tuple[str, str]]
    ) -> bool:
        claim = await self._claims.get(name)
        if claim is None or claim.vm != mine.vm:
            return False
        record = ReplicaRecord(mine.vm, claim.epoch, at, {host: snapshot for host, (_, snapshot) in copies.items()})
        return (await self._etcd.transact([], [put(f"replicas/vms/{name}", msgspec.json.encode(record))])).done

    if left_out == "refusing":
        monkeypatch.setattr(Claims, "refuse_arrival", refuse_arrival)
    else:
        monkeypatch.setattr(Replicas, "commit", commit)
    wrong = found(of=ReplicatingHost)
    assert "has no replica-" in wrong or "has lost" in wrong or "goes on from an old replica" in wrong, wrong


async def copied(etcd: SimulatedEtcd, mine: Claim, number: int, *hosts: str, at: datetime = AT) -> bool:
    """Makes a replica of a VM, which these hosts have."""
    copies = {host: (f"{number}-{host}", f"replica-{number}-{host}") for host in hosts}
    for host, (arrival, _) in copies.items():
        await Claims(etcd, host).note_arrival(arrival)
    return await Replicas(etcd, mine.owner, Claims(etcd, mine.owner)).commit(NAME, mine, at, copies)


def newest(etcd: SimulatedEtcd) -> ReplicaRecord | None:
    return replica_of(etcd.entries.get(f"replicas/vms/{NAME}"))


@pytest.mark.parametrize(
    ("of", "is_taken"),
    [
        ({"h1": "replica-1-h1"}, True),
        # Another host has it, or there is none, or it is of another owner, or of another VM.
        ({"h3": "replica-1-h3"}, False),
        (None, False),
        ({"epoch": 2}, False),
        ({"vm": "2"}, False),
    ],
)
def test_only_a_host_with_the_newest_replica_continues_a_vm(of: Mapping[str, Any] | None, is_taken: bool) -> None:
    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        dead = await Claims(etcd, "h2").create(NAME, "1", "restore", b"spec")
        if of is not None:
            copies = {host: name for host, name in of.items() if host.startswith("h")} or {"h1": "replica-1-h1"}
            record = ReplicaRecord(of.get("vm", "1"), of.get("epoch", 1), AT, copies)
            await etcd.transact([], [put(f"replicas/vms/{NAME}", msgspec.json.encode(record))])
        async with started(etcd, steps, "h1") as fence:
            await fence.opened()
            await trio.sleep(TTL_S + SLACK_S + 10)
            assert ("started" in steps.done) is is_taken
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            if not is_taken:
                assert claim == dead
                return
            assert (claim.owner, claim.epoch, claim.before, claim.taking) == ("h1", 2, "h2", False)
            assert newest(etcd) == msgspec.structs.replace(record, epoch=2)

    simulate(main, seed=0, faults={})


def test_a_host_that_can_not_continue_a_vm_lets_another_one_do_it_that_has_the_same_replica() -> None:
    async def main(sim: Simulation) -> None:
        etcd, unable, able = SimulatedEtcd(sim.rng), Steps(), Steps()
        unable.refuses, able.is_full = True, True
        mine = await Claims(etcd, "h3").create(NAME, "1", "restore", b"spec")
        assert await copied(etcd, mine, 1, "h1", "h2")
        async with started(etcd, unable, "h1"), started(etcd, able, "h2"):
            await trio.sleep(TTL_S + SLACK_S + 10)
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.taking, claim.snapshot) == ("h1", True, "replica-1-h1")
            able.is_full = False
            await trio.sleep(30)
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.before, claim.taking, claim.snapshot) == ("h2", "h3", False, "")
            assert able.done.count("started") == 1

    simulate(main, seed=0, faults={})


def test_a_replica_counts_only_while_its_owner_has_the_vm() -> None:
    async def main(sim: Simulation) -> None:
        etcd = SimulatedEtcd(sim.rng)
        mine = await Claims(etcd, "h1").create(NAME, "1", "restore", b"spec")
        assert await copied(etcd, mine, 1, "h2", "h3")
        assert not [key for key in etcd.entries if key.startswith("arrivals/")]
        # A host has given its copy up.
        await Claims(etcd, "h2").note_arrival("2-h2")
        await Claims(etcd, "h2").refuse_arrival("2-h2")
        assert not await copied(etcd, mine, 2, "h2")
        first = newest(etcd)
        assert first is not None
        assert first.copies == {"h2": "replica-1-h2", "h3": "replica-1-h3"}
        replicas = Replicas(etcd, "h2", Claims(etcd, "h2"))
        assert await replicas.is_needed(NAME, "1-h2", "replica-1-h2")
        assert await copied(etcd, mine, 3, "h3")
        assert not await replicas.is_needed(NAME, "1-h2", "replica-1-h2")

        # The host that takes it over has its copy until it runs; what the owner before has made since, is refused.
        taken = await Claims(etcd, "h3").take_over(NAME, mine)
        assert taken is not None
        assert (taken.snapshot, taken.epoch) == ("replica-3-h3", 2)
        assert await Replicas(etcd, "h3", Claims(etcd, "h3")).is_needed(NAME, "3-h3", "replica-3-h3")
        assert not await copied(etcd, mine, 4, "h2")
        assert not await copied(etcd, taken, 5, "h2"), "it has not been started yet"
        await Claims(etcd, "h3").settle(NAME, taken)
        assert await copied(etcd, taken, 6, "h2")
        # Where it moves to, it goes on from something newer.
        await Claims(etcd, "h1").note_arrival("m")
        await etcd.transact([], [put("alive/h1", b"")])
        assert await Claims(etcd, "h3").hand_over(NAME, taken, "m", "h1", "moved-m")
        assert newest(etcd) is None
        assert not await replicas.is_needed(NAME, "6-h2", "replica-6-h2")
        moved = await Claims(etcd, "h1").get(NAME)
        assert moved is not None
        await etcd.transact([], [delete("alive/h1")])
        assert await Claims(etcd, "h2").take_over(NAME, moved) is None
        # And nothing is left of a VM that was deleted.
        await Claims(etcd, "h1").settle(NAME, moved)
        settled = await Claims(etcd, "h1").get(NAME)
        assert settled is not None
        assert await copied(etcd, settled, 7, "h2")
        await Claims(etcd, "h1").free(NAME)
        assert not [key for key in etcd.entries if key.startswith(("vms/", "specs/", "replicas/"))]

    simulate(main, seed=0, faults={})


class LateCommit(Wrapper):
    """A way to etcd on which the first change of a replica arrives late, and is not answered."""

    def __init__(self, etcd: SimulatedEtcd, nursery: trio.Nursery) -> None:
        super().__init__(etcd)
        self._nursery = nursery
        self._is_first = True

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if not self._is_first or not any(step.key.startswith("replicas/") for step in steps):
            return await super().transact(conditions, steps, otherwise)
        self._is_first = False

        async def later() -> None:
            await trio.sleep(5)
            await self._etcd.transact(conditions, steps, otherwise)

        self._nursery.start_soon(later)
        raise OutcomeUnknown("simulated: the connection broke")


def test_what_comes_late_replaces_no_newer_replica() -> None:
    async def main(sim: Simulation) -> None:
        etcd = SimulatedEtcd(sim.rng)
        mine = await Claims(etcd, "h1").create(NAME, "1", "restore", b"spec")
        async with trio.open_nursery() as nursery:
            replicas = Replicas(LateCommit(etcd, nursery), "h1", Claims(etcd, "h1"))
            await Claims(etcd, "h2").note_arrival("1-h2")
            with trio.move_on_after(0.1):
                await replicas.commit(NAME, mine, AT, {"h2": ("1-h2", "replica-1-h2")})
            # The daemon was killed meanwhile, and the next one makes another.
            assert await copied(etcd, mine, 2, "h2")
            await trio.sleep(10)
            kept = newest(etcd)
            assert kept is not None
            assert kept.copies == {"h2": "replica-2-h2"}

    simulate(main, seed=0, faults={})
