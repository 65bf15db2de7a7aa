"""A daemon that is killed during a template's build leaves nothing half-built to the next one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import World, simulated_world
from tests.simulation.kit import JSON
from volant.model.agent import DAEMON_SETTLE, DAEMON_WORKLOAD, IDENTITY_NETWORK_SINCE

MOMENTS_S = (0.0, 0.005, 0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0)
"""From the launch of the build's machine to its trial and beyond, a little later with each seed."""


async def create(world: World, name: str) -> Any:
    body = {"name": name, "cpu_cores": 1, "memory_mb": 128}
    assert (await world.request("POST", "/api/v1/vms", body, JSON)).status == 201
    answer = await world.request("GET", f"/api/v1/vms/{name}?wait=running&timeout=5m")
    assert answer.json()["status"] == "running", answer.body
    return answer.json()


def builds(world: World) -> list[str]:
    return [qemu.tag for qemu in world.machine.running() if "-t." in qemu.tag]


def halves(world: World) -> list[str]:
    """What lies about of a build."""
    files, settings = world.machine.files, world.settings
    left = [str(path) for path in files.below(Path("/dev/shm")) if path.name.startswith("template-")]
    for directory in (settings.state_dir / "templates", settings.runtime_dir / "templates"):
        names = files.names(directory) if files.find(directory) else []
        left += [name for name in names if not files.find(directory / name / "template.json")]
    return left


@pytest.mark.parametrize("moment_s", MOMENTS_S)
def test_a_killed_daemon_leaves_no_half_built_template(tmp_path: Path, moment_s: float) -> None:
    killed = 0

    async def main(sim: Simulation) -> None:
        nonlocal killed
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            await world.start_daemon()
            await create(world, "first")
            with trio.fail_after(60):
                while not builds(world):  # noqa: ASYNC110
                    await trio.sleep(0.001)
            await trio.sleep(moment_s)
            killed += bool(halves(world))
            await world.kill_daemon()
            await world.start_daemon()
            await trio.sleep(30)
            assert not builds(world)
            assert not halves(world)
            # And the next of its kind is none the worse for it.
            await create(world, "second")
            await trio.sleep(60)
            third = await create(world, "third")
            assert (third["booted_from"], third["fallback"]) == ("template", None)

    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed)
    assert killed or moment_s > 1.0, "it was over too early"


@pytest.mark.parametrize("network", ["none", "bridge"])
def test_defaults_of_templates_and_of_vms_fit(tmp_path: Path, network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Guests that are new enough to receive the settings of a network.
    monkeypatch.setattr("tests.simulated.guest.PROTOCOL_MIN", IDENTITY_NETWORK_SINCE)

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            world.settings = msgspec.structs.replace(world.settings, network=network)
            await world.start_daemon()
            body = {"cpu_cores": 1, "memory_mb": 128}
            made = await world.request("POST", "/api/v1/templates", body, JSON)
            assert made.status == 201, made.body
            vm = await create(world, "first")
            assert (vm["network"], vm["booted_from"]) == (network, "template"), vm
            other = "none" if network == "bridge" else "bridge"
            made = await world.request("POST", "/api/v1/templates", {**body, "network": other}, JSON)
            assert made.status == 201, made.body
            listed = await world.request("GET", "/api/v1/templates")
            assert len(listed.json()) == 2

    simulate(main, seed=4)


def test_a_template_is_made_of_a_healthy_workload_and_its_copies_are_signalled(tmp_path: Path) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            world.machine.has_new_agents = True
            await world.start_daemon()
            workload = {"entrypoint": ["server"]}
            manifest = {"name": "site", "workload": workload, "template": {"after": "workload", "signal": "SIGUSR1"}}
            assert (await world.request("POST", "/api/v1/plugins", manifest, JSON)).status == 201
            body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "plugin": "site", "boot": "template"}
            assert (await world.request("POST", "/api/v1/vms", body, JSON)).status == 201
            while not builds(world):
                await world.machine.changed.wait()
            [building] = world.machine.running()
            guest = building.guest
            guest.is_healthy = False
            with trio.fail_after(60):
                while guest.served["GET", DAEMON_WORKLOAD] < 5:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert guest.workload["entrypoint"] == workload["entrypoint"]
            assert (guest.served["POST", DAEMON_SETTLE], building.status) == (0, "running"), "it is copied already"
            guest.is_healthy = True
            vm = (await world.request("GET", "/api/v1/vms/demo?wait=ready&timeout=5m")).json()
            assert (vm["status"], vm["booted_from"], vm["workload"]["state"]) == ("running", "template", "healthy")
            assert (guest.served["POST", DAEMON_SETTLE], guest.signals) == (1, [])
            [copy] = world.machine.running()
            assert copy.guest.signals == ["SIGUSR1"]

    simulate(main, seed=4)


def test_a_build_counts_as_the_creation_of_a_vm(tmp_path: Path) -> None:
    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            await world.start_daemon()

            async def build(**body: Any) -> tuple[int, str]:
                answer = await world.request("POST", "/api/v1/templates", {"cpu_cores": 1, **body}, JSON)
                return answer.status, str(answer.json().get("type", "")).rpartition(":")[2]

            quota = {"memory_mb": 192, "creates_per_minute": 2}
            assert (await world.request("PUT", "/api/v1/projects/default/quota", quota, JSON)).status == 200
            assert await build(memory_mb=193) == (409, "quota-exceeded")
            assert await build(memory_mb=128) == (201, "")
            # One that is there is not built.
            assert await build(memory_mb=128) == (201, "")
            assert await build(memory_mb=192) == (201, "")
            assert await build(memory_mb=160) == (429, "too-many-creates")
            await trio.sleep(61)
            assert await build(memory_mb=160) == (201, "")

    simulate(main, seed=5)
