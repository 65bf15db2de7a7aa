"""Backups, restores and prunes among faults: after any kill there is the old database or the new one, no VM runs twice,
and no backup is left over."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import apsw
import trio

from actors.testing import Simulation, allow_real, simulate
from tests.simulated import Unreachable, World, simulated_world
from tests.simulation.kit import JSON
from tests.simulation.scenario import owner, watch_processes
from volant.model import Problem, settled

SYSTEM = "/api/v1/system"
FAULTS = {"database.fails": 0.02, "disk.full": 0.005, "qemu.dies": 0.02, "guest.powers_off": 0.02, "agent.slow": 0.02}


class BackupScenario:
    """VMs come and go, backups are taken, and some are restored, while the daemon and the power fail."""

    def __init__(self, sim: Simulation, world: World, directory: Path) -> None:
        self.sim = sim
        self.world = world
        self.rng = Random(sim.rng.getrandbits(64))
        self.directory = directory
        self.backup = b""
        self.restores = 0

    async def run(self) -> None:
        await self.world.start_daemon()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_processes, self.world.machine)
            for _ in range(30):
                await self.rng.choice([self._make, self._make, self._take, self._restore, self._prune, self._change])()
                await self._revive()
                await trio.sleep(self.rng.expovariate(1 / 3.0))
            self.sim.faults.turn_off()
            await self._revive()
            await self._come_to_rest()
            nursery.cancel_scope.cancel()

    async def _ask(self, method: str, path: str, body: object = None, *, may_die: bool = True) -> Any:
        """Returns the answer; None when the daemon died before it."""
        answer: Any = None
        async with trio.open_nursery() as nursery:
            if may_die and self.rng.random() < 0.3:
                nursery.start_soon(self._kill_soon, nursery.cancel_scope)
            try:
                answer = await self.world.request(method, path, body, JSON)
            except Unreachable:
                pass
            nursery.cancel_scope.cancel()
        assert answer is None or answer.status != 500, answer
        return answer

    async def _kill_soon(self, scope: trio.CancelScope) -> None:
        await trio.sleep(self.rng.uniform(0.0, 0.02))
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):
            if self.world.runs:
                await (self.world.power_cut if self.rng.random() < 0.3 else self.world.kill_daemon)()
        scope.cancel()

    async def _revive(self) -> None:
        """As systemd does."""
        world = self.world
        for _ in range(20):
            if world.runs:
                return
            try:
                await world.start_daemon()
            except (OSError, apsw.Error):
                await trio.sleep(1.0)
        raise AssertionError("the daemon does not start")

    async def _make(self) -> None:
        body = {"name": f"vm-{self.rng.randrange(4)}", "cpu_cores": 1, "memory_mb": 128, "restart_policy": "always"}
        await self._ask("POST", "/api/v1/vms", body)

    async def _change(self) -> None:
        name = f"vm-{self.rng.randrange(4)}"
        if self.rng.random() < 0.5:
            await self._ask("DELETE", f"/api/v1/vms/{name}")
        else:
            await self._ask("POST", f"/api/v1/vms/{name}/{self.rng.choice(['stop', 'start', 'restart'])}")

    async def _take(self) -> None:
        answer = await self._ask("POST", f"{SYSTEM}/backup")
        if answer is not None and answer.status == 200:
            self.backup = answer.body
            path = self.directory / "taken.db"
            with allow_real("files"):
                path.write_bytes(answer.body)
                connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs="unix")
                assert connection.pragma("integrity_check") == "ok"
                connection.close()

    async def _restore(self) -> None:
        """While no daemon runs."""
        if not self.backup:
            return
        world = self.world
        rows = world.daemon.store.projection.rows()
        before, last_id = world.daemon.store.projection.last_event.epoch, max((row.id for row in rows), default=0)
        await self.rng.choice([world.stop_daemon, world.kill_daemon, world.power_cut])()
        file = self.directory / "restored.db"
        with allow_real("files"):
            file.write_bytes(self.backup)
        restored = None
        try:
            restored = await world.restore(file)
        except Problem as problem:
            if problem.status != 409:
                raise
        except (OSError, apsw.Error):
            pass
        await self._revive()
        after = world.daemon.store.projection.last_event.epoch
        if restored is None:
            assert after == before
            return
        assert after == restored != before
        self.restores += 1
        new = {"name": f"new-{after}", "cpu_cores": 1, "memory_mb": 128}
        made = await self._ask("POST", "/api/v1/vms", new, may_die=False)
        if made is not None and made.status == 201:
            assert made.json()["id"] > last_id

    async def _prune(self) -> None:
        answer = await self._ask("POST", f"{SYSTEM}/prune?kind=log,leftover,disk,database")
        assert answer is None or answer.status in (200, 503), answer

    async def _come_to_rest(self) -> None:
        """Nobody runs without a row, as no VM was let go with `replace`; everything is what it should be."""
        world = self.world
        deadline = trio.current_time() + 900
        while restless := [row for row in world.daemon.store.projection.rows() if not settled(row)]:
            assert trio.current_time() < deadline, restless
            for row in restless:
                if row.reason is not None and row.reason.code == "control_lost":
                    await world.request("POST", f"/api/v1/vms/{row.name}/recover")
            await trio.sleep(1.0)
        owned = {row.tag for row in world.daemon.store.projection.rows() if row.tag}
        # The daemon's own processes are those of the warm pool and of template builds.
        assert {qemu.tag for qemu in world.machine.running() if owner(qemu)[:2] not in ("s.", "t.")} == owned
        with allow_real("files"):
            left = [path.name for path in world.settings.state_dir.glob("volant-*.db")]
        assert all(name.startswith("volant-before-") for name in left), left


def run_seed(seed: int, directory: Path, ends: list[tuple[float, int]] | None = None) -> int:
    """Makes one simulation run, and returns how many backups were restored."""
    restores = 0
    state, beside = directory / "state", directory / "beside"
    state.mkdir(parents=True)
    beside.mkdir()

    async def main(sim: Simulation) -> None:
        nonlocal restores
        async with simulated_world(sim, state) as world:
            scenario = BackupScenario(sim, world, beside)
            await scenario.run()
            restores = scenario.restores
            if ends is not None:
                ends.append((trio.current_time(), sim.steps))

    simulate(main, seed=seed, faults=FAULTS, limit_steps=5_000_000)
    return restores


def test_restores_among_faults(tmp_path: Path) -> None:
    assert sum(run_seed(seed, tmp_path / str(seed)) for seed in (0, 6, 16, 29)) > 4


def test_seed_8_a_vm_created_while_the_daemon_starts_keeps_its_log(tmp_path: Path) -> None:
    run_seed(8, tmp_path)


def test_seed_14_a_vm_whose_first_step_was_not_saved_continues_by_itself(tmp_path: Path) -> None:
    run_seed(14, tmp_path)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    stories = []
    for name in ("one", "two"):
        ends: list[tuple[float, int]] = []
        run_seed(3, tmp_path / name, ends)
        stories.append(ends)
    assert stories[0] == stories[1]
