"""The scenario of a simulation run: a daemon under faults, its users, and what must hold all the time.

Operators create, start, stop and delete VMs of their own and know what was acknowledged. A follower reads every event,
over all breaks of its connection, and compares them with the table of transitions. A troublemaker kills the daemon, its
actors and the power. When it has done enough, faults are turned off, and within a bounded time everything must be what
it should be.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import apsw
import msgspec
import trio

from actors.testing import FaultReport, Simulation, kill, simulate
from tests.simulated import Answer, Unreachable, World, simulated_world
from tests.simulated.machine import Machine
from tests.simulated.qemu import SimQemu
from tests.simulation.secret_user import SECRETS, SecretUser, check_nowhere, check_values
from tests.simulation.volume_user import VOLUMES, VolumeUser, check_files, check_guests, files, watch_writers
from volant.journal import Projection
from volant.model import TRANSITIONS, Status, VmRow, settled
from volant.model.agent import IDENTITY_NETWORK_SINCE

TROUBLE_S = 110.0
CONVERGE_S = 2400.0
"""A template that could not be built five times is tried again after eight minutes, and VMs may wait for it."""
AFTERMATH_S = 30.0
"""The daemon notices that late that a hypervisor has ignored a command under the last faults."""
IDLE_S = 60.0
IDLE_STEPS_PER_VM = 200
STEPS_PER_LINE = 20
"""For what a workload writes, on its way to the log."""

FAULTS: dict[str, float] = {
    "agent.can_not_mount": 0.05,
    "agent.refuses": 0.01,
    "agent.refuses_hosts": 0.1,
    "agent.restarts": 0.03,
    "agent.slow": 0.03,
    "bridge.goes": 0.01,
    "channel.garbage": 0.002,
    "client.stays_away": 0.3,
    "channel.is_cut": 0.05,
    "database.fails": 0.01,
    "directory.does_not_move": 0.6,
    "disk.full": 0.003,
    "disk.writes_half": 0.01,
    "firewall.refuses": 0.03,
    "firewall.cannot_be_read": 0.03,
    "resolver.cannot_listen": 0.03,
    "guest.ignores_shutdown": 0.2,
    "guest.never_answers": 0.05,
    "guest.panics": 0.03,
    "guest.panics_at_boot": 0.05,
    "guest.powers_off": 0.03,
    "guest.reboots": 0.03,
    "memory.is_short": 0.03,
    "memory.is_under_pressure": 0.01,
    "mke2fs.fails": 0.05,
    "network.answer_is_lost": 0.01,
    "network.does_half": 0.02,
    "network.refuses": 0.02,
    "oci.fails": 0.03,
    "oci.refuses": 0.1,
    "oci.slow": 0.02,
    "oci.wrong_digest": 0.05,
    "process.does_not_start": 0.03,
    "process.is_stubborn": 0.05,
    "qemu.agent_port_is_full": 0.2,
    "qemu.dies": 0.03,
    "qemu.dies_as_it_goes_on": 0.1,
    "qemu.exits_at_start": 0.05,
    "qemu.fails_to_save": 0.1,
    "qemu.hangs_at_start": 0.03,
    "qemu.ignores_a_command": 0.02,
    "qemu.is_slow": 0.02,
    "qemu.loses_control": 0.03,
    "qemu.refuses_cont": 0.05,
    "qemu.refuses_stop": 0.05,
    "qemu.refuses_template": 0.05,
    "socket.refuses": 0.02,
    "standby.dies": 0.5,
}

BRIEF = "brief-job"
JOBS = {"job": ("ends", "stop"), "bad-job": ("fails", "stop"), BRIEF: ("ends", "delete")}
"""Plugins whose VMs stop with their workload, in every fifth run: the program of each, and what follows its end."""

IMAGE = "app"
"""The OCI image of most VMs, in every fifth run."""
BLUE = "blue"
NETWORKS = {"ada": BLUE, "bob": "bridge", "eve": BLUE}
"""The network of each operator's VMs, in every second run; none in the others, as a template fits one kind only."""

EGRESS: list[object] = ["all", "all", "none", [{"name": "*.example.com", "ports": [443]}, {"cidr": "10.0.0.0/8"}]]
"""Egress policies of new VMs with a network."""

REACHABLE = TRANSITIONS - {
    (Status.PENDING, Status.STOPPED),
    (Status.PENDING, Status.DELETING),
    # They come from another host.
    (None, Status.STOPPED),
    (None, Status.CRASHED),
}
"""A pending VM begins to start before its actor handles its first message."""

_JSON = {"content-type": "application/json"}
_LINE = re.compile(r"line (\d+)\Z")
_ATTEMPTS = 400
_REST_S = 120.0
"""Until nothing is under way any more."""


@dataclass
class Seen:
    """What one simulation run has covered, or several together."""

    transitions: set[tuple[Status | None, Status | None]] = field(default_factory=set)
    faults: FaultReport | None = None
    starts: int = 0
    events: int = 0
    acknowledged: int = 0
    clones: int = 0
    """VMs that ran as clones at the end."""
    copies: int = 0
    """VMs that ran as copies of others."""
    mounts: int = 0
    """VMs with volumes that were up at the end."""
    secrets: int = 0
    """VMs with secrets that were up at the end."""
    restricted: int = 0
    """VMs with an egress policy that were up at the end."""
    ends: int = 0
    """Workloads that ended, and with which their VMs stopped."""
    standbys: int = 0
    """Those of them whose process came from the warm pool."""

    def __iadd__(self, other: Seen) -> Seen:
        self.transitions |= other.transitions
        if other.faults is not None:
            self.faults = other.faults if self.faults is None else self.faults + other.faults
        self.starts += other.starts
        self.events += other.events
        self.acknowledged += other.acknowledged
        self.clones += other.clones
        self.copies += other.copies
        self.mounts += other.mounts
        self.secrets += other.secrets
        self.restricted += other.restricted
        self.ends += other.ends
        self.standbys += other.standbys
        return self

    def lines(self) -> Iterable[str]:
        """Yields a summary."""
        if self.faults is not None:
            yield from self.faults.lines()
        yield f"{self.starts} daemons, {self.events} events, {self.acknowledged} acknowledged creations and deletions"
        yield f"{self.clones} VMs were clones at the end, {self.standbys} of them in processes that had waited"
        yield f"{self.copies} ran as copies of others, {self.ends} workloads ended, {self.mounts} had volumes"
        yield f"{self.secrets} had secrets"
        yield f"{self.restricted} had an egress policy"


def missing(seen: Seen) -> list[str]:
    """Returns what enough runs should have covered and did not: transitions and faults."""
    transitions = [f"{before} -> {after}" for before, after in sorted(REACHABLE - seen.transitions, key=str)]
    assert seen.faults is not None
    if not seen.copies:
        transitions.append("a VM that ran as a copy of another one")
    if not seen.mounts:
        transitions.append("a VM with volumes")
    if not seen.secrets:
        transitions.append("a VM with secrets")
    if not seen.ends:
        transitions.append("a VM that stopped with its workload")
    return [*transitions, *seen.faults.never_fired, *seen.faults.never_reached]


def run_seed(seed: int, directory: Path) -> Seen:
    """Makes one simulation run; `directory` is empty. An exception carries the seed and the end of the trace."""
    seen = Seen()

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, directory) as world:
            variant = {
                "jobs": seed % 5 == 4,
                "images": seed % 5 == 3,
                "volumes": seed % 6 == 5,
                "secrets": seed % 7 == 6,
            }
            await Scenario(sim, world, seen, **variant).run()
        seen.faults = sim.faults.report()

    simulate(main, seed=seed, faults=FAULTS, limit_steps=20_000_000)
    return seen


class Scenario:
    """One simulation run."""

    def __init__(
        self,
        sim: Simulation,
        world: World,
        seen: Seen,
        *,
        jobs: bool = False,
        images: bool = False,
        volumes: bool = False,
        secrets: bool = False,
    ) -> None:
        self.sim = sim
        self.world = world
        self.seen = seen
        self.over = False
        self._volumes = volumes
        self._undrain_at = math.inf
        # One that is too old for secrets would fail each boot.
        world.machine.has_new_agents = secrets
        self._plugins = ["base", *JOBS] if jobs else ["base"]
        if images:
            world.machine.registry.push(IMAGE)
        self.follower = Follower(world, seen)
        networks = sim.rng.choice([NETWORKS, dict.fromkeys(NETWORKS, "none")])
        self.operators = [
            Operator(
                world,
                Random(sim.rng.getrandbits(64)),
                [f"{name}-{n}" for n in range(2)],
                network,
                self._plugins,
                seen,
                image=IMAGE if images else None,
                volumes=volumes,
                secrets=secrets,
            )
            for name, network in networks.items()
        ]

    async def run(self) -> None:
        # Some runs end with a filled warm pool, and some without.
        self.world.settings = msgspec.structs.replace(
            self.world.settings,
            standby=self.sim.rng.choice([2, "auto"]),
            standby_idle_s=self.sim.rng.choice([40.0, 600.0]),
        )
        await self.world.start_daemon()
        await self._make_network()
        for plugin in self._plugins[1:]:
            await self._install(plugin)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.follower.run)
            nursery.start_soon(watch_processes, self.world.machine)
            if self._volumes:
                nursery.start_soon(watch_writers, self.world.machine)
            async with trio.open_nursery() as people:
                for operator in self.operators:
                    people.start_soon(operator.run, lambda: self.over)
                with trio.move_on_after(TROUBLE_S):
                    await self._make_trouble()
                self.over = True
                self.sim.faults.turn_off()
                self.world.machine.disk_full = False
                for process in self.world.machine.processes.values():
                    process.stubborn_s = 0.0
                if not self.world.runs:
                    await self._start()
                await self._undrain()
            for operator in self.operators:
                await operator.complete()
            await self._come_to_rest()
            await self._stand_idle()
            self._check_rest()
            await self._check_forks()
            await self._check_orphans()
            await self._check_logs()
            await self._kill_in_a_launch()
            await self.follower.catch_up()
            self.follower.check_rest(self.world)
            await self._clear_out()
            await self.follower.catch_up()
            nursery.cancel_scope.cancel()
        self.seen.starts = self.world.starts

    async def _make_network(self) -> None:
        for _ in range(_ATTEMPTS):
            answer = await self.world.request("POST", "/api/v1/networks", {"name": BLUE}, _JSON)
            if answer.status in (201, 409):
                return
            await trio.sleep(1.0)
        raise AssertionError("a network is never made")

    async def _install(self, plugin: str) -> None:
        program, on_exit = JOBS[plugin]
        workload = {"entrypoint": [program], "on_exit": on_exit}
        manifest = {"name": plugin, "resources": {"memory_mb": 64}, "workload": workload}
        for _ in range(_ATTEMPTS):
            answer = await self.world.request("POST", "/api/v1/plugins", manifest, _JSON)
            if answer.status in (201, 409):
                return
            await trio.sleep(1.0)
        raise AssertionError("a plugin is never installed")

    # Trouble

    async def _make_trouble(self) -> None:
        rng, world = self.sim.rng, self.world
        while True:
            await trio.sleep(rng.expovariate(1 / 12.0))
            if trio.current_time() > self._undrain_at:
                self._undrain_at = math.inf
                await self._undrain()
            what = rng.choices(
                ["kill", "stop", "power", "actor", "journal", "disk", "clock", "drain", "network"],
                [30, 10, 6, 30, 8, 8, 4, 5, 5],
            )[0]
            self.sim.note(f"trouble: {what}")
            system = world.daemon.system
            assert system is not None
            if what == "actor":
                rows = world.daemon.store.projection.rows()
                if rows:
                    self._kill(f"vms/{rng.choice(rows).name}")
            elif what == "journal":
                self._kill("journal")
            elif what == "disk":
                world.machine.disk_full = True
                await trio.sleep(rng.uniform(0.1, 15.0))
                world.machine.disk_full = False
            elif what == "drain":
                # The next trouble may come in the middle of it.
                stop = rng.choice(["", "?stop_vms=true&grace=5s"])
                await world.request("POST", f"/api/v1/system/drain{stop}")
                self._undrain_at = trio.current_time() + rng.uniform(1.0, 20.0)
            elif what == "network":
                rng.choice([world.machine.links.take_away_bridges, world.machine.links.take_away_firewall])()
            elif what == "clock":
                world.machine.clock_offset += timedelta(seconds=rng.uniform(-3600, 3600))
            else:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 120):
                    await {"kill": world.kill_daemon, "stop": world.stop_daemon, "power": world.power_cut}[what]()
                    await trio.sleep(rng.expovariate(1 / 2.0))
                    await self._start()

    async def _start(self) -> None:
        """Starts the daemon as systemd does: again, when it fails to start."""
        for _ in range(20):
            try:
                return await self.world.start_daemon()
            except (OSError, apsw.Error) as error:
                self.sim.note(f"the daemon does not start: {error}")
                await trio.sleep(1.0)
        raise AssertionError("the daemon does not start")

    async def _undrain(self) -> None:
        for _ in range(_ATTEMPTS):
            if (await self.world.request("POST", "/api/v1/system/undrain")).status == 200:
                return
            await trio.sleep(1.0)
        raise AssertionError("the daemon drains forever")

    def _kill(self, path: str) -> None:
        system = self.world.daemon.system
        assert system is not None
        try:
            kill(system, path)
        except KeyError:
            pass  # It is deleted, or does not run at the moment.

    # Rest

    async def _come_to_rest(self) -> None:
        deadline = trio.current_time() + CONVERGE_S
        rests_since = trio.current_time()
        while True:
            await trio.sleep(1.0)
            daemon = self.world.daemon
            rows = daemon.store.projection.rows()
            for row in rows:
                if row.reason is not None and row.reason.code == "control_lost":
                    await self.world.request("POST", f"/api/v1/vms/{row.name}/recover")
            restless = [row for row in rows if not settled(row)]
            copying = daemon.vms.copies.inspect()
            refilling = daemon.vms.warm_pool.lacks()
            making = [each.name for each in daemon.store.projection.volumes.values() if each.status != "ready"]
            if restless or daemon.status.health() != "ok" or _builds(daemon) or copying or refilling or making:
                rests_since = trio.current_time()
            elif trio.current_time() - rests_since >= AFTERMATH_S:
                return
            assert trio.current_time() < deadline, (
                f"no rest: {daemon.status.health()}, {[_short(row) for row in restless]}, {making}, "
                f"builds {_builds(daemon)}, copies {copying}, refills {refilling}"
            )

    async def _stand_idle(self) -> None:
        def lines() -> int:
            return sum(qemu.guest.lines for qemu in self.world.machine.running())

        steps, written = self.sim.steps, lines()
        await trio.sleep(IDLE_S)
        spent, written = self.sim.steps - steps, lines() - written
        vms = len(self.world.daemon.store.projection) + 1
        assert spent < IDLE_STEPS_PER_VM * vms + STEPS_PER_LINE * written, (
            f"{spent} steps while {vms} VMs stood idle for {IDLE_S:g} s, but for {written} lines of their workloads"
        )

    def _check_rest(self) -> None:
        world = self.world
        daemon = world.daemon
        rows = {row.name: row for row in daemon.store.projection.rows()}
        for operator in self.operators:
            operator.check(rows, daemon.store.projection)
        check_files(world)
        running = {qemu.tag: qemu for qemu in world.machine.running()}
        owned = {row.tag for row in rows.values() if row.status in (Status.RUNNING, Status.PAUSED)}
        pool = daemon.vms.warm_pool.tags
        assert set(running) == owned | pool, "hypervisors are not those of running VMs and of the warm pool"
        limits = daemon.vms.warm_pool.limits
        waiting = daemon.vms.warm_pool.statistics()["waiting"]
        assert isinstance(waiting, Counter)
        assert sum(waiting.values()) == len(pool)
        most = limits.each or limits.most
        assert max(waiting.values(), default=0) <= most, f"too many processes of one template: {waiting}"
        for row in rows.values():
            assert row.status not in (Status.STARTING, Status.STOPPING, Status.DELETING, Status.PENDING), row
            assert row.status is not Status.STOPPED or not row.is_removed_at_rest, f"it is still there: {_short(row)}"
            if row.status in (Status.RUNNING, Status.PAUSED):
                machine = running[row.tag]
                assert row.process == machine.process.identity
                assert row.desired.value == row.status.value == machine.status, (_short(row), machine.status)
                assert row.status is Status.PAUSED or not row.is_finished, "it outlives its workload"
        alive = [row for row in rows.values() if row.status in (Status.RUNNING, Status.PAUSED)]
        self.seen.clones += sum(row.template is not None for row in alive)
        self.seen.mounts += sum(bool(row.volumes) for row in alive)
        self.seen.copies += sum(row.origin is not None and row.checkpoint is None for row in rows.values())
        self.seen.standbys += sum("-s." in row.tag for row in alive)
        assert set(world.machine.groups) == set(running), "control groups are not those of hypervisors"
        spare = {tag for tag, qemu in running.items() if qemu.process.is_expendable}
        assert spare == pool, "processes that the kernel ends first are not those of the warm pool"
        self._check_files({str(row.id) for row in alive}, {str(row.id) for row in alive if row.template is None})
        self._check_networks(list(rows.values()), running)
        check_guests(rows.values(), running)
        self.seen.secrets += check_values(rows.values(), running)
        check_nowhere(world)

    def _check_networks(self, rows: list[VmRow], running: dict[str, SimQemu]) -> None:
        """Checks that no address is used twice, that exactly the running VMs with a lease have a tap and an element of
        the firewall, and that guests know their peers if their agent takes hosts entries."""
        leases = [row.lease for row in rows if row.lease is not None]
        assert len({lease.address for lease in leases}) == len(leases), leases
        wanted = {row.lease.tap: row.lease for row in rows if row.lease is not None and row.tag}
        machine = self.world.machine.links
        taps = {name for name, link in machine.links.items() if link.kind == "tun"}
        assert taps == set(wanted), (taps, [_short(row) for row in rows])
        for name in taps:
            bridge = machine.links.get(machine.links[name].master)
            assert machine.links[name].up, name
            assert bridge is not None, name
            assert bridge.up, bridge
            assert machine.addresses[bridge.name], bridge
        let_out = [held for name, held in machine.elements.items() if name.endswith(" guests")]
        assert sorted(element for held in let_out for element in held) == sorted(
            f'"{lease.tap}" . {lease.mac} . {lease.address}' for lease in wanted.values()
        )
        restricted = [row for row in rows if row.lease is not None and row.tag and row.egress != "all"]
        self._check_egress({row.ip_address: row for row in restricted})
        members = {row.name: row.ip_address for row in rows if row.network == BLUE}
        for row in rows:
            if row.status is Status.RUNNING and row.lease is not None:
                guest = running[row.tag].guest
                if guest.protocol >= IDENTITY_NETWORK_SINCE:
                    assert guest.hosts == (members if row.network == BLUE else {}), (_short(row), guest.hosts, members)

    def _check_egress(self, restricted: dict[str, VmRow]) -> None:
        """Checks that exactly the running VMs with an egress policy have rules, and a resolver each."""
        machine = self.world.machine.links
        held = {name.rpartition(" ")[2]: held for name, held in machine.elements.items() if "-egress " in name}
        assert held.get("policies", {}) == {address: f"goto vm-{row.id}" for address, row in restricted.items()}
        chains = {name for _, kind, name in machine.objects if kind == "chain"}
        assert chains == {f"vm-{row.id}" for row in restricted.values()}, chains
        resolvers = {
            key.partition(" . ")[0]: int(to.rpartition(" . ")[2]) for key, to in held.get("resolvers", {}).items()
        }
        assert resolvers.keys() == restricted.keys(), (resolvers, restricted.keys())
        assert self.world.dns.open == set(resolvers.values())
        self.seen.restricted += len(restricted)

    def _check_files(self, ids: set[str], with_memory: set[str]) -> None:
        files = self.world.machine.files
        vms = self.world.settings.runtime_dir / "vms"
        directories = set(files.names(vms)) if files.find(vms) else set()
        assert directories == ids, f"directories {directories}, running VMs {ids}"
        memory = {path.stem for path in files.below(Path("/dev/shm")) if path.suffix == ".mem"}
        assert memory == with_memory, f"memory files {memory}, running VMs that are not clones {with_memory}"
        templates = self.world.settings.state_dir / "templates"
        self._check_checkpoints()
        halves = [name for name in files.names(templates) if "." in name] if files.find(templates) else []
        assert not halves, f"half-made templates are left: {halves}"
        standby = self.world.settings.runtime_dir / "standby"
        waiting = set(files.names(standby)) if files.find(standby) else set()
        pool = self.world.daemon.vms.warm_pool.tags if self.world.runs else set()
        assert waiting == {tag.rpartition(".")[2] for tag in pool}, f"{waiting} are left of the warm pool"
        built = self.world.settings.runtime_dir / "templates"
        assert not files.find(built) or not files.names(built), files.names(built)

    def _check_checkpoints(self) -> None:
        """Checks that each checkpoint is complete and belongs to a snapshot; those of forks are gone."""
        files = self.world.machine.files
        snapshots = self.world.daemon.store.projection.snapshots.values() if self.world.runs else ()
        assert all(snapshot.status == "ready" for snapshot in snapshots), snapshots
        kept = self.world.settings.state_dir / "snapshots"
        there = set(files.names(kept)) if files.find(kept) else set()
        assert there == {snapshot.checkpoint for snapshot in snapshots}, (there, snapshots)
        passing = [
            path
            for path in files.below(Path("/dev/shm"))
            if path.parent.name.startswith(("fork-", "snapshot-")) and kept not in path.parents
        ]
        assert not passing, f"copies of guests are left: {passing}"

    async def _check_orphans(self) -> None:
        """Checks that no process is orphaned, and that no boot slot is taken."""
        answer = await self.world.request("GET", "/api/v1/system/orphans")
        assert (answer.status, answer.json()) == (200, []), answer
        slots = self.world.daemon.vms.slots.cold.statistics()
        assert (slots["booting"], slots["waiting"]) == (0, 0), slots

    async def _check_logs(self) -> None:
        """Checks that each line of a workload is logged once and in order. A workload counts from 0 in each boot and
        each agent."""
        for row in self.world.daemon.store.projection.rows():
            answer = await self.world.request("GET", f"/api/v1/vms/{row.name}/logs?stream=stdout")
            assert answer.status == 200, answer
            last: int | None = -1
            last_seq = 0
            for line in answer.body.splitlines():
                entry = json.loads(line)
                if "gap" in entry:
                    last = None
                    continue
                assert entry["seq"] > last_seq, (entry, last_seq)
                last_seq = entry["seq"]
                found = _LINE.match(entry["line"])
                if found:
                    number = int(found[1])
                    expected = last is None or number in (0, last + 1)
                    assert expected, f"{row.name}: line {number} follows line {last}"
                    last = number

    async def _check_forks(self) -> None:
        """Checks that the fork tree has each copy that is there, with its source, and knows what is gone."""
        tree = (await self.world.request("GET", "/api/v1/forks?limit=1000")).json()
        nodes = {node["id"]: node for node in tree["nodes"]}
        edges = {edge["target"]: (edge["kind"], edge["source"]) for edge in tree["edges"]}
        assert {source for _, source in edges.values()} <= nodes.keys()
        projection = self.world.daemon.store.projection
        there, wanted = {}, {}
        for row in projection.rows():
            there[f"vm-{row.id}"] = row.status.value
            if row.origin is not None and row.origin.kind == "fork":
                wanted[f"vm-{row.id}"] = ("fork", f"vm-{row.origin.vm_id}")
            elif row.origin is not None:
                wanted[f"vm-{row.id}"] = ("restore", f"snapshot-{row.origin.snapshot_id}")
        for snapshot in projection.snapshots.values():
            there[f"snapshot-{snapshot.id}"] = snapshot.status
            wanted[f"snapshot-{snapshot.id}"] = ("snapshot", f"vm-{snapshot.vm.id}")
        assert {node: edge for node, edge in edges.items() if node in there} == wanted
        for key, node in nodes.items():
            assert node["status"] == there.get(key), node
            assert (node["deleted_at"] is None) is (key in there), node

    async def _kill_in_a_launch(self) -> None:
        """Kills the daemon, without faults, while it launches VMs that it has acknowledged. Checks that the next daemon
        carries on: no copy is lost, and no clone boots cold."""
        rng, world = self.sim.rng, self.world
        # An agent of a VM with a network may be too old to be copied.
        rows = [row for row in world.daemon.store.projection.rows() if row.lease is None]
        running = [row.name for row in rows if row.status is Status.RUNNING and not row.volumes]
        clone = {"name": "late", "cpu_cores": 1, "memory_mb": 128, "network": "none"}
        wanted = [("/api/v1/vms", clone)]
        if running:
            wanted.append((f"/api/v1/vms/{rng.choice(running)}/fork", {"names": ["late-copy"]}))
        rng.shuffle(wanted)
        for path, body in wanted:
            answer = await world.request("POST", path, body, _JSON)
            assert answer.status == 201, answer
            await trio.sleep(rng.uniform(0.0, 0.5))
            await world.kill_daemon()
            await world.start_daemon()
        for _, body in wanted:
            name = body.get("name", "late-copy")
            answer = await world.request("GET", f"/api/v1/vms/{name}?wait=running&timeout=60s")
            vm = answer.json()
            assert (vm["status"], vm["fallback"], vm["reason"]) == ("running", None, None), vm

    async def _clear_out(self) -> None:
        """Deletes everything, and checks that nothing is left on the machine."""
        for row in self.world.daemon.store.projection.rows():
            answer = await self.world.request("DELETE", f"/api/v1/vms/{row.name}")
            assert answer.status == 204, answer
        for _, name in list(self.world.daemon.store.projection.snapshots):
            answer = await self.world.request("DELETE", f"/api/v1/snapshots/{name}")
            assert answer.status == 204, answer
        for _, name in list(self.world.daemon.store.projection.secrets):
            answer = await self.world.request("DELETE", f"{SECRETS}/{name}")
            assert answer.status == 204, answer
        for _, name in list(self.world.daemon.store.projection.volumes):
            answer = await self.world.request("DELETE", f"{VOLUMES}/{name}")
            assert answer.status == 204, answer
        assert not files(self.world), "files of volumes are left"
        # A template may be being built, and a process be on its way into the pool.
        await trio.sleep(_REST_S)
        pool = self.world.daemon.vms.warm_pool.tags
        assert {qemu.tag for qemu in self.world.machine.running()} == pool
        self._check_files(set(), set())
        self._check_networks([], {})
        await self.world.stop_daemon()
        assert not self.world.machine.running(), "a clean stop leaves processes of the warm pool"
        self._check_files(set(), set())
        assert not self.world.machine.files.open_count()


class Follower:
    """Reads every event exactly once, as a client that reconnects."""

    def __init__(self, world: World, seen: Seen) -> None:
        self._world = world
        self._seen = seen
        self._last_id = ""
        self._statuses: dict[int, Status | None] = {}
        self._names: dict[int, str] = {}

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except Unreachable:
                pass
            await trio.sleep(0.2)

    async def _follow(self) -> None:
        headers = {"last-event-id": self._last_id} if self._last_id else {}
        target = "/api/v1/events/vms" + ("" if self._last_id else "?since=0")
        async with self._world.stream("GET", target, headers=headers) as stream:
            assert stream.status == 200, stream.status
            buffer = b""
            while data := await stream.receive():
                buffer += data
                *blocks, buffer = buffer.split(b"\n\n")
                for block in blocks:
                    self._take(dict(line.split(": ", 1) for line in block.decode().split("\n")))

    def _take(self, block: dict[str, str]) -> None:
        if "data" not in block:
            if "id" in block:
                assert not self._last_id or block["id"] == self._last_id, (block, self._last_id)
            return
        event = json.loads(block["data"])
        assert event["type"] != "STREAM_GAP", event
        epoch, _, seq = event["id"].rpartition("-")
        last_epoch, _, last_seq = self._last_id.rpartition("-")
        assert int(seq) == int(last_seq or 0) + 1, f"event {event['id']} follows {self._last_id}"
        assert last_epoch in ("", epoch), "another epoch"
        self._last_id = event["id"]
        self._seen.events += 1
        before = self._statuses.get(event["vm_id"])
        after = Status(event["status"]) if event["status"] else None
        if not event["type"].startswith("VM_") or event["type"] in ("VM_FORKED", "VM_RESTORED"):
            # These report no change of the status.
            assert before is after, (event, before)
            self._seen.ends += event["type"] in ("WORKLOAD_EXITED", "WORKLOAD_FAILED")
            self._seen.copies += event["type"] == "VM_RESTORED"
            return
        assert (before, after) in TRANSITIONS, f"{event['name']} went from {before} to {after}"
        self._seen.transitions.add((before, after))
        self._statuses[event["vm_id"]] = after
        self._names[event["vm_id"]] = event["name"]
        names = [self._names[vm_id] for vm_id, status in self._statuses.items() if status is not None]
        assert len(names) == len(set(names)), f"two VMs of one name: {names}"

    async def catch_up(self) -> None:
        """Waits until every event is read."""
        with trio.fail_after(60):
            while self._world.runs and self._last_id != str(self._world.daemon.store.events.newest):  # noqa: ASYNC110
                await trio.sleep(0.1)

    def check_rest(self, world: World) -> None:
        """Checks that the last event of each VM matches its row."""
        rows = world.daemon.store.projection.rows()
        assert {row.id: row.status for row in rows} == {
            vm_id: status for vm_id, status in self._statuses.items() if status is not None
        }


def owner(qemu: SimQemu) -> str:
    """Returns the owner of a process, which may have only one."""
    tag = qemu.tag.rpartition("-")[2]
    if tag.startswith("s.") and qemu.directory.parent.name == "vms":
        # A VM has claimed it from the warm pool.
        return qemu.directory.name
    return tag if tag.startswith(("s.", "t.")) else tag.partition(".")[0]


async def watch_processes(machine: Machine) -> None:
    """Checks all the time: at most one hypervisor for each VM, and each has an owner."""
    while True:
        await machine.changed.wait()
        owners = [owner(qemu) for qemu in machine.running()]
        assert len(owners) == len(set(owners)), f"two hypervisors for one VM, or for one template: {owners}"


def _builds(daemon: Any) -> bool:
    """Whether a template is being built, or waits to be."""
    builder = daemon.vms.templates.inspect()["actor"]
    # It is None while the actor starts again. One that can't be inspected has no such fields.
    return bool(builder and (builder["building"] or builder["waiting"]))


def _short(row: VmRow) -> str:
    return f"{row.name}: {row.status}/{row.phase} wanted {row.desired}, boots {row.boots}, {row.reason}"


@dataclass
class Known:
    """What an operator knows of a VM: everything that is possible after the acknowledged requests."""

    exists: set[bool] = field(default_factory=lambda: {False})
    vm_id: int | None = None
    going: bool = False
    """Its deletion was requested: that is never taken back, and may complete at any time."""


class Operator:
    """A user with VMs of their own, who makes one request at a time."""

    def __init__(
        self,
        world: World,
        rng: Random,
        names: list[str],
        network: str,
        plugins: list[str],
        seen: Seen,
        *,
        image: str | None = None,
        volumes: bool = False,
        secrets: bool = False,
    ) -> None:
        self._plugins = plugins
        self._image = image
        self._world = world
        self._rng = rng
        self._network = network
        self._known = {name: Known() for name in names}
        self._seen = seen
        self._keys = 0
        self._snapshots: list[str] = []
        """Acknowledged snapshots, oldest first."""
        self._volumes = VolumeUser(rng, names[0], self._insist) if volumes else None
        self._secrets = SecretUser(rng, names[0], self._insist) if secrets else None

    async def run(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            name = self._rng.choice(sorted(self._known))
            actions = [
                *(self._create, self._command, self._command, self._command, self._delete, self._get),
                *(self._take_snapshot, self._restore, self._fork),
            ]
            if self._volumes is not None and self._rng.random() < 0.25:
                await self._volumes.act()
            elif self._secrets is not None and self._rng.random() < 0.25:
                await self._secrets.act()
            else:
                await self._rng.choice(actions)(name)
            await trio.sleep(self._rng.expovariate(1 / 1.5))

    async def complete(self) -> None:
        """Does what answers have asked for, once there are no faults."""
        if self._volumes is not None:
            await self._volumes.complete()

    def check(self, rows: dict[str, Any], projection: Projection) -> None:
        """Checks at rest that what was acknowledged holds."""
        if self._volumes is not None:
            self._volumes.check(projection.volumes)
        if self._secrets is not None:
            self._secrets.check(projection.secrets)
        for name, known in self._known.items():
            assert (name in rows) in known.exists, f"{name} exists: {name in rows}, expected {known.exists}"
            if name in rows and known.vm_id is not None:
                assert rows[name].id == known.vm_id, f"{name} is another VM"

    async def _create(self, name: str) -> None:
        body = {
            "name": name,
            "cpu_cores": 1,
            "memory_mb": self._rng.choice([64, 128, 128, 128]),
            "boot": self._rng.choice(["auto", "auto", "auto", "cold"]),
            "restart_policy": self._rng.choice(["never", "on-failure", "always"]),
            "network": self._network,
        }
        if self._network != "none":
            body["egress"] = self._rng.choice(EGRESS)
        if self._image is not None and self._rng.random() < 0.7:
            body |= {"image": self._image, **self._rng.choice([{}, {"start_workload": False}, {"attach": True}])}
        elif len(self._plugins) > 1:
            body["plugin"] = self._rng.choice(self._plugins)
        if self._volumes is not None and self._rng.random() < 0.6:
            # One that waits for another's volume would not come to rest.
            body |= {"volumes": self._volumes.mounts(), "restart_policy": "never"}
        if self._secrets is not None and self._rng.random() < 0.8:
            # One whose agent is too old for secrets would not come to rest.
            body |= {**await self._secrets.members(), "restart_policy": "never"}
        await self._make(name, "/api/v1/vms", body)

    async def _restore(self, name: str) -> None:
        """Creates a VM from one of our snapshots, if there is one."""
        if self._snapshots:
            await self._make(name, "/api/v1/vms", {"name": name, "from_snapshot": self._rng.choice(self._snapshots)})

    async def _fork(self, name: str) -> None:
        """Creates a VM as a copy of another of ours."""
        other = self._rng.choice(sorted(self._known))
        await self._make(name, f"/api/v1/vms/{other}/fork", {"names": [name]})

    async def _take_snapshot(self, name: str) -> None:
        self._keys += 1
        snapshot = f"{name}-{self._keys}"
        headers = {**_JSON, "idempotency-key": f"snapshot-{snapshot}"}
        answer = await self._insist("POST", f"/api/v1/vms/{name}/snapshots", {"name": snapshot}, headers)
        if answer.status == 201:
            assert (answer.json()["name"], answer.json()["status"]) == (snapshot, "ready"), answer
            self._snapshots.append(snapshot)
        else:
            assert answer.status in (404, 409, 503), answer
        if len(self._snapshots) > 2:
            gone = self._snapshots.pop(0)
            answer = await self._insist("DELETE", f"/api/v1/snapshots/{gone}")
            # A deletion without an answer may have happened; a snapshot that a VM is about to use stays.
            assert answer.status in (204, 404, 409, 503), answer

    async def _make(self, name: str, path: str, body: dict[str, object]) -> None:
        known = self._known[name]
        self._keys += 1
        headers = {**_JSON, "idempotency-key": f"{name}-{self._keys}"}
        may_lack = "cpu_cores" not in body or not body.keys().isdisjoint(("volumes", "env", "secrets"))
        before = set(known.exists)
        known.exists = {True} if before == {True} else {True, False}
        # Repeated requests with the same key are executed once, whatever happens in between.
        answer = await self._insist("POST", path, body, headers)
        if answer.status == 201:
            assert before != {True}, f"{name} was made twice"
            made = answer.json()[0] if path.endswith("/fork") else answer.json()
            known.exists, known.vm_id, known.going = {True}, made["id"], False
            if made["plugin"] == BRIEF:
                known.exists, known.going = {True, False}, True
            self._seen.acknowledged += 1
        elif may_lack and answer.status in (404, 409):
            # What to copy or to mount is not there, or in no state for it; nothing says whether the name was taken.
            assert answer.json()["type"] != "urn:volant:error:vm-deleting", answer
            known.exists = before if not known.going else {True, False} if True in before else before
        elif answer.status == 409:
            assert True in before, f"{name} can't be made, and is not there: {answer}"
            known.exists = {True, False} if known.going else {True}
        else:
            # It may have been created, or be created later; the VM before it may be gone meanwhile.
            assert answer.status == 503, answer
            if known.going:
                known.vm_id = None

    async def _command(self, name: str) -> None:
        command = self._rng.choice(["start", "stop", "restart", "recover", "stop?grace=1s", "pause", "pause", "resume"])
        answer = await self._insist("POST", f"/api/v1/vms/{name}/{command}")
        self._exists_if(name, answer, {200, 409})

    async def _delete(self, name: str) -> None:
        known = self._known[name]
        before = set(known.exists)
        known.exists = {True, False} if True in before else {False}
        known.going = True
        answer = await self._insist("DELETE", f"/api/v1/vms/{name}")
        if answer.status == 204:
            assert True in before, f"{name} was deleted, and was not there"
            known.exists, known.vm_id, known.going = {False}, None, False
            self._seen.acknowledged += 1
        elif answer.status == 404:
            # Perhaps deleted by a request without an answer.
            known.exists, known.vm_id, known.going = {False}, None, False
        else:
            assert answer.status == 503, answer

    async def _get(self, name: str) -> None:
        self._exists_if(name, await self._insist("GET", f"/api/v1/vms/{name}"), {200})

    def _exists_if(self, name: str, answer: Answer, statuses: set[int]) -> None:
        known = self._known[name]
        if answer.status in statuses:
            assert True in known.exists, f"{name} is there, and should not be: {answer}"
            if answer.status == 200 and known.vm_id is not None:
                assert answer.json()["id"] == known.vm_id
        elif answer.status == 404:
            assert False in known.exists, f"{name} is gone, and was not deleted"
        else:
            assert answer.status == 503, answer

    async def _insist(
        self, method: str, target: str, body: object = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Repeats a request until there is an answer, as a client does whose connection breaks."""
        for _ in range(_ATTEMPTS):
            try:
                return await self._world.request(method, target, body, headers)
            except Unreachable:
                await trio.sleep(self._rng.uniform(0.1, 2.0))
        raise AssertionError(f"{method} {target} was never answered")
