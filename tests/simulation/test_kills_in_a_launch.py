"""The daemon is killed at any moment of a launch, and the next daemon continues at once.

The hypervisor outlives the daemon: it may wait for a state, be loading it, or have loaded it and wait for `cont`, and
its guest may have its identity or not. None of that is a reason to boot cold, to remove the template or to lose a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulation.kit import JSON, VMS

MOMENTS_S = [step * 0.015 for step in range(30)]
"""After the answer. A launch is over after some 0.4 s at most."""
SOON_S = 5.0
"""What the next daemon may take, on a host that is idle: some times what a whole launch takes."""
COLD_BOOT_S = 15.0
NEW = {"name": "new", "cpu_cores": 1, "memory_mb": 128}


async def wait_running(world: World, name: str, timeout_s: float) -> Any:
    answer = await world.request("GET", f"{VMS}/{name}?wait=running&timeout={timeout_s:g}s")
    assert answer.status == 200, answer.body
    return answer.json()


async def make(world: World, kind: str) -> None:
    """Ask for the VM `new`, which is 201."""
    match kind:
        case "clone" | "standby":
            answer = await world.request("POST", VMS, NEW, JSON)
        case "cold":
            answer = await world.request("POST", VMS, {**NEW, "boot": "cold"}, JSON)
        case "fork":
            answer = await world.request("POST", f"{VMS}/first/fork", {"names": ["new"]}, JSON)
        case _:
            answer = await world.request("POST", VMS, {"name": "new", "from_snapshot": "warm"}, JSON)
    assert answer.status == 201, answer.body


@pytest.mark.parametrize(
    ("kind", "booted_from"),
    [("clone", "template"), ("standby", "template"), ("fork", "fork"), ("restore", "snapshot"), ("cold", "cold")],
)
def test_the_next_daemon_continues_a_launch_at_once(tmp_path: Path, kind: str, booted_from: str) -> None:
    found_in: set[str] = set()

    async def main(sim: Simulation) -> None:
        moment_s = MOMENTS_S[sim.seed % len(MOMENTS_S)]
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            world.settings = msgspec.structs.replace(world.settings, standby=1 if kind == "standby" else 0)
            await world.start_daemon()
            await world.request("POST", VMS, {**NEW, "name": "first"}, JSON)
            assert (await wait_running(world, "first", 60))["status"] == "running"
            await world.request("POST", "/api/v1/templates", {"cpu_cores": 1, "memory_mb": 128}, JSON)
            if kind == "standby":
                # The pool has its first process once a VM was made of the template.
                await world.request("POST", VMS, {**NEW, "name": "second"}, JSON)
                await trio.sleep(20)
                assert world.daemon.vms.warm_pool.tags
            if kind == "restore":
                answer = await world.request("POST", f"{VMS}/first/snapshots", {"name": "warm"}, JSON)
                assert answer.status == 201, answer.body
            before = {qemu.process.identity for qemu in world.machine.running()}
            templates = (await world.request("GET", "/api/v1/templates")).json()
            assert [each["state"] for each in templates] == ["ready"]

            await make(world, kind)
            await trio.sleep(moment_s)
            await world.kill_daemon()
            launched = [qemu for qemu in world.machine.running() if qemu.process.identity not in before]
            found_in.update(qemu.status for qemu in launched)
            await world.start_daemon()

            vm = await wait_running(world, "new", COLD_BOOT_S if kind == "cold" else SOON_S)
            assert vm["status"] == "running", (moment_s, [qemu.status for qemu in launched], vm)
            assert (vm["booted_from"], vm["fallback"], vm["reason"]) == (booted_from, None, None), (moment_s, vm)
            [qemu] = [one for one in world.machine.running() if one.process.identity.pid == vm["pid"]]
            assert (qemu.status, qemu.guest.is_copy) == ("running", False)
            if launched and kind != "standby":
                assert vm["pid"] in {one.process.identity.pid for one in launched}, "it began anew"
            await trio.sleep(60)
            templates = (await world.request("GET", "/api/v1/templates")).json()
            assert [(each["state"], each["error"]) for each in templates] == [("ready", None)], moment_s

    for seed in range(len(MOMENTS_S)):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={})
    if kind in ("clone", "restore", "fork"):
        # Else the moments have missed what this is about.
        assert found_in >= {"inmigrate", "running"}, found_in


def test_a_clone_costs_three_commits(tmp_path: Path) -> None:
    """The row with its answer; its process tag; and the process with the agent's answer."""

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            world.settings = msgspec.structs.replace(world.settings, standby=0)
            await world.start_daemon()
            await world.request("POST", "/api/v1/templates", {"cpu_cores": 1, "memory_mb": 128}, JSON)
            commits = world.daemon.store.figures.commits
            (_, before) = commits.cumulative()[-1]
            await make(world, "clone")
            assert commits.cumulative()[-1][1] == before + 1
            await wait_running(world, "new", SOON_S)
            await trio.sleep(60)
            assert commits.cumulative()[-1][1] == before + 3

    simulate(main, seed=1, faults={})
