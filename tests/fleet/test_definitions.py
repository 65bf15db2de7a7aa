"""What hosts share stays the same on all of them: simulated hosts with real journals, whose daemons die, whose way to
etcd breaks, and which change the same things at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import reduce
from operator import add
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest
import trio

from actors import ONE_FOR_ONE, ActorDown, Child, Ref, Request, Supervisor, System, fault, open_system
from actors.testing import Simulation, allow_real, kill, simulate
from tests.fleet.test_fence import Way
from tests.simulated.calls import DaemonDied
from tests.simulated.databases import Databases
from tests.simulated.etcd import FAULTS, SimulatedEtcd
from tests.simulated.host import SimHost
from tests.simulated.machine import Machine
from tests.system.kit import load
from volant.fleet import Compare, Definitions, EtcdUnavailable, Mirror, Step, Transaction, delete, put
from volant.journal import (
    AddKey,
    AddNetwork,
    AddProject,
    CreateRow,
    Journal,
    RemoveKey,
    RemoveNetwork,
    RemoveProject,
    RemoveSecret,
    SealSecret,
    SetQuota,
    Store,
    ask_journal,
    definitions_of,
    encode_definition,
)
from volant.model import (
    CreateApiKey,
    CreateNetwork,
    CreateProject,
    CreateVm,
    Key,
    Network,
    Problem,
    Project,
    Quota,
    Role,
    Secret,
    SecretRef,
)

FULL = 12
RUNS = load("RUNS", usual=3, full=FULL)
"""By hand, with `RUNS=2000` in the environment, more."""
HOSTS = ("h1", "h2", "h3")
WORK_S, CALM_S = 150.0, 90.0
SECRET = Key("default", "token")
KEY_ID = "0123abcd"
FAULTS_HERE = {site: chance for site, chance in FAULTS.items() if site != "etcd.lease_lasts"} | {
    "host.dies_after_write": 0.05
}


class RecordingEtcd(SimulatedEtcd):
    """Remembers all that was ever written. Takes nothing under one key, if it has to."""

    def __init__(self, rng: Random) -> None:
        super().__init__(rng)
        self.ever: set[tuple[str, bytes]] = set()
        self.refused: str | None = None

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if self.refused in {step.key for step in steps}:
            raise EtcdUnavailable("simulated: it chooses a leader")
        return await super().transact(conditions, steps, otherwise)

    def _carry_out(self, done: bool, steps: Sequence[Step]) -> Transaction:
        if done:
            self.ever |= {(step.key, step.value) for step in steps if step.kind == "put"}
        return super()._carry_out(done, steps)


class DeadlyWay(Way):
    """Ends with the daemon, which may die when etcd has made its change and it does not know yet."""

    def __init__(self, etcd: SimulatedEtcd) -> None:
        super().__init__(etcd)
        self.dead = False
        self.deadly = trio.Event()

    def is_cut(self) -> bool:
        return self.dead or self.cut

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        done = await super().transact(conditions, steps, otherwise)
        if fault("host.dies_after_write"):
            self.deadly.set()
        return done


class SharingHost:
    """A host with a journal, whose daemon dies and starts again."""

    def __init__(self, name: str, machine: Machine, etcd: SimulatedEtcd, directory: Path, sim: Simulation) -> None:
        self.name = name
        self.cleared: list[str] = []
        self._machine = machine
        self._etcd = etcd
        self._path = directory / "volant.db"
        self._sim = sim
        self._host: SimHost | None = None
        self._system: System | None = None
        self._way: DeadlyWay | None = None
        self.store: Store | None = None
        """None: no daemon runs."""
        self.definitions: Definitions | None = None
        self._looked_at: list[Any] = []

    async def alone(self, *changes: Request[Any]) -> None:
        """Makes changes before the host is in a fleet."""
        async with self._journal() as journal:
            for change in changes:
                await ask_journal(journal, change)
        self.store = None

    def _journal(self) -> Any:
        host = self._host = SimHost(self._machine)
        store = self.store = Store(host, self._path)
        child = Child("journal", lambda: Journal(store))
        supervisor = Supervisor(ONE_FOR_ONE, intensity=5, period_s=60, children=[child])
        return _Opened(open_system(supervisor, rng=self._sim.rng), self)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the daemon until it is killed."""
        with suppress(DaemonDied):
            async with self._journal() as journal, trio.open_nursery() as nursery:
                way = self._way = DeadlyWay(self._etcd)
                mirror = Mirror(way, trio.current_time)
                assert self.store is not None

                async def secret_keys() -> list[str]:
                    await trio.lowlevel.checkpoint()
                    return [KEY_ID]

                async def clear(project: str) -> None:
                    await trio.lowlevel.checkpoint()
                    self.cleared.append(project)

                definitions = self.definitions = Definitions(
                    way, mirror, self.name, f"id-{self.name}", journal=journal, store=self.store,
                    secret_keys=secret_keys, secret_keys_file="secrets.key", clear=clear,
                    new_id=self._machine.new_id,
                )  # fmt: skip
                nursery.start_soon(mirror.keep)
                nursery.start_soon(definitions.keep)
                task_status.started()
                await trio.sleep_forever()

    def die(self) -> None:
        """`kill -9`. Cancel `run` afterwards."""
        assert self._host is not None
        assert self._system is not None
        assert self._way is not None
        self._way.dead = True
        self.store = self.definitions = None
        self._host.die()
        kill(self._system, "")
        with allow_real("files"):
            for connection in apsw.connections():
                if connection.filename.startswith(str(self._path.parent)):
                    connection.close(force=True)

    @property
    def way(self) -> DeadlyWay:
        assert self._way is not None
        return self._way

    def has_changed(self) -> bool:
        """Whether it has something else since the last call. To encode all of it would take longer."""
        assert self.store is not None
        found: list[Any] = [*self.store.keys.by_digest.values(), self.store.keys.required]
        for kind in (Network, Project, Secret):
            found += self.store.projection.named(kind).values()
        before, self._looked_at = self._looked_at, found
        return found != before

    def shared(self) -> dict[str, bytes]:
        """Returns what it has of what hosts share."""
        assert self.store is not None
        return {place: encode_definition(each) for place, each in definitions_of(self.store).items()}


class _Opened:
    def __init__(self, opened: Any, host: SharingHost) -> None:
        self._opened = opened
        self._host = host

    async def __aenter__(self) -> Ref[Journal]:
        system = self._host._system = await self._opened.__aenter__()
        ref: Ref[Journal] = system["journal"]
        return ref

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._opened.__aexit__(*exc)


class Clients:
    """Ask hosts for changes, and remember how each ended."""

    def __init__(self, hosts: Sequence[SharingHost], rng: Random) -> None:
        self._hosts = hosts
        self._rng = rng
        self._count = 0
        self.versions: list[int] = []
        """Of the secret, each as it was acknowledged."""
        self.unknown_versions = 0
        self.present: dict[str, bool | None] = {}
        """By place: whether it has to be there; None: nobody knows."""
        self.gone: set[tuple[str, str]] = set()
        """Hosts with places that they have said to be removed for good."""
        self.outcomes: dict[str, int] = {}

    async def run(self) -> None:
        while True:
            await trio.sleep(self._rng.uniform(0, 2))
            host = self._rng.choice(self._hosts)
            if host.definitions is not None and host.store is not None:
                await self._rng.choice(
                    [self._set_secret, self._add_network, self._remove_network, self._add_key, self._remove_key,
                     self._use_project]
                )(host)  # fmt: skip

    async def _set_secret(self, host: SharingHost) -> None:
        assert host.store is not None
        before = host.store.projection.secrets.get(SECRET)
        version = 1 if before is None else before.version + 1
        done = await self._ask(host, SealSecret(SECRET, version, KEY_ID, b"%d" % self._rng.getrandbits(60)))
        if done:
            self.versions.append(version)
        elif done is None:
            self.unknown_versions += 1

    async def _add_network(self, host: SharingHost) -> None:
        self._count += 1
        name = f"n{self._count}"
        self.present[f"network/default/{name}"] = await self._ask(host, AddNetwork(CreateNetwork(name=name), "default"))

    async def _remove_network(self, host: SharingHost) -> None:
        await self._remove(host, "network/", lambda place: RemoveNetwork(Key("default", place.rpartition("/")[2])))

    async def _add_key(self, host: SharingHost) -> None:
        self._count += 1
        digest, name = f"{self._count:064x}", f"k{self._count}"
        change = AddKey(CreateApiKey(name=name, role=Role.ADMIN), digest, digest[:32], "test", True)
        self.present[f"key/{digest}"] = await self._ask(host, change)

    async def _remove_key(self, host: SharingHost) -> None:
        await self._remove(host, "key/", lambda place: RemoveKey(f"k{int(place.rpartition('/')[2], 16)}", True))

    async def _remove(self, host: SharingHost, kind: str, change: Callable[[str], Request[Any]]) -> None:
        found = [place for place, there in self.present.items() if there and place.startswith(kind)]
        if found:
            place = self._rng.choice(found)
            # Nobody else chooses it meanwhile.
            self.present[place] = None
            done = await self._ask(host, change(place))
            self.present[place] = None if done is None else not done
            if done:
                self.gone.add((host.name, place))

    async def _use_project(self, host: SharingHost) -> None:
        name = f"p{self._rng.randrange(3)}"
        await self._ask(
            host,
            self._rng.choice(
                [AddProject(CreateProject(name=name)), RemoveProject(name), SetQuota(name, Quota(vms=self._count))]
            ),
        )

    async def _ask(self, host: SharingHost, change: Request[Any]) -> bool | None:
        """Returns whether it was done; None: nobody knows."""
        outcome = "died"
        definitions = host.definitions
        assert definitions is not None
        try:
            await ask_journal(definitions, change)
            # A daemon that is dead has not said so.
            outcome = "done" if host.definitions is definitions else "died"
        except Problem as problem:
            outcome = problem.code
        except (ActorDown, DaemonDied):
            pass
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        if outcome == "done":
            return True
        return None if outcome in ("died", "fleet-outcome-unknown", "journal-down") else False


async def run(sim: Simulation, directory: Path) -> dict[str, int]:
    etcd = RecordingEtcd(sim.rng)
    with Databases() as databases:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(etcd.run)
            hosts = []
            for name in HOSTS:
                own = directory / name
                with allow_real("files"):
                    own.mkdir(parents=True)
                machine = Machine(sim.rng, nursery, databases, in_ram=(Path("/run"),), on_disk=(own,))
                machine.files.mkdir(own)
                host = SharingHost(name, machine, etcd, own, sim)
                # What only one has, and what each has made for itself.
                await host.alone(
                    AddNetwork(CreateNetwork(name=f"of-{name}"), "default"), AddProject(CreateProject(name="all"))
                )
                hosts.append(host)
            clients = Clients(hosts, sim.rng)
            async with trio.open_nursery() as work:
                for host in hosts:
                    work.start_soon(_live, host, sim)
                for _ in range(4):
                    work.start_soon(clients.run)
                work.start_soon(_check_traces, hosts, etcd, clients)
                work.start_soon(_lose_quorum, etcd, sim.rng)
                await trio.sleep(WORK_S)
                for host in hosts:
                    if host.store is not None:
                        host.die()
                work.cancel_scope.cancel()
            sim.faults.turn_off()
            etcd.regain_quorum()
            for host in hosts:
                await nursery.start(host.run)
            await trio.sleep(CALM_S)
            _check_end(hosts, etcd, clients)
            for host in hosts:
                host.die()
            nursery.cancel_scope.cancel()
    return clients.outcomes


async def _live(host: SharingHost, sim: Simulation) -> None:
    while True:
        async with trio.open_nursery() as nursery:
            await nursery.start(host.run)
            with trio.move_on_after(sim.rng.uniform(5, 60)):
                await host.way.deadly.wait()
            if sim.rng.random() < 0.3:
                host.way.cut = True
                await trio.sleep(sim.rng.uniform(1, 20))
                host.way.cut = False
                await trio.sleep(sim.rng.uniform(1, 20))
            host.die()
            nursery.cancel_scope.cancel()
        await trio.sleep(sim.rng.uniform(0.1, 10))


async def _check_traces(hosts: Sequence[SharingHost], etcd: RecordingEtcd, clients: Clients) -> None:
    """No journal ever has what the fleet did not, and what a host has removed does not come back to it."""
    gone = 0
    while True:
        await trio.sleep(0.02)
        more_are_gone, gone = len(clients.gone) > gone, len(clients.gone)
        for host in hosts:
            if host.definitions is None or not host.definitions.joined.is_set():
                continue
            if host.has_changed() or more_are_gone:
                for place, value in host.shared().items():
                    assert (f"shared/{place}", value) in etcd.ever, f"{host.name} has {place}, which no host agreed to"
                    assert (host.name, place) not in clients.gone, f"{place} came back to {host.name}"


async def _lose_quorum(etcd: SimulatedEtcd, rng: Random) -> None:
    while True:
        await trio.sleep(rng.uniform(10, 60))
        etcd.lose_quorum()
        await trio.sleep(rng.uniform(1, 20))
        etcd.regain_quorum()


def _check_end(hosts: Sequence[SharingHost], etcd: SimulatedEtcd, clients: Clients) -> None:
    there = {key: entry.value for key, entry in etcd.entries.items() if key.startswith("shared/")}
    for host in hosts:
        assert host.definitions is not None
        assert host.definitions.trouble is None
        assert {f"shared/{place}": value for place, value in host.shared().items()} == there
    for name in HOSTS:
        assert f"shared/network/default/of-{name}" in there
    assert "shared/project/all/all" in there
    # No change is lost, and none is made that was refused.
    for place, present in clients.present.items():
        if present is not None:
            assert (f"shared/{place}" in there) is present, f"{place}: {present}"
    # None is made twice.
    assert len(set(clients.versions)) == len(clients.versions)
    assert hosts[0].store is not None
    secret = hosts[0].store.projection.secrets.get(SECRET)
    version = 0 if secret is None else secret.version
    assert len(clients.versions) <= version <= len(clients.versions) + clients.unknown_versions


def runs(directory: Path, count: int) -> tuple[list[Any], dict[str, int]]:
    reports, outcomes = [], Counter[str]()
    for seed in range(count):

        async def main(sim: Simulation) -> None:
            outcomes.update(await run(sim, directory / str(sim.seed)))
            reports.append(sim.faults.report())

        simulate(main, seed=seed, faults=FAULTS_HERE, limit_steps=20_000_000)
    return reports, outcomes


@pytest.mark.slow
def test_hosts_agree_on_definitions_and_none_is_lost_or_doubled(tmp_path: Path) -> None:
    reports, outcomes = runs(tmp_path, RUNS)
    together = reduce(add, reports)
    assert outcomes["done"] > 20 * RUNS
    # Few runs need not meet all that can happen.
    if RUNS >= FULL:
        assert not together.never_fired
        assert not together.never_reached
        assert outcomes["fleet-unavailable"] > 0
        assert outcomes["fleet-outcome-unknown"] > 0


def test_without_the_condition_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def transact(self: Any, conditions: Any, steps: Sequence[Step], otherwise: Any = ()) -> Transaction:
        return await Way.transact(self, [], steps, otherwise)

    monkeypatch.setattr(DeadlyWay, "transact", transact)
    with pytest.raises(BaseException) as error:  # noqa: PT011 - groups of groups
        runs(tmp_path, FULL)
    assert error.group_contains(AssertionError) or error.errisinstance(AssertionError)


def run_hosts(directory: Path, test: Callable[[Hosts], Awaitable[None]]) -> None:
    """Runs some hosts without faults."""

    async def main(sim: Simulation) -> None:
        with Databases() as databases:
            async with trio.open_nursery() as nursery:
                hosts = Hosts(sim, nursery, databases, directory)
                nursery.start_soon(hosts.etcd.run)
                await test(hosts)
                for host in hosts.all:
                    if host.store is not None:
                        host.die()
                nursery.cancel_scope.cancel()

    simulate(main, seed=1)


class Hosts:
    """Hosts of one etcd."""

    def __init__(self, sim: Simulation, nursery: trio.Nursery, databases: Databases, directory: Path) -> None:
        self.etcd = RecordingEtcd(sim.rng)
        self.all: list[SharingHost] = []
        self._sim = sim
        self._nursery = nursery
        self._databases = databases
        self._directory = directory

    async def add(self, name: str, *changes: Request[Any]) -> SharingHost:
        """Starts a host that had these changes before it was in a fleet."""
        own = self._directory / name
        with allow_real("files"):
            own.mkdir()
        machine = Machine(self._sim.rng, self._nursery, self._databases, in_ram=(Path("/run"),), on_disk=(own,))
        machine.files.mkdir(own)
        host = SharingHost(name, machine, self.etcd, own, self._sim)
        self.all.append(host)
        await host.alone(*changes)
        await self.restart(host)
        # Its record, which others know it by.
        await self.etcd.transact([], [put(f"hosts/{name}", b""), put(f"alive/{name}", b"")])
        return host

    async def restart(self, host: SharingHost) -> None:
        """Starts the daemon of a host again."""
        await self._nursery.start(host.run)
        await trio.sleep(30)

    async def ask(self, host: SharingHost, change: Request[Any]) -> Any:
        assert host.definitions is not None
        return await ask_journal(host.definitions, change)


def network(name: str) -> AddNetwork:
    return AddNetwork(CreateNetwork(name=name), "default")


def test_a_host_with_another_thing_of_the_same_name_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    async def test(hosts: Hosts) -> None:
        first = await hosts.add("h1", AddProject(CreateProject(name="team", quota=Quota(vms=1))), network("a"))
        other = AddProject(CreateProject(name="team", quota=Quota(vms=2)))
        second = await hosts.add("h2", other, network("b"))
        assert second.definitions is not None
        assert "project team" in str(second.definitions.trouble)
        assert not second.definitions.joined.is_set()
        with pytest.raises(Problem) as refused:
            await hosts.ask(second, network("c"))
        assert refused.value.code == "fleet-unavailable"
        assert "project team" in refused.value.detail
        assert set(second.shared()) == {"project/team/team", "network/default/b"}
        assert set(first.shared()) == {"project/team/team", "network/default/a"}
        # Once it is gone from the fleet, the host joins by itself.
        await hosts.ask(first, RemoveProject("team"))
        await trio.sleep(30)
        assert second.definitions.trouble is None
        assert first.shared() == second.shared()
        assert set(first.shared()) == {"project/team/team", "network/default/a", "network/default/b"}
        # What the project of that name had left was removed on the first host: it comes from the second one.
        assert (first.cleared, second.cleared) == (["team"], [])

    run_hosts(tmp_path, test)


def test_what_another_host_uses_is_not_removed(tmp_path: Path) -> None:
    async def test(hosts: Hosts) -> None:
        first, second = await hosts.add("h1"), await hosts.add("h2")
        await hosts.ask(first, SealSecret(SECRET, 1, KEY_ID, b"sealed"))
        vm = CreateVm(name="web", cpu_cores=1, memory_mb=128, env={"TOKEN": SecretRef("token")})
        await hosts.ask(second, CreateRow(vm, "default"))
        await trio.sleep(10)
        with pytest.raises(Problem) as refused:
            await hosts.ask(first, RemoveSecret(SECRET))
        assert (refused.value.status, refused.value.code) == (409, "secret-in-use")
        assert "h2" in refused.value.detail
        with pytest.raises(Problem) as other:
            await hosts.ask(first, SealSecret(SECRET, 2, "ffffffff", b"of a key that h2 does not have"))
        assert other.value.code == "secrets-key-differs"
        assert first.shared() == second.shared()

    run_hosts(tmp_path, test)


def test_hosts_give_an_etcd_that_lost_everything_what_they_have(tmp_path: Path) -> None:
    async def test(hosts: Hosts) -> None:
        first, second = await hosts.add("h1", network("a")), await hosts.add("h2", network("b"))
        before = first.shared()
        assert set(before) == {"network/default/a", "network/default/b"}
        hosts.etcd.forget()
        await trio.sleep(60)
        assert first.shared() == second.shared() == before
        await hosts.ask(first, network("c"))
        await trio.sleep(5)
        assert len(first.shared()) == len(second.shared()) == 3

    run_hosts(tmp_path, test)


def test_a_host_that_was_away_does_not_bring_back_what_was_deleted(tmp_path: Path) -> None:
    async def test(hosts: Hosts) -> None:
        first, second = await hosts.add("h1", network("a")), await hosts.add("h2")
        await hosts.etcd.transact([], [delete("alive/h2")])
        second.die()
        await hosts.ask(first, RemoveNetwork(Key("default", "a")))
        await hosts.restart(second)
        assert first.shared() == second.shared() == {}

    run_hosts(tmp_path, test)


def test_what_a_host_has_is_announced_again_after_an_error(tmp_path: Path) -> None:
    async def test(hosts: Hosts) -> None:
        first, second = await hosts.add("h1"), await hosts.add("h2")
        hosts.etcd.refused = "seen/h2"
        await hosts.ask(first, network("a"))
        changed = hosts.etcd.entries["agreed"].modified
        await trio.sleep(5)
        assert first.shared() == second.shared()
        assert int(hosts.etcd.entries["seen/h2"].value) < changed
        hosts.etcd.refused = None
        await trio.sleep(15)
        assert int(hosts.etcd.entries["seen/h2"].value) >= changed

    run_hosts(tmp_path, test)
