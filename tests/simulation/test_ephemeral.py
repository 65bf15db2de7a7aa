"""An ephemeral daemon deletes its VMs as it stops: those too that are created around that moment."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import trio

from actors.testing import Simulation, simulate
from tests.simulated import Unreachable, World, simulated_world
from tests.simulation.kit import JSON, VMS
from volant.daemon._directories import disk_dir, memory_dir

SEEDS = 5
MOMENTS = 12
STEP_S = 0.001
"""Between two moments after a request is sent. It takes some 0.01 s."""
CREATES = 12
STOP_AT_S = 0.03


def files_of_vms(world: World) -> list[Path]:
    """What there is of VMs, besides the directories that they share: the daemon's process removes these at its end."""
    files, settings = world.machine.files, world.settings
    shared = {memory_dir(settings), disk_dir(settings), settings.runtime_dir / "vms"}
    roots = [directory for directory in shared if files.find(directory)]
    return [path for root in roots for path in files.below(root)]


async def create(world: World, body: dict[str, str], answers: Counter[int | None], after_s: float = 0.0) -> None:
    """Creates a VM after some time. None counts as the answer if the daemon ended before it answered."""
    await trio.sleep(after_s)
    try:
        answer = await world.request("POST", VMS, {"cpu_cores": 1, "memory_mb": 64, **body}, JSON)
        answers[answer.status] += 1
    except Unreachable:
        answers[None] += 1


def test_vms_that_are_created_while_the_daemon_stops_leave_no_process_and_no_file(tmp_path: Path) -> None:
    answers = Counter[int | None]()

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            world.settings = msgspec.structs.replace(world.settings, ephemeral=True)
            world.machine.registry.push("app")
            await world.start_daemon()
            store = world.daemon.store

            async with trio.open_nursery() as nursery:
                # Has processes and a disk when the daemon stops.
                await create(world, {"name": "first", "image": "app"}, answers)
                while not world.machine.running():
                    await world.machine.changed.wait()
                for number in range(CREATES):
                    body = {"name": f"vm{number}", "image": "app"}
                    nursery.start_soon(create, world, body, answers, sim.rng.uniform(0.0, 2 * STOP_AT_S))
                await trio.sleep(STOP_AT_S)
                assert world.machine.running()
                assert files_of_vms(world)
                await world.stop_daemon()
            assert not store.projection.rows()
            assert not world.machine.living()
            assert not files_of_vms(world)

    for seed in range(SEEDS):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed)
    assert set(answers) <= {201, 503, None}, answers
    assert answers[201] > SEEDS, "nothing was created but the first"
    assert answers[503], "no request came while the daemon stopped"


def test_a_vm_that_is_being_made_as_the_daemon_stops_is_deleted(tmp_path: Path) -> None:
    """There is no other VM whose end the daemon would wait for."""
    answers = Counter[int | None]()

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            world.settings = msgspec.structs.replace(world.settings, ephemeral=True)
            await world.start_daemon()
            store = world.daemon.store
            async with trio.open_nursery() as nursery:
                nursery.start_soon(create, world, {"name": "vm"}, answers)
                await trio.sleep(sim.seed * STEP_S)
                await world.stop_daemon()
            assert not store.projection.rows()
            assert not world.machine.living()
            assert not files_of_vms(world)

    for seed in range(MOMENTS):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed)
    assert answers[201], answers
    assert set(answers) <= {201, 503, None}, answers
