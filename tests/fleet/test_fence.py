"""No VM runs on two hosts: five simulated hosts whose daemons freeze and die, whose clocks differ and whose way to etcd
breaks. And the recorder notices if the watchdog or the condition of a take-over is left out."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import Any, TypeVar

import msgspec
import pytest
import trio
import trio.lowlevel

from actors.testing import Simulation, simulate
from tests.fleet.test_member import member_of
from tests.simulated.etcd import FAULTS, SimulatedEtcd
from tests.system.kit import load
from volant.fleet import (
    Claim,
    Claims,
    Compare,
    Entry,
    EtcdError,
    EtcdUnavailable,
    Fence,
    KeyValues,
    Lease,
    Mirror,
    NameTaken,
    OutcomeUnknown,
    SignOfLife,
    Step,
    Successor,
    Transaction,
    absent,
    claim_of,
    delete,
    pause_at,
    put,
    unchanged,
)
from volant.model import Failover, Problem

T = TypeVar("T")

RUNS = load("RUNS", usual=16, full=46)
"""By hand, with `RUNS=5000` in the environment, more."""
HOSTS = ("h1", "h2", "h3", "h4", "h5")
VMS = 12
TTL_S, SLACK_S = 15, 5.0
WORK_S = 600.0
CALM_S = 360.0
"""Afterwards nothing fails any more, and each VM has to run again within this time."""
_HOLDS_S = 60.0
"""So long all has to be well in the end: longer than all that is done again after a pause."""
_DRIFT = 0.02
"""How much faster or slower than the others a host's clock may run. The argument allows a fifth."""


class Recorder:
    """Hears from each incarnation of each VM that it runs."""

    def __init__(self) -> None:
        self.running: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.withdrawn: set[str] = set()
        """Those that a host which owned them has begun to delete. Another one that has them still may have seen before
        that it is not their owner."""
        self.newest: dict[str, str] = {}
        """The last VM that each name was given to."""
        self._born: dict[str, int] = {}
        """After how many losses each VM has run first."""
        self.moves = 0
        self.losses = 0
        """How often etcd has lost everything."""
        self.wrong: list[str] = []
        """What an exception could not report, as the fence retries after any."""
        self.before: Mapping[str, Entry] = {}
        """What it had then."""

    def runs(self, vm: str, host: str) -> None:
        assert vm not in self.deleted, f"{vm} runs on {host}, and was deleted"
        self._born.setdefault(vm, self.losses)
        before = self.running.setdefault(vm, host)
        assert before == host, f"{vm} runs on {before} and on {host}"

    def rests(self, vm: str, host: str) -> None:
        if self.running.get(vm) == host:
            del self.running[vm]

    def deletes(self, vm: str, host: str) -> None:
        self.rests(vm, host)
        if self._born.get(vm) == self.losses:
            self.deleted.add(vm)

    def forgets(self, before: Mapping[str, Entry]) -> None:
        """A host that was away may hold a VM that it has lost before. If it is deleted, nothing says so any more."""
        self.losses += 1
        self.before = before
        self.deleted.clear()


class Way(KeyValues):
    """A host's way to etcd, which may be cut in the middle of a request."""

    def __init__(self, etcd: SimulatedEtcd) -> None:
        self._etcd = etcd
        self.cut = False

    def is_cut(self) -> bool:
        return self.cut

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T:
        if self.is_cut():
            await trio.sleep(2)
            raise EtcdUnavailable("simulated: the way is cut")
        answer = await ask()
        if self.is_cut():
            await trio.sleep(5)
            raise OutcomeUnknown("simulated: the way was cut")
        return answer

    async def get(self, key: str) -> Entry | None:
        try:
            return await self._ask(partial(self._etcd.get, key))
        except OutcomeUnknown as error:
            raise EtcdUnavailable(str(error)) from error

    async def list(self, prefix: str) -> tuple[Sequence[Entry], int]:
        return await self._ask(partial(self._etcd.list, prefix))

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        return await self._ask(partial(self._etcd.transact, conditions, steps, otherwise))

    async def grant(self, ttl_s: int) -> Lease:
        return await self._ask(partial(self._etcd.grant, ttl_s))

    async def keep_alive(self, lease: int) -> float:
        return await self._ask(partial(self._etcd.keep_alive, lease))

    async def revoke(self, lease: int) -> None:
        await self._ask(partial(self._etcd.revoke, lease))

    @asynccontextmanager
    async def watch(self, prefix: str, *, after: int) -> AsyncIterator[Any]:
        async with self._etcd.watch(prefix, after=after) as watch:
            yield _CutWatch(self, watch)


class _CutWatch:
    def __init__(self, way: Way, watch: Any) -> None:
        self._way = way
        self._watch = watch

    async def receive(self) -> Any:
        changes = await self._watch.receive()
        if self._way.cut:
            # As a cut cable: nothing arrives, and nobody says so.
            await trio.sleep_forever()
        return changes


class SimHost:
    """A host: its VMs, its watchdog, and a daemon that freezes, dies and starts again. The VMs outlive it."""

    def __init__(
        self, name: str, etcd: SimulatedEtcd, recorder: Recorder, rng: Random, *, watchdog: bool, asks: bool
    ) -> None:
        """`watchdog`: there is one; `asks`: before a guest runs for the first time, whose it is"""
        self.name = name
        self._asks = asks
        self.etcd = etcd
        self.way = Way(etcd)
        self._rng = rng
        self._recorder = recorder
        self._watchdog = watchdog
        self._speed = 1 + rng.uniform(-_DRIFT, _DRIFT)
        self._claims: dict[str, Claim] = {}
        self._launched = trio.Event()
        self._booted: set[str] = set()
        """The ids of VMs that have a process."""
        self._in_hand: set[str] = set()
        self._is_frozen = False
        """Whether the group of its VMs is."""
        self._thawed = trio.Event()
        self._is_full = False
        self.is_calm = False
        self.until: float | None = None
        """In memory that the daemon and the watchdog share."""
        self.others: Mapping[str, SimHost] = {}

    def now(self) -> float:
        return trio.current_time() * self._speed

    # Vms

    obstacle: str | None = None
    undecided: Collection[str] = ()
    failover: Failover = "restart"
    """Of its VMs."""
    slow, slow_s = 0.1, 50.0
    """The chance that a VM takes long to make, and how long at most."""

    @property
    def held(self) -> Mapping[str, Claim]:
        return self._claims

    def spec(self, name: str) -> bytes:
        return self._claims[name].vm.encode()

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        await trio.lowlevel.checkpoint()
        return not self._is_full

    async def pause_all(self) -> None:
        self._is_frozen = True
        for claim in self._claims.values():
            self._recorder.rests(claim.vm, self.name)
        await trio.sleep(self._rng.uniform(0, 0.5))

    async def resume_all(self) -> bool:
        self._is_frozen = False
        self._thawed.set()
        for name, claim in self._claims.items():
            if claim.vm in self._booted and not self._is_leaving(name):
                self._recorder.runs(claim.vm, self.name)
        await trio.lowlevel.checkpoint()
        return True

    def _is_leaving(self, name: str) -> bool:
        return False

    async def release(self) -> None:
        raise AssertionError("no host leaves")

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        assert spec == claim.vm.encode(), f"{claim.vm} is started without what it was"
        if self._is_full or self._fails(0.2):
            raise Problem(503, "no-room", "simulated: the room was given away meanwhile")
        self._recorder.moves += 1
        await self._launch(name, claim)

    async def _launch(self, name: str, claim: Claim) -> None:
        # The daemon may die before, or its disk be slow.
        await trio.sleep(self._rng.uniform(0, self.slow_s if self._fails(self.slow) else 2))
        self._claims[name] = claim
        self._launched.set()

    async def _boot(self, claims: Claims, sign: SignOfLife, fence: Fence) -> None:
        """Boots what has no process, as the actors of VMs do."""
        while True:
            if all(claim.vm in self._booted for claim in self._claims.values()):
                self._launched = trio.Event()
                await self._launched.wait()
            await fence.opened()
            await trio.sleep(self._rng.uniform(0.1, 1))
            for name, claim in list(self._claims.items()):
                if claim.vm in self._booted or not fence.is_open:
                    continue
                try:
                    found = await claims.get(name) if self._asks else claim
                except EtcdError:
                    continue
                if found is None or not found.is_of(claim):
                    sign.lapse()
                elif name in self._claims and self._claims[name].vm == claim.vm:
                    self._booted.add(claim.vm)
                    if not self._is_frozen:
                        self._recorder.runs(claim.vm, self.name)

    async def discard(self, name: str, claim: Claim) -> None:
        if not self._is_frozen:
            self._recorder.wrong.append(f"{claim.vm} is discarded while it runs")
        # It may have asked just before etcd lost everything, or before the VM that has the name now was deleted.
        known = any(self._is_gone(name, claim, entries) for entries in (self.etcd.entries, self._recorder.before))
        if not known and self._recorder.newest[name] == claim.vm and claim.vm not in self._recorder.withdrawn:
            self._recorder.wrong.append(f"{claim.vm} is discarded, and nobody else has it")
        await trio.sleep(self._rng.uniform(0, 2))
        if self._fails(0.3):
            raise OSError("simulated: a disk is busy")
        if self._fails(0.1):
            await trio.sleep(1000)
        self._recorder.rests(claim.vm, self.name)
        self._booted.discard(claim.vm)
        self._claims.pop(name, None)

    def _is_gone(self, name: str, claim: Claim, entries: Mapping[str, Entry]) -> bool:
        there = claim_of(entries.get(f"vms/{name}"))
        return f"lost/{self.name}/{claim.vm}" in entries or (there is not None and not there.is_of(claim))

    def _fails(self, chance: float) -> bool:
        return not self.is_calm and self._rng.random() < chance

    def check(self, there: Mapping[str, Claim]) -> None:
        """Checks what it has once all is calm. `there`: all claims, by the ids of VMs"""

    def check_end(self, there: Mapping[str, Claim]) -> None:
        """Checks what it comes to have."""

    # Processes

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            if self._watchdog:
                nursery.start_soon(self._watch)
            nursery.start_soon(self._breaks)
            nursery.start_soon(self._fills)
            while True:
                with trio.move_on_after(self._rng.uniform(30, 200) if not self.is_calm else math.inf):
                    await self._daemon()
                # Dead: it does nothing, and its VMs go on.
                self._in_hand.clear()
                await trio.sleep(self._rng.uniform(0.1, 60) if not self.is_calm else 0)

    async def _daemon(self) -> None:
        def share(until: float) -> None:
            assert self.until is None or self.until <= until
            self.until = until

        claims = Claims(self.way, self.name)
        sign = SignOfLife(self.way, f"alive/{self.name}", b"", ttl_s=TTL_S, now=self.now, lasts=share)
        sign.go_on(self.until)
        fence = Fence(claims, sign, self, ttl_s=TTL_S, now=self.now)
        mirror = Mirror(self.way, self.now)
        successor = Successor(claims, fence, self, host=self.name, mirror=mirror, slack_s=SLACK_S, now=self.now)

        async with trio.open_nursery() as nursery:
            for task in (sign.keep, fence.keep, mirror.keep, successor.keep):
                nursery.start_soon(task)
            nursery.start_soon(self._create, claims, fence)
            nursery.start_soon(self._boot, claims, sign, fence)
            nursery.start_soon(self._delete, claims)
            nursery.start_soon(self._tidy, claims, mirror)

    async def _create(self, claims: Claims, fence: Fence) -> None:
        while True:
            await trio.sleep(self._rng.uniform(1, 20))
            name = f"default/vm{self._rng.randrange(VMS)}"
            if self.is_calm or not fence.is_open or name in self._claims or name in self._in_hand:
                continue
            self._in_hand.add(name)
            try:
                vm = f"{self.name}-{self._rng.random()}"
                claim = await claims.create(
                    name, vm, self.failover, vm.encode(), is_there=lambda: name in self._claims  # noqa: B023
                )  # fmt: skip
                self._recorder.newest[name] = vm
                await self._launch(name, claim)
            except (EtcdError, NameTaken):
                continue
            finally:
                self._in_hand.discard(name)

    def _deletable(self) -> list[tuple[str, Claim]]:
        return list(self._claims.items())

    async def _delete(self, claims: Claims) -> None:
        while True:
            await trio.sleep(self._rng.uniform(5, 60))
            if self.is_calm:
                return
            for name, claim in self._deletable()[:1]:
                self._in_hand.add(name)
                # Before etcd knows it, so that it is not claimed for others again if etcd loses that.
                self._claims[name] = msgspec.structs.replace(claim, failover="never")
                try:
                    await claims.withdraw(name, claim)
                    self._recorder.withdrawn.add(claim.vm)
                    # The daemon may die before, in the middle, or after.
                    await trio.sleep(self._rng.uniform(0, 2))
                    self._booted.discard(claim.vm)
                    if self._claims.pop(name, None) is not None:
                        self._recorder.deletes(claim.vm, self.name)
                    await trio.sleep(self._rng.uniform(0, 2))
                    await claims.free(name)
                except (EtcdError, NameTaken):
                    continue
                finally:
                    self._in_hand.discard(name)

    async def _tidy(self, claims: Claims, mirror: Mirror) -> None:
        """As `Names` does: frees what a daemon that died has claimed and not made, or deleted and not freed."""
        while True:
            await trio.sleep(5)
            for name, entry in list(mirror.section("vms").items()):
                claim = claim_of(entry)
                if claim is None or claim.owner != self.name or name in self._claims or name in self._in_hand:
                    continue
                self._in_hand.add(name)
                try:
                    if name not in self._claims:
                        await claims.free(name)
                except EtcdError:
                    pass
                finally:
                    self._in_hand.discard(name)

    async def _watch(self) -> None:
        """The watchdog: it needs the time of the last beat alone, and is at most 0.2 s late. While time is left, or all
        is frozen, there is nothing for it to do."""
        while True:
            left_s = 0.0 if self.until is None else pause_at(self.until, TTL_S) - self.now()
            if left_s > 0:
                await trio.sleep(left_s / self._speed + self._rng.uniform(0, 0.2))
                continue
            self._thawed = trio.Event()
            await self.pause_all()
            await self._thawed.wait()
            await trio.sleep(self._rng.uniform(0, 0.2))

    async def _breaks(self) -> None:
        while not self.is_calm:
            await trio.sleep(self._rng.uniform(20, 200))
            self.way.cut = not self.is_calm
            await trio.sleep(self._rng.uniform(1, 60))
            self.way.cut = False

    async def _fills(self) -> None:
        while not self.is_calm:
            await trio.sleep(self._rng.uniform(20, 200))
            self._is_full = not self.is_calm
            await trio.sleep(self._rng.uniform(1, 100))
            self._is_full = False


async def forget(etcd: SimulatedEtcd, recorder: Recorder, at_s: float) -> None:
    await trio.sleep(at_s)
    recorder.forgets(etcd.entries)
    etcd.forget()


async def operate(etcd: SimulatedEtcd, rng: Random) -> None:
    """As an operator who deletes a host that is not gone for good (`Fleet.delete`)."""
    while True:
        await trio.sleep(rng.uniform(50, 300))
        host = rng.choice(HOSTS)
        for key, entry in etcd.entries.items():
            claim = claim_of(entry) if key.startswith("vms/") else None
            if claim is not None and claim.owner == host:
                with suppress(EtcdError):
                    conditions = [absent(f"alive/{host}"), unchanged(entry)]
                    await etcd.transact(conditions, [delete(key), delete(f"specs/{key}"), delete(f"replicas/{key}")])


async def run(sim: Simulation, *, watchdog: bool = True, asks: bool = True, of: type[SimHost] = SimHost) -> int:
    etcd, recorder = SimulatedEtcd(sim.rng), Recorder()
    hosts = [of(name, etcd, recorder, sim.rng, watchdog=watchdog, asks=asks) for name in HOSTS]
    for host in hosts:
        host.others = {other.name: other for other in hosts if other is not host}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(etcd.run)
        for host in hosts:
            nursery.start_soon(host.run)

        with trio.move_on_after(WORK_S):
            async with trio.open_nursery() as faults:
                faults.start_soon(operate, etcd, sim.rng)
                if sim.rng.random() < 0.5:
                    faults.start_soon(forget, etcd, recorder, sim.rng.uniform(150, WORK_S))
                while True:
                    await trio.sleep(sim.rng.uniform(60, 300))
                    etcd.lose_quorum()
                    await trio.sleep(sim.rng.uniform(1, 60))
                    etcd.regain_quorum()
        etcd.regain_quorum()
        for host in hosts:
            host.is_calm = True
        await settled(partial(check, etcd, recorder), CALM_S, _HOLDS_S)
        for host in hosts:
            host.check(claims_of(etcd))
        await settled(partial(check_hosts, etcd, hosts), CALM_S)
        nursery.cancel_scope.cancel()
    return recorder.moves


def claims_of(etcd: SimulatedEtcd) -> dict[str, Claim]:
    """Returns the claims of VMs, by their ids."""
    return {
        claim.vm: claim
        for key, entry in etcd.entries.items()
        if key.startswith("vms/") and (claim := claim_of(entry)) is not None
    }


def check(etcd: SimulatedEtcd, recorder: Recorder) -> None:
    """Checks what there is in the end, and stays."""
    assert not recorder.wrong, recorder.wrong
    there = claims_of(etcd)
    movable = {vm: claim.owner for vm, claim in there.items() if claim.failover != "never"}
    assert movable.items() <= recorder.running.items(), "each VM runs on its owner"
    assert not there.keys() & recorder.deleted, there.keys() & recorder.deleted
    specs = {entry.value.decode() for key, entry in etcd.entries.items() if key.startswith("specs/")}
    assert movable.keys() <= specs <= there.keys()


def check_hosts(etcd: SimulatedEtcd, hosts: Sequence[SimHost]) -> None:
    """Checks what each host has in the end."""
    for host in hosts:
        host.check_end(claims_of(etcd))


async def settled(holds: Callable[[], None], within_s: float, for_s: float = 0.0) -> None:
    """Waits until a check has not failed for so long.

    :raises AssertionError: of the check, if it does so to the end
    """
    began = good_since = trio.current_time()
    while True:
        await trio.sleep(5)
        now = trio.current_time()
        try:
            holds()
        except AssertionError:
            if now - began > within_s:
                raise
            good_since = now
        if now - good_since >= for_s:
            return


def runs(count: int, **options: Any) -> int:
    moves = 0

    async def main(sim: Simulation) -> None:
        nonlocal moves
        moves += await run(sim, **options)

    for seed in range(count):
        simulate(main, seed=seed, faults=FAULTS, limit_steps=20_000_000)
    return moves


@pytest.mark.simulation
def test_no_vm_runs_twice() -> None:
    assert runs(RUNS) > 10 * RUNS


@pytest.mark.simulation
def test_without_the_watchdog_one_does() -> None:
    assert "runs on" in found(watchdog=False)


@pytest.mark.simulation
def test_without_asking_before_a_guest_runs_one_does() -> None:
    """A row that is written late is not among those that the host has asked for when it came back."""

    class SlowHost(SimHost):
        slow, slow_s = 0.7, 150.0

    assert "runs on" in found(asks=False, of=SlowHost)


@pytest.mark.simulation
def test_without_the_conditions_of_a_take_over_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    async def take_over(self: Claims, name: str, dead: Claim) -> Claim:
        claim = msgspec.structs.replace(dead, owner=self._host, epoch=dead.epoch + 1)
        await self._etcd.transact([], [put(f"vms/{name}", msgspec.json.encode(claim))])
        return claim

    monkeypatch.setattr(Claims, "take_over", take_over)
    # Either it runs on two hosts, or one starts it that another has deleted.
    assert re.search("runs on|is started without what it was", found())


class Steps:
    """Notes what is done with the VMs of a host."""

    obstacle: str | None = None
    undecided: Collection[str] = ()

    def __init__(self) -> None:
        self.held: Mapping[str, Claim] = {}
        self.done: list[str] = []
        self.is_full = False
        self.refuses = False

    async def pause_all(self) -> None:
        self.done.append("paused")

    async def resume_all(self) -> bool:
        self.done.append("resumed")
        return True

    async def release(self) -> None:
        raise AssertionError("no host leaves")

    def spec(self, name: str) -> bytes:
        return b"spec"

    async def has_room(self, name: str, spec: bytes, snapshot: str = "") -> bool:
        return not self.is_full

    async def start(self, name: str, claim: Claim, spec: bytes) -> None:
        if self.refuses:
            raise Problem(409, "port-taken", "simulated: the port is taken")
        self.held = {name: claim}
        self.done.append("started")

    async def discard(self, name: str, claim: Claim) -> None:
        self.held = {}
        self.done.append("discarded")


def test_a_daemon_that_stood_still_pauses_and_asks_before_its_vms_go_on() -> None:
    """Its own timers have seen nothing, and the next beat is answered before they could."""

    async def main(sim: Simulation) -> None:
        etcd, steps, stood_s = SimulatedEtcd(sim.rng), Steps(), 0.0

        def now() -> float:
            return trio.current_time() + stood_s

        sign = SignOfLife(etcd, "alive/h1", b"", ttl_s=TTL_S, now=now)
        fence = Fence(Claims(etcd, "h1"), sign, steps, ttl_s=TTL_S, now=now)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(etcd.run)
            nursery.start_soon(sign.keep)
            nursery.start_soon(fence.keep)
            await trio.sleep(10)
            await fence.opened()
            steps.done.clear()
            stood_s = 11.0
            with trio.fail_after(10):
                await fence.closed()
                await fence.opened()
            assert steps.done == ["paused", "resumed"]
            nursery.cancel_scope.cancel()

    simulate(main, seed=0, faults={})


class NoClaims(Way):
    """A way to etcd on which beats come through, and no question about claims does while it is cut."""

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if self.cut and any(step.kind == "fetch" for step in steps):
            raise EtcdUnavailable("simulated: the way is cut")
        return await super().transact(conditions, steps, otherwise)

    def is_cut(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("until", "cut", "done"),
    [
        (TTL_S, False, {9: ["resumed"], 11: ["resumed"]}),
        (TTL_S, True, {9: [], 11: ["paused"], 60: ["paused", "resumed"]}),
        (None, False, {9: ["paused", "resumed"]}),
        # None of a daemon that has run since the boot.
        (TTL_S + 1.0, False, {9: ["paused", "resumed"]}),
    ],
)
def test_vms_run_on_while_the_daemon_is_restarted(
    until: float | None, cut: bool, done: Mapping[float, Sequence[str]]
) -> None:
    """If etcd answers in time that they are this host's. Beats alone don't say so."""

    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        way = NoClaims(etcd)
        claims = Claims(way, "h1")
        # Of the last daemon. Without it, etcd has lost what it had.
        await etcd.transact([], [put("alive/h1", b"")])
        steps.held = {"default/web": await claims.create("default/web", "1", "restart", b"1")}
        way.cut = cut
        began = trio.current_time()
        last = None if until is None else began + until
        sign = SignOfLife(way, "alive/h1", b"", ttl_s=TTL_S, now=trio.current_time)
        sign.go_on(last)
        fence = Fence(claims, sign, steps, ttl_s=TTL_S, now=trio.current_time)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(etcd.run)
            nursery.start_soon(sign.keep)
            nursery.start_soon(fence.keep)
            for at_s, wanted in done.items():
                way.cut = cut and at_s < 60
                await trio.sleep_until(began + at_s)
                assert steps.done == wanted, f"after {at_s} s"
            assert fence.is_open
            nursery.cancel_scope.cancel()

    simulate(main, seed=0, faults={})


NAME = "default/web"
MINE = Claim("1", "h1", 3, "restart")


@pytest.mark.parametrize(
    ("there", "lost", "done", "owner"),
    [
        # Nobody knows, so others have time to say that it is theirs.
        (None, False, {2 * TTL_S - 1: ["paused"], 2 * TTL_S + 3: ["paused", "resumed"]}, MINE),
        (None, True, {5: ["paused", "discarded", "resumed"]}, None),
        (Claim("1", "h2", 4), False, {5: ["paused", "discarded", "resumed"]}, Claim("1", "h2", 4)),
        (Claim("2", "h2", 1), False, {5: ["paused", "discarded", "resumed"]}, Claim("2", "h2", 1)),
        # Made by this host for a VM whose claim it has not found.
        (Claim("2", "h1", 1), False, {2 * TTL_S + 3: ["paused", "resumed"]}, MINE),
        (Claim("2", "h1", 1), True, {5: ["paused", "discarded", "resumed"]}, Claim("2", "h1", 1)),
        (MINE, True, {5: ["paused", "resumed"]}, MINE),
    ],
)
def test_a_host_that_was_away_discards_only_what_it_knows_to_be_gone(
    there: Claim | None, lost: bool, done: Mapping[int, Sequence[str]], owner: Claim | None
) -> None:
    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        steps.held = {NAME: MINE}
        entries = [put("alive/h2", b"")]
        entries += [put(f"vms/{NAME}", msgspec.json.encode(there))] if there else []
        entries += [put("lost/h1/1", NAME.encode())] if lost else []
        await etcd.transact([], entries)
        began = trio.current_time()
        async with started(etcd, steps, "h1"):
            for at_s, wanted in done.items():
                await trio.sleep_until(began + at_s)
                # Frozen again before each look at what is missing: it is frozen already.
                assert list(dict.fromkeys(steps.done)) == wanted, f"after {at_s} s"
            assert claim_of(etcd.entries.get(f"vms/{NAME}")) == owner
            assert ("lost/h1/1" in etcd.entries) == (lost and owner == MINE)

    simulate(main, seed=0, faults={})


def test_a_host_claims_again_at_once_what_etcd_has_lost_while_it_was_there() -> None:
    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        steps.held = {NAME: await Claims(etcd, "h1").create(NAME, "1", "restart", b"spec")}
        async with started(etcd, steps, "h1") as fence:
            await fence.opened()
            steps.done.clear()
            etcd.forget()
            with trio.fail_after(TTL_S / 3):
                await fence.closed()
                await fence.opened()
            assert claim_of(etcd.entries[f"vms/{NAME}"]) == steps.held[NAME]
            assert etcd.entries[f"specs/vms/{NAME}"].value == b"spec"
            assert set(steps.done) == {"paused", "resumed"}

    simulate(main, seed=0, faults={})


def test_a_host_waits_to_claim_again_what_it_may_have_given_away() -> None:
    """The host that has it may run it until it has seen the loss, too."""

    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        steps.held = {NAME: await Claims(etcd, "h1").create(NAME, "1", "restart", b"spec")}
        steps.undecided = [NAME]
        async with started(etcd, steps, "h1") as fence:
            await fence.opened()
            etcd.forget()
            await trio.sleep(2 * TTL_S - 3)
            assert not fence.is_open
            assert f"vms/{NAME}" not in etcd.entries
            with trio.fail_after(2 * TTL_S):
                await fence.opened()
            assert claim_of(etcd.entries[f"vms/{NAME}"]) == steps.held[NAME]

    simulate(main, seed=0, faults={})


@pytest.mark.parametrize("was_seen", [True, False])
def test_a_vm_is_taken_over_by_a_host_with_room(was_seen: bool) -> None:
    """And later if nobody has seen the sign of life of its host end: etcd may have lost it."""

    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        dead = await Claims(etcd, "h2").create(NAME, "1", "restart", b"spec")
        await etcd.transact([], [put("alive/h2", b"")] if was_seen else [])
        async with started(etcd, steps, "h1") as fence:
            await fence.opened()
            await trio.sleep(3)
            await etcd.transact([], [delete("alive/h2")])
            steps.is_full = True
            steps.done.clear()
            wait_s = SLACK_S if was_seen else TTL_S + SLACK_S - 3
            await trio.sleep(wait_s - 1.5)
            steps.is_full = False
            await trio.sleep(1)
            assert not steps.done
            steps.is_full = True
            await trio.sleep(10)
            assert claim_of(etcd.entries[f"vms/{NAME}"]) == dead
            steps.is_full = False
            await trio.sleep(3)
            assert steps.done == ["started"]
            mine = msgspec.structs.replace(dead, owner="h1", epoch=2, before="h2")
            assert claim_of(etcd.entries[f"vms/{NAME}"]) == mine
            assert etcd.entries["lost/h2/1"].value == NAME.encode()

    simulate(main, seed=0, faults={})


def test_a_host_that_can_not_start_a_vm_lets_another_one_do_it() -> None:
    async def main(sim: Simulation) -> None:
        etcd, unable, able = SimulatedEtcd(sim.rng), Steps(), Steps()
        unable.refuses, able.is_full = True, True
        await Claims(etcd, "h3").create(NAME, "1", "restart", b"spec")
        async with started(etcd, unable, "h1"), started(etcd, able, "h2"):
            await trio.sleep(TTL_S + SLACK_S + 10)
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.taking) == ("h1", True)
            able.is_full = False
            await trio.sleep(30)
            assert able.done.count("started") == 1
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.taking, claim.offered) == ("h2", False, False)
            assert claim.before == "h3", "h1 has never run it"

    simulate(main, seed=0, faults={})


def test_a_host_tries_again_what_it_has_offered_and_nobody_wants() -> None:
    async def main(sim: Simulation) -> None:
        etcd, steps = SimulatedEtcd(sim.rng), Steps()
        steps.refuses = True
        await Claims(etcd, "h3").create(NAME, "1", "restart", b"spec")
        async with started(etcd, steps, "h1"):
            await trio.sleep(TTL_S + SLACK_S + TTL_S + 15)
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.offered) == ("h1", True)
            steps.refuses = False
            await trio.sleep(60)
            assert steps.done.count("started") == 1
            claim = claim_of(etcd.entries[f"vms/{NAME}"])
            assert claim is not None
            assert (claim.owner, claim.before, claim.taking, claim.offered) == ("h1", "h3", False, False)

    simulate(main, seed=0, faults={})


def test_a_deleted_host_keeps_what_it_has_lost_and_not_what_others_have() -> None:
    async def main(sim: Simulation) -> None:
        etcd = SimulatedEtcd(sim.rng)
        fleet = member_of(etcd)
        await etcd.transact([], [put("hosts/h2", b"{}"), put("lost/h2/1", NAME.encode())])
        claims = Claims(etcd, "h2")
        for number in range(100):
            name = f"default/vm{number}"
            await claims.create(name, str(number), "restart", b"spec")
            await etcd.transact([], [put(f"records/{name}", b"{}")])
        moved = await claims.get("default/vm7")
        assert moved is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fleet._mirror.keep)
            await fleet.changed()
            before = etcd.revision
            # Meanwhile another host takes one over, which no mirror shows yet.
            taken = await Claims(etcd, "h3").take_over("default/vm7", moved)
            await fleet.delete("h2")
            assert etcd.revision - before <= 6, "one transaction for many names"
            assert claim_of(etcd.entries["vms/default/vm7"]) == taken
            left = {"vms/default/vm7", "specs/vms/default/vm7", "records/default/vm7", "lost/h2/1", "lost/h2/7"}
            assert etcd.entries.keys() == left
            nursery.cancel_scope.cancel()

    simulate(main, seed=0, faults={})


@asynccontextmanager
async def started(etcd: SimulatedEtcd, steps: Steps, host: str) -> AsyncIterator[Fence]:
    """Runs a host without a watchdog."""
    now = trio.current_time
    claims, mirror = Claims(etcd, host), Mirror(etcd, now)
    sign = SignOfLife(etcd, f"alive/{host}", b"", ttl_s=TTL_S, now=now)
    fence = Fence(claims, sign, steps, ttl_s=TTL_S, now=now)
    successor = Successor(claims, fence, steps, host=host, mirror=mirror, slack_s=SLACK_S, now=now)
    async with trio.open_nursery() as nursery:
        for task in (etcd.run, sign.keep, fence.keep, mirror.keep, successor.keep):
            nursery.start_soon(task)
        yield fence
        nursery.cancel_scope.cancel()


def found(**options: Any) -> str:
    """Returns the first error of runs with a part left out."""
    try:
        runs(RUNS, **options)
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return str(error)
    return "nothing"
