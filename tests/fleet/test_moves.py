"""A VM that moves from host to host runs on one of them at most, and is never lost, whatever dies in the middle:
simulated hosts with a real etcd's faults. And the recorder notices if a condition is left out."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.fleet.test_fence import SLACK_S, TTL_S, Recorder, SimHost, Way, claims_of, runs as fence_runs, settled
from tests.simulated.etcd import FAULTS, SimulatedEtcd
from volant.fleet import (
    Claim,
    Claims,
    Compare,
    Departures,
    EtcdError,
    Fence,
    Mirror,
    NameTaken,
    OutcomeUnknown,
    SignOfLife,
    Step,
    Successor,
    Transaction,
    claim_of,
    put,
)
from volant.fleet._interface import Wrapper
from volant.model import Desired, Leaving, Problem

RUNS, FENCE_RUNS = 85, 15
"""By hand, with `RUNS=5000` in the environment, more."""
HOSTS = ("h1", "h2", "h3")
VMS = 5
WORK_S, CALM_S, HOLDS_S = 400.0, 300.0, 60.0


class Row(msgspec.Struct):
    """A VM of a host, as its journal has it."""

    vm: str
    epoch: int = 1
    leaving: Leaving | None = None
    arrived: str = ""
    runs: bool = True


class Bed:
    """What all hosts share."""

    def __init__(self, sim: Simulation) -> None:
        self.rng: Random = sim.rng
        self.etcd = SimulatedEtcd(sim.rng)
        self.recorder = Recorder()
        self.hosts: dict[str, Host] = {}
        self.alive: set[str] = set()
        """The VMs that were made and not deleted."""
        self.is_calm = False
        self.moves = 0
        self.moves_at_rest = 0


class Host:
    """A host whose daemon dies and starts again. What it has on its disk, and running VMs, outlive that."""

    obstacle: str | None = None
    undecided: Collection[str] = ()
    held: Mapping[str, Claim] = {}

    def __init__(self, name: str, bed: Bed) -> None:
        self.name = name
        self._bed = bed
        self._rng = bed.rng
        self._way = Way(bed.etcd)
        self.rows: dict[str, Row] = {}
        self.snapshots: dict[str, tuple[str, bool]] = {}
        """The VMs of those that have arrived whole and whether they ran, by their moves."""
        self.claims: Claims | None = None
        """None: the daemon is dead."""
        self._in_hand: set[str] = set()

    # Vms: none that may be started elsewhere without a move

    def spec(self, name: str) -> bytes:
        return b""

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        raise AssertionError("no VM is taken over")

    async def pause_all(self) -> None:
        pass

    async def resume_all(self) -> bool:
        return True

    async def release(self) -> None:
        raise AssertionError("no host leaves")

    async def discard(self, name: str, claim: Claim) -> None:
        raise AssertionError("none is held")

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        move = claim.snapshot.removeprefix("moved-")
        row = self.rows.get(name)
        if row is not None and row.arrived == move:
            return
        if row is not None or self._fails(0.2):
            raise Problem(503, "vm-exists", "simulated: what was there before is being removed")
        vm, ran = self.snapshots.get(move, ("", False))
        assert vm == claim.vm, f"{claim.vm} is lost: {self.name} has no snapshot of it"
        await self._sleep(2)
        self.rows[name] = Row(claim.vm, claim.epoch, arrived=move, runs=ran)
        self._bed.moves += 1
        if ran:
            self._bed.recorder.runs(claim.vm, self.name)
        else:
            self._bed.moves_at_rest += 1

    def _fails(self, chance: float) -> bool:
        return not self._bed.is_calm and self._rng.random() < chance

    async def _sleep(self, most_s: float) -> None:
        await trio.sleep(self._rng.uniform(0, most_s * 20 if self._fails(0.1) else most_s))

    # The daemon

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._breaks)
            while True:
                with trio.move_on_after(self._rng.uniform(5, 100) if not self._bed.is_calm else math.inf):
                    await self._daemon()
                self.claims = None
                self._in_hand.clear()
                await trio.sleep(self._rng.uniform(0.1, 30) if not self._bed.is_calm else 0)

    async def _breaks(self) -> None:
        while not self._bed.is_calm:
            await trio.sleep(self._rng.uniform(10, 100))
            self._way.cut = not self._bed.is_calm
            await trio.sleep(self._rng.uniform(1, 30))
            self._way.cut = False

    async def _daemon(self) -> None:
        now = trio.current_time
        claims = self.claims = Claims(self._way, self.name)
        departures = Departures(claims, self.name, ttl_s=TTL_S, now=now)
        sign = SignOfLife(self._way, f"alive/{self.name}", b"", ttl_s=TTL_S, now=now)
        fence = Fence(claims, sign, self, ttl_s=TTL_S, now=now)
        mirror = Mirror(self._way, now)
        successor = Successor(claims, fence, self, host=self.name, mirror=mirror, slack_s=SLACK_S, now=now)
        async with trio.open_nursery() as nursery:
            for task in (sign.keep, fence.keep, mirror.keep, successor.keep):
                nursery.start_soon(task)
            nursery.start_soon(self._create, claims)
            nursery.start_soon(self._delete, claims)
            nursery.start_soon(self._start_and_stop)
            nursery.start_soon(self._evacuate, claims, departures)
            nursery.start_soon(self._tidy, claims, mirror)

    async def _create(self, claims: Claims) -> None:
        while True:
            await trio.sleep(self._rng.uniform(1, 30))
            name = f"default/vm{self._rng.randrange(VMS)}"
            if self._bed.is_calm or name in self.rows or name in self._in_hand:
                continue
            self._in_hand.add(name)
            try:
                vm = f"{self.name}-{self._rng.random()}"
                await claims.create(name, vm, is_there=lambda: name in self.rows)  # noqa: B023
                await self._sleep(1)
                self.rows[name] = Row(vm)
                self._bed.alive.add(vm)
                self._bed.recorder.runs(vm, self.name)
            except (EtcdError, NameTaken):
                continue
            finally:
                self._in_hand.discard(name)

    async def _start_and_stop(self) -> None:
        """As clients do. While a VM moves, that is refused. In the end all VMs are started, each on its host."""
        while True:
            await trio.sleep(self._rng.uniform(1, 20))
            for row in list(self.rows.values()):
                if row.leaving is not None or (row.runs and self._bed.is_calm):
                    continue
                row.runs = not row.runs
                if row.runs:
                    self._bed.recorder.runs(row.vm, self.name)
                else:
                    self._bed.recorder.rests(row.vm, self.name)

    async def _delete(self, claims: Claims) -> None:
        while True:
            await trio.sleep(self._rng.uniform(30, 120))
            stays = [name for name, row in self.rows.items() if row.leaving is None and name not in self._in_hand]
            if self._bed.is_calm or not stays:
                continue
            name = self._rng.choice(stays)
            row = self.rows[name]
            try:
                # It may have arrived, and the claim not say so yet.
                await claims.withdraw(name, Claim(row.vm, self.name, row.epoch))
            except (EtcdError, NameTaken):
                continue
            if self.rows.get(name) is not row or row.leaving is not None:
                continue
            vm = self.rows.pop(name).vm
            self._bed.recorder.deletes(vm, self.name)
            self._bed.alive.discard(vm)
            with suppress(EtcdError):
                await claims.free(name)

    async def _tidy(self, claims: Claims, mirror: Mirror) -> None:
        """As `Names` frees names without a VM, and as the snapshots of moves that are over are removed."""
        while True:
            await trio.sleep(3)
            for name, entry in list(mirror.section("vms").items()):
                claim = claim_of(entry)
                is_own = claim is not None and claim.owner == self.name
                if is_own and name not in self.rows and name not in self._in_hand:
                    self._in_hand.add(name)
                    with suppress(EtcdError):
                        await claims.free(name)
                    self._in_hand.discard(name)
            for move, (vm, _) in list(self.snapshots.items()):
                if self._fails(0.5):
                    continue
                if not any(row.arrived == move for row in self.rows.values()):
                    try:
                        await claims.refuse_arrival(move)
                        if await self._waits(claims, vm, move):
                            continue
                    except EtcdError:
                        continue
                self.snapshots.pop(move, None)

    async def _waits(self, claims: Claims, vm: str, move: str) -> bool:
        """Whether this host is about to start a VM from the snapshot of a move."""
        names = [f"default/vm{number}" for number in range(VMS)]
        found = (await claims.all_of(names)).values()
        return any(claim is not None and (claim.vm, claim.owner) == (vm, self.name) and claim.taking for claim in found)

    # Moves

    async def _evacuate(self, claims: Claims, departures: Departures) -> None:
        for name, row in list(self.rows.items()):
            if row.leaving is not None:
                # Of the daemon before.
                await self._go_on(departures, claims, name, row, row.leaving)
        while True:
            await trio.sleep(self._rng.uniform(1, 10))
            stays = [name for name, row in self.rows.items() if row.leaving is None and name not in self._in_hand]
            if self._bed.is_calm or not stays:
                continue
            name = self._rng.choice(stays)
            row = self.rows[name]
            try:
                claim = await claims.get(name)
            except EtcdError:
                continue
            if claim is None or claim.owner != self.name or claim.taking or self.rows.get(name) is not row:
                continue
            to = self._rng.choice([host for host in HOSTS if host != self.name])
            at = datetime(2026, 1, 1, tzinfo=UTC)
            row.leaving = leaving = Leaving(
                id=f"{self._rng.random()}", vm=claim.vm, epoch=claim.epoch, from_host=self.name, to_host=to, at=at,
                desired=Desired.RUNNING if row.runs else Desired.STOPPED,
            )  # fmt: skip
            if row.runs:
                self._bed.recorder.rests(row.vm, self.name)
            await self._go_on(departures, claims, name, row, leaving)

    async def _go_on(self, departures: Departures, claims: Claims, name: str, row: Row, leaving: Leaving) -> None:
        give = not self._fails(0.2)
        if not leaving.deciding:
            await self._sleep(3)
            other = self._bed.hosts[leaving.to_host]
            try:
                if other.claims is None or self._fails(0.1):
                    raise Problem(503, "host-unreachable", "simulated: it does not answer")
                other.snapshots[leaving.id] = (row.vm, row.runs)
                await other.claims.note_arrival(leaving.id)
            except (Problem, EtcdError):
                self._stay(row)
                await self._forget(claims, leaving, left=False)
                return
            await self._sleep(1)
            row.leaving = leaving = msgspec.structs.replace(leaving, deciding=True)
        left = await departures.conclude(name, leaving, give=give)
        if left:
            await self._sleep(1)
            self.rows.pop(name, None)
        else:
            self._stay(row)
        await self._forget(claims, leaving, left=left)

    async def _forget(self, claims: Claims, leaving: Leaving, *, left: bool) -> None:
        with suppress(EtcdError):
            await claims.end_move(leaving.vm, leaving.id, left=left)

    def _stay(self, row: Row) -> None:
        row.leaving = None
        if row.runs:
            self._bed.recorder.runs(row.vm, self.name)


class MovingHost(SimHost):
    """A host whose VMs may be taken over, and also move."""

    moves_within_s = 15.0
    """From one move to the next."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._leaving: dict[str, Leaving] = {}
        """As its journal has it, by the names of VMs."""
        self._arrived: dict[str, str] = {}
        """The VMs whose snapshots it has, by their moves."""
        self._alive: Claims | None = None
        self._numbers = itertools.count()

    @property
    def undecided(self) -> Collection[str]:  # type: ignore[override]  # the host of the other test has a constant
        return [name for name, leaving in self._leaving.items() if leaving.deciding]

    def _is_leaving(self, name: str) -> bool:
        return name in self._leaving

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        if claim.snapshot:
            assert self._arrived.get(claim.snapshot) == claim.vm, f"{claim.vm} is lost"
        await super().start(name, claim, spec)

    async def discard(self, name: str, claim: Claim) -> None:
        await super().discard(name, claim)
        self._leaving.pop(name, None)

    def _deletable(self) -> list[tuple[str, Claim]]:
        return [each for each in super()._deletable() if each[0] not in self._in_hand]

    async def _create(self, claims: Claims, fence: Fence) -> None:
        self._alive = claims
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super()._create, claims, fence)
                nursery.start_soon(self._evacuate, claims)
        finally:
            self._alive = None

    async def _evacuate(self, claims: Claims) -> None:
        departures = Departures(claims, self.name, ttl_s=TTL_S, now=self.now)
        self._in_hand.update(self._leaving)
        for name, leaving in list(self._leaving.items()):
            await self._go_on(claims, departures, name, leaving)
            self._in_hand.discard(name)
        while True:
            await trio.sleep(self._rng.uniform(1, self.moves_within_s))
            stays = [name for name, claim in self._claims.items() if claim.failover != "never"]
            stays = [name for name in stays if self._claims[name].vm in self._booted and name not in self._in_hand]
            if self.is_calm or not stays or self._is_frozen:
                continue
            name = self._rng.choice(stays)
            claim, at = self._claims[name], datetime(2026, 1, 1, tzinfo=UTC)
            self._in_hand.add(name)
            self._leaving[name] = leaving = Leaving(
                id=f"{self.name}-{next(self._numbers)}", vm=claim.vm, epoch=claim.epoch, from_host=self.name,
                to_host=self._rng.choice(list(self.others)), at=at, desired=Desired.RUNNING,
            )  # fmt: skip
            self._recorder.rests(claim.vm, self.name)
            await self._go_on(claims, departures, name, leaving)
            self._in_hand.discard(name)

    async def _go_on(self, claims: Claims, departures: Departures, name: str, leaving: Leaving) -> None:
        given = False
        other = self.others[leaving.to_host]
        assert isinstance(other, MovingHost)
        if not leaving.deciding:
            await trio.sleep(self._rng.uniform(0, 5))
            with suppress(EtcdError):
                if other._alive is not None:
                    other._arrived[leaving.arrival] = leaving.vm
                    await other._alive.note_arrival(leaving.id)
                    if self._leaving.get(name) is leaving:
                        self._leaving[name] = leaving = msgspec.structs.replace(leaving, deciding=True)
        if leaving.deciding:
            given = await departures.conclude(name, leaving)
        await trio.sleep(self._rng.uniform(0, 2))
        if self._leaving.get(name) is not leaving:
            return  # the fence has discarded it
        claim = self._claims[name]
        if given:
            self._recorder.rests(claim.vm, self.name)
            self._booted.discard(claim.vm)
            del self._claims[name]
        del self._leaving[name]
        if not given and not self._is_frozen:
            self._recorder.runs(claim.vm, self.name)
        for _ in range(10):
            with suppress(EtcdError):
                await claims.end_move(leaving.vm, leaving.id, left=given)
                return
            await trio.sleep(self._rng.uniform(1, 5))


async def run(sim: Simulation) -> Bed:
    bed = Bed(sim)
    bed.hosts = {name: Host(name, bed) for name in HOSTS}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bed.etcd.run)
        for host in bed.hosts.values():
            nursery.start_soon(host.run)
        with trio.move_on_after(WORK_S):
            while True:
                await trio.sleep(sim.rng.uniform(60, 200))
                bed.etcd.lose_quorum()
                await trio.sleep(sim.rng.uniform(1, 30))
                bed.etcd.regain_quorum()
        bed.etcd.regain_quorum()
        bed.is_calm = True
        await settled(partial(check, bed), CALM_S, HOLDS_S)
        nursery.cancel_scope.cancel()
    return bed


def check(bed: Bed) -> None:
    """Checks what there is in the end, and stays."""
    assert bed.recorder.running.keys() == bed.alive, "each VM runs, also those that have moved at rest"
    claims = claims_of(bed.etcd)
    assert {vm: claim.owner for vm, claim in claims.items()} == bed.recorder.running
    assert not any(claim.taking or claim.snapshot for claim in claims.values())
    assert not any(host.snapshots for host in bed.hosts.values())


def runs(count: int) -> tuple[int, int]:
    """Returns how many VMs have moved, and how many of these at rest."""
    moves = at_rest = 0

    async def main(sim: Simulation) -> None:
        nonlocal moves, at_rest
        bed = await run(sim)
        moves += bed.moves
        at_rest += bed.moves_at_rest

    for seed in range(count):
        simulate(main, seed=seed, faults=FAULTS, limit_steps=20_000_000)
    return moves, at_rest


def found() -> str:
    """Returns the first error of runs with a part left out."""
    try:
        runs(RUNS)
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return str(error)
    return "nothing"


@pytest.mark.simulation
def test_a_vm_that_moves_runs_on_one_host_and_is_never_lost() -> None:
    count = int(os.environ.get("RUNS", RUNS))
    moves, at_rest = runs(count)
    assert moves > 8 * count
    assert at_rest > count


@pytest.mark.simulation
def test_a_vm_that_may_be_taken_over_moves_and_runs_on_one_host() -> None:
    """And etcd loses all it has, and hosts are frozen or deleted, as in the tests of the fence."""
    assert fence_runs(int(os.environ.get("RUNS", FENCE_RUNS)), of=MovingHost) > 0


@pytest.mark.simulation
def test_without_refusing_arrivals_before_their_snapshots_go_one_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse_arrival(self: Claims, move: str) -> None:
        del self, move

    monkeypatch.setattr(Claims, "refuse_arrival", refuse_arrival)
    assert "is lost" in found()


@pytest.mark.simulation
def test_without_keeping_what_says_that_a_vm_was_lost_a_deleted_one_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that was away while it moved a VM, which stays as far as it knows, has to hear that it has lost it."""
    end_move = Claims.end_move

    async def forgets_all(self: Claims, vm: str, move: str, *, left: bool) -> None:
        del left
        await end_move(self, vm, move, left=True)

    monkeypatch.setattr(Claims, "end_move", forgets_all)
    with pytest.raises(BaseExceptionGroup) as raised:
        fence_runs(FENCE_RUNS, of=MovingHost)
    # Its VM comes back, or the next one of that name is not its own.
    assert raised.group_contains(AssertionError, match="was deleted|nobody else has it")


class Late(Wrapper):
    """A way to etcd on which each change that gives a VM away arrives late, and is not answered."""

    def __init__(self, etcd: SimulatedEtcd, nursery: trio.Nursery) -> None:
        super().__init__(etcd)
        self._nursery = nursery

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if not any(step.key.startswith("lost/") and step.kind == "put" for step in steps):
            return await super().transact(conditions, steps, otherwise)

        async def later() -> None:
            await trio.sleep(5)
            await self._etcd.transact(conditions, steps, otherwise)

        self._nursery.start_soon(later)
        raise OutcomeUnknown("simulated: the connection broke")


@pytest.mark.parametrize("dies", [True, False])
def test_what_comes_late_gives_no_vm_away_that_runs_on(dies: bool) -> None:
    """A daemon asks etcd to give a VM away, and the next one lets it go on here."""

    async def main(sim: Simulation) -> None:
        etcd = SimulatedEtcd(sim.rng)
        name, at = "default/web", datetime(2026, 1, 1, tzinfo=UTC)
        mine = await Claims(etcd, "h1").create(name, "1")
        leaving = Leaving(
            id="m", vm="1", epoch=1, from_host="h1", to_host="h2", at=at, desired=Desired.RUNNING, deciding=True
        )  # fmt: skip
        await Claims(etcd, "h2").note_arrival("m")
        await etcd.transact([], [put("alive/h2", b"")])
        async with trio.open_nursery() as nursery:
            departures = Departures(
                Claims(Late(etcd, nursery), "h1"), "h1", ttl_s=TTL_S, now=trio.current_time
            )  # fmt: skip
            with trio.move_on_after(0.2 if dies else 60):
                assert await departures.conclude(name, leaving), "it has come in the end"
            given = await departures.conclude(name, leaving, give=False)
            assert given is not dies
            await trio.sleep(60)
            claim = await Claims(etcd, "h1").get(name)
            assert claim is not None
            assert (claim == mine) is dies
            assert (claim.owner, claim.epoch, claim.taking) == (("h1", 1, False) if dies else ("h2", 2, True))
            nursery.cancel_scope.cancel()

    simulate(main, seed=0, faults={})
