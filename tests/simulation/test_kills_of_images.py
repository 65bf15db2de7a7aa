"""A hundred kills of the daemon around images and volumes: in a pull, in a conversion, in the build of a template, in a
first boot, as a volume is attached, and as one grows. Nothing leaks, and no half of anything is used.

`tests/system/test_kill_during_images.py` does the same on a real host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from actors.testing import Simulation, simulate
from tests.names import named
from tests.simulated import Unreachable, World, simulated_world
from tests.simulation.kit import JSON, VMS
from tests.simulation.test_templates import builds, halves
from tests.simulation.test_volumes import insist, make
from tests.simulation.volume_user import VOLUMES, files, settled
from tests.system.kit import load
from volant.model import Phase, Status
from volant.model.agent import VOLUMES_SINCE

ROUNDS = load("VOLANT_TEST_IMAGE_ROUNDS", usual=30, full=100)
IMAGE = "app"
PHASES = ("pull", "conversion", "template", "first boot", "attach", "grow")
"""That of a round is chosen by its number."""
STEP_S = 0.0007
"""Between looks. Each step of the daemon takes some milliseconds."""


@pytest.fixture(autouse=True)
def _new_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulated.guest.PROTOCOL_MIN", VOLUMES_SINCE)


def unfinished(world: World) -> set[str]:
    """The names of the files of a fetch in progress."""
    work = world.settings.cache_dir / "oci" / "work"
    return {path.name for path in world.machine.files.below(work)}


def has_image(world: World) -> bool:
    return any(path.name == "metadata.erofs" for path in world.machine.files.below(world.settings.cache_dir / "oci"))


def is_in(world: World, phase: str, *, requested: bool) -> bool:
    """Whether the daemon is in a phase now."""
    rows = world.daemon.store.projection.rows()
    row = rows[0] if rows else None
    if phase == "pull":
        return "blob" in unfinished(world)
    if phase == "conversion":
        return "layer.unfinished" in unfinished(world)
    if phase == "template":
        return bool(halves(world)) and bool(builds(world))
    if phase == "grow":
        return requested and bool(world.daemon.store.projection.volumes[named("data")].size_mb == 128)
    return row is not None and row.status is Status.STARTING and row.phase in (Phase.LAUNCH, Phase.AGENT)


async def prepare(world: World, phase: str) -> tuple[str, str, dict[str, object]]:
    """Brings a world to where the request that it returns leads into the phase."""
    registry = world.machine.registry
    body: dict[str, object] = {"name": "vm", "cpu_cores": 1, "memory_mb": 128, "boot": "cold", "image": IMAGE}
    digest = registry.push(IMAGE)
    if phase not in ("pull", "conversion"):
        await world.daemon.oci.obtain_digest(digest, IMAGE, "default")
    if phase in ("attach", "grow"):
        await make(world)
        body["volumes"] = ["data:/d"]
    if phase == "template":
        body["boot"] = "template"
    if phase == "grow":
        answer = await world.request("POST", f"{VMS}?wait=running", body, JSON)
        assert answer.json()["status"] == "running", answer.body
        return "POST", f"{VOLUMES}/data/resize", {"size_mb": 128}
    return "POST", VMS, body


@pytest.mark.slow
def test_a_hundred_kills_leave_nothing(tmp_path: Path) -> None:
    killed = Counter[str]()

    async def main(sim: Simulation) -> None:
        phase = PHASES[sim.seed % len(PHASES)]
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            await world.start_daemon()
            method, target, body = await prepare(world, phase)
            requested = False

            async def request() -> None:
                nonlocal requested
                requested = True
                try:
                    await world.request(method, target, body, {**JSON, "idempotency-key": "once"})
                except Unreachable:
                    pass

            def now() -> bool:
                return is_in(world, phase, requested=requested)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(request)
                await until(now)
                # At any moment in it.
                for _ in range(sim.rng.choice([0, 1, 5, 20, 100, 500])):
                    await trio.sleep(STEP_S)
                    if not now():
                        break
                killed[phase if now() else f"after {phase}"] += 1
                await world.kill_daemon()
            was_whole = has_image(world)
            await world.start_daemon()
            answer = await insist(world, method, target, body, "once")
            assert answer.status in (200, 201), answer.body
            answer = await world.request("GET", f"{VMS}/vm?wait=running,crashed&timeout=10m")
            vm = answer.json()
            assert (vm["status"], vm["reason"]) == ("running", None), (phase, vm["status"], vm["reason"])
            assert world.machine.registry.pulls == (1 if was_whole else 2)
            await check(world, phase)

    for seed in range(ROUNDS):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={}, limit_s=86_400.0, limit_steps=20_000_000)
    print(dict(killed))
    # Most are in the phase, not after it.
    assert all(killed[phase] > ROUNDS // len(PHASES) // 2 for phase in PHASES), killed


async def check(world: World, phase: str) -> None:
    """Checks that exactly the VM is there, with its files and its volume; then that nothing is left of it."""
    there, settings, daemon = world.machine.files, world.settings, world.daemon
    await until(lambda: not builds(world) and not halves(world))
    [row] = daemon.store.projection.rows()
    pool = daemon.vms.warm_pool.tags
    assert {qemu.tag for qemu in world.machine.running()} == {row.tag} | pool
    assert there.names(settings.runtime_dir / "vms") == [str(row.id)]
    assert len(daemon.store.projection.volumes) == len(files(world)) == (phase in ("attach", "grow"))
    await settled(world)
    if phase in ("attach", "grow"):
        [qemu] = [each for each in world.machine.running() if each.tag == row.tag]
        await until(lambda: bool(qemu.guest.volumes))
        assert [each["path"] for each in qemu.guest.volumes] == ["/d"]
        if phase == "grow":
            # QEMU had the new size before the kill, or the next daemon has sent it.
            await until(lambda: qemu.resized.get("volume0") == 128 * 2**20)
    assert (await insist(world, "DELETE", f"{VMS}/vm")).status == 204
    for _, name in list(daemon.store.projection.volumes):
        assert (await insist(world, "DELETE", f"{VOLUMES}/{name}")).status == 204
    await world.stop_daemon()
    assert not world.machine.running()
    assert not there.names(settings.runtime_dir / "vms")
    assert not files(world)
    assert not there.open_count()


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(600):
        while not holds():  # noqa: ASYNC110 - nothing tells
            await trio.sleep(STEP_S)
