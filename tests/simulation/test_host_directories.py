"""A VM with a directory of the host has one virtiofsd, whatever is killed when, and no VM none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulated.virtiofsd import SimVirtiofsd
from tests.simulation.kit import JSON, VMS
from tests.simulation.test_kills_in_a_launch import COLD_BOOT_S, MOMENTS_S, wait_running
from volant.model.agent import VOLUMES_SINCE

SHARED = Path("/srv/data")
NEW = {"name": "one", "cpu_cores": 1, "memory_mb": 64, "volumes": [f"{SHARED}:/data", f"{SHARED}/in:/in"]}


@pytest.fixture(autouse=True)
def _new_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.simulated.guest.PROTOCOL_MIN", VOLUMES_SINCE)


def run(directory: Path, story: Callable[[World], Awaitable[None]], seed: int, **faults: float) -> None:
    """Runs a story on a simulated machine whose daemon lets VMs have `SHARED`."""

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, directory) as world:
            world.settings = msgspec.structs.replace(world.settings, host_dirs=str(SHARED))
            world.machine.files.mkdir(SHARED / "in")
            await world.start_daemon()
            await story(world)

    chances = {name.replace("__", "."): chance for name, chance in faults.items()}
    simulate(main, seed=seed, faults=chances)


def virtiofsds(world: World) -> list[SimVirtiofsd]:
    return [each for each in world.machine.virtiofsds.values() if each.process.alive]


async def create(world: World, **fields: object) -> Any:
    return (await world.request("POST", f"{VMS}?wait=running,crashed", {**NEW, **fields}, JSON)).json()


async def none_is_left(world: World) -> None:
    directory, files = world.settings.runtime_dir / "directories", world.machine.files
    with trio.fail_after(60):
        while virtiofsds(world) or set(files.names(directory)) - {"empty"}:  # noqa: ASYNC110 - nothing tells
            await trio.sleep(0.1)
    assert world.machine.inherited == {}


async def reasons_until(world: World, is_due: Callable[[Any], bool]) -> set[str]:
    """Looks at the VM until it is as it should be, and returns the codes of its reasons meanwhile."""
    codes = set()
    with trio.fail_after(120):
        while True:
            vm = (await world.request("GET", f"{VMS}/one")).json()
            if vm["reason"] is not None:
                codes.add(vm["reason"]["code"])
            if is_due(vm):
                return codes
            await trio.sleep(0.01)


def test_whenever_the_daemon_is_killed_each_directory_has_one_virtiofsd(tmp_path: Path) -> None:
    moments_s = MOMENTS_S[::2]

    async def story(world: World) -> None:
        answer = await world.request("POST", VMS, NEW, JSON)
        assert answer.status == 201, answer.body
        await trio.sleep(moments_s[seed])
        await world.kill_daemon()
        await world.start_daemon()
        vm = await wait_running(world, "one", COLD_BOOT_S)
        assert (vm["status"], vm["booted_from"]) == ("running", "cold"), (moments_s[seed], vm)
        kept = virtiofsds(world)
        assert len(kept) == 2
        [qemu] = world.machine.running()
        assert [(each["tag"], each["path"], each["read_only"]) for each in qemu.guest.volumes] == [
            ("directory0", "/data", True),
            ("directory1", "/in", True),
        ]
        await world.kill_daemon()
        await world.start_daemon()
        await trio.sleep(30)
        assert virtiofsds(world) == kept
        await world.request("DELETE", f"{VMS}/one")
        await none_is_left(world)

    for seed in range(len(moments_s)):
        (tmp_path / str(seed)).mkdir()
        run(tmp_path / str(seed), story, seed)


@pytest.mark.parametrize("daemon_runs", [True, False])
def test_a_vm_that_loses_a_directory_crashes_with_the_reason_and_starts_again(
    tmp_path: Path, daemon_runs: bool
) -> None:
    async def story(world: World) -> None:
        assert (await create(world, restart_policy="on-failure"))["status"] == "running"
        lost = virtiofsds(world)[1]
        if not daemon_runs:
            await world.kill_daemon()
        lost.process.end(-9)
        if not daemon_runs:
            await world.start_daemon()
        codes = await reasons_until(world, lambda vm: vm["restarts"] == 1 and vm["status"] == "running")
        assert codes == {"host_directory_lost"}
        assert len(virtiofsds(world)) == 2

    run(tmp_path, story, seed=5)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("virtiofsd__exits_at_start", "has ended with status 1; its last output: Error opening"),
        ("virtiofsd__hangs_at_start", "does not answer"),
        ("process__does_not_start", "can't be started"),
    ],
)
def test_a_virtiofsd_that_does_not_start_fails_the_boot_with_a_reason(tmp_path: Path, fault: str, why: str) -> None:
    async def story(world: World) -> None:
        vm = await create(world)
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "virtiofsd_failed"), vm["reason"]
        assert why in vm["reason"]["message"]
        await none_is_left(world)

    run(tmp_path, story, seed=3, **{fault: 1.0})


def test_a_directory_that_is_gone_or_hangs_is_said_at_once_and_at_the_next_boot(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vm = await create(world, restart_policy="always")
        assert vm["status"] == "running"
        world.machine.files.remove_tree(SHARED / "in")
        [qemu] = world.machine.running()
        qemu.process.end(-9)
        await reasons_until(world, lambda vm: vm["reason"] and vm["reason"]["code"] == "host_directory_missing")
        await none_is_left(world)
        answer = await world.request("POST", VMS, {**NEW, "name": "two"}, JSON)
        assert (answer.status, answer.json()["type"].rpartition(":")[2]) == (409, "host-directory-missing")

    run(tmp_path, story, seed=1)
