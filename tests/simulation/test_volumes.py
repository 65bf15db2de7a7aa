"""Volumes whose daemon is killed at any moment: whole or gone, never with two writers, never formatted twice.

The simulated `mke2fs` fails a test that formats a file with content.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio

from actors.testing import Simulation, simulate
from tests.simulated import Answer, Unreachable, World, simulated_world
from tests.simulation.kit import JSON, VMS, run_story
from tests.simulation.volume_user import VOLUMES, files, settled, watch_writers

MOMENTS = 20
STEP_S, RESTORE_STEP_S = 0.004, 0.0015
"""Between two moments after a request is sent. Each is over after some 0.06 s, a restore after 0.02 s."""
TROUBLE_S = 90.0


async def insist(world: World, method: str, target: str, body: object = None, key: str = "") -> Answer:
    """Repeats a request until there is an answer."""
    headers = {**JSON, "idempotency-key": key} if key else JSON
    with trio.fail_after(600):
        while True:
            try:
                answer = await world.request(method, target, body, headers)
                if answer.status != 503:
                    return answer
            except Unreachable:
                pass
            await trio.sleep(0.1)


async def make(world: World, name: str = "data") -> None:
    answer = await insist(world, "POST", VOLUMES, {"name": name, "size_mb": 64}, f"make-{name}")
    assert answer.status == 201, answer.body


REQUESTS = {
    "create": ("POST", VOLUMES, {"name": "new", "size_mb": 64}),
    "clone": ("POST", f"{VOLUMES}/data/clone", {"name": "new"}),
    "resize": ("POST", f"{VOLUMES}/data/resize", {"size_mb": 128}),
    "delete": ("DELETE", f"{VOLUMES}/data", None),
    # Of a snapshot whose VM writes to the volume.
    "restore": ("POST", VMS, {"name": "new", "from_snapshot": "then"}),
}
VOLUMES_AFTER = {
    "create": {"data", "new"},
    "clone": {"data", "new"},
    "resize": {"data"},
    "delete": set[str](),
    "restore": {"data", "new-data"},
}


async def make_snapshot(world: World) -> None:
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, "volumes": ["data:/d"]}
    assert (await world.request("POST", f"{VMS}?wait=running", body, JSON)).json()["status"] == "running"
    taken = await world.request("POST", f"{VMS}/demo/snapshots", {"name": "then", "volumes": True}, JSON)
    assert taken.status == 201, taken.body


@pytest.mark.parametrize("what", REQUESTS)
def test_a_change_is_whole_or_repeated_after_a_kill(tmp_path: Path, what: str) -> None:
    method, target, body = REQUESTS[what]
    step_s = RESTORE_STEP_S if what == "restore" else STEP_S
    unanswered = 0

    async def main(sim: Simulation) -> None:
        nonlocal unanswered
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            await world.start_daemon()
            await make(world)
            if what == "restore":
                await make_snapshot(world)
            key = "" if method == "DELETE" else "once"

            async def request() -> None:
                nonlocal unanswered
                try:
                    await world.request(method, target, body, {**JSON, "idempotency-key": key} if key else JSON)
                except Unreachable:
                    unanswered += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(request)
                await trio.sleep(sim.seed * step_s)
                await world.kill_daemon()
            await world.start_daemon()
            # What the killed daemon has left may still be there.
            answer = await insist(world, method, target, body, key)
            assert answer.status in ((200, 201) if key else (204, 404)), answer.body
            volumes = await settled(world)
            assert set(volumes) == VOLUMES_AFTER[what]
            if what == "resize":
                assert volumes["data"]["size_mb"] == 128
            if what == "restore":
                assert (volumes["new-data"]["used_by"], volumes["data"]["used_by"]) == (["new"], ["demo"])

    for seed in range(MOMENTS):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={})
    assert 0 < unanswered < MOMENTS, "the moments miss what this is about"


@pytest.mark.parametrize("fault", ["mke2fs__fails", "disk__full"])
def test_a_volume_that_can_not_be_made_leaves_nothing(tmp_path: Path, fault: str) -> None:
    async def story(world: World) -> None:
        failures = 0
        for number in range(20):
            answer = await world.request("POST", VOLUMES, {"name": f"v{number}", "size_mb": 64}, JSON)
            failures += answer.status != 201
            assert answer.status in (201, 503), answer.body
        assert failures
        await settled(world)

    run_story(tmp_path, story, seed=3, **{fault: 0.2})


def test_what_the_journal_did_not_confirm_is_completed_without_a_restart(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        failures = 0
        for number in range(30):
            name = f"v{number}"
            made = await world.request("POST", VOLUMES, {"name": name, "size_mb": 64}, JSON)
            gone = await world.request("DELETE", f"{VOLUMES}/{name}")
            failures += (made.status, gone.status) != (201, 204)
        assert failures
        await settled(world)

    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        run_story(tmp_path / str(seed), story, seed=seed, database__fails=0.2)


def test_a_boot_that_can_not_mount_has_a_reason_and_frees_the_volume(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make(world)
        body = {"cpu_cores": 1, "memory_mb": 64, "volumes": ["data:/d"]}
        answer = await world.request("POST", f"{VMS}?wait=running,crashed", {**body, "name": "one"}, JSON)
        vm = answer.json()
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", "volume_failed")
        with trio.fail_after(60):
            while (await world.request("POST", VMS, {**body, "name": "two"}, JSON)).status == 409:  # noqa: ASYNC110
                await trio.sleep(0.1)

    run_story(tmp_path, story, seed=1, agent__can_not_mount=1.0)


def test_a_guest_is_told_of_its_volumes_and_of_their_growth(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make(world)
        await make(world, "more")
        body = {"name": "one", "cpu_cores": 1, "memory_mb": 64, "volumes": ["more:/d/more:ro", "data:/d"]}
        answer = await world.request("POST", f"{VMS}?wait=running", body, JSON)
        vm = answer.json()
        assert (vm["status"], vm["booted_from"], vm["volumes"]) == ("running", "cold", ["data:/d", "more:/d/more:ro"])
        [qemu] = world.machine.running()
        assert [(each["path"], each["read_only"]) for each in qemu.guest.volumes] == [("/d", False), ("/d/more", True)]
        assert (await world.request("POST", f"{VOLUMES}/data/resize", {"size_mb": 256}, JSON)).status == 200
        assert qemu.resized == {"volume0": 256 * 2**20}
        assert qemu.guest.volumes[0]["bytes"] == 256 * 2**20
        # Its agent restarts, and receives the volumes again.
        qemu.guest.volumes = []
        qemu.guest.restart_agent()
        qemu.cut_channel()
        with trio.fail_after(60):
            while not qemu.guest.volumes:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.1)

    run_story(tmp_path, story, seed=2)


def test_of_vms_that_start_at_once_one_writes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await make(world)
        body = {"cpu_cores": 1, "memory_mb": 64, "volumes": ["data:/d"]}
        for name in ("one", "two"):
            answer = await world.request("POST", f"{VMS}?wait=running", {**body, "name": name}, JSON)
            assert answer.json()["status"] == "running", answer.body
            await world.request("POST", f"{VMS}/{name}/stop?wait=stopped&grace=0s")
        answers: list[Answer] = []

        async def start(name: str) -> None:
            answers.append(await world.request("POST", f"{VMS}/{name}/start?wait=running,crashed"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_writers, world.machine)
            async with trio.open_nursery() as starting:
                starting.start_soon(start, "one")
                starting.start_soon(start, "two")
            nursery.cancel_scope.cancel()
        won = [answer for answer in answers if answer.status == 200 and answer.json()["status"] == "running"]
        assert len(won) == 1
        [lost] = [answer for answer in answers if answer not in won]
        if lost.status == 200:
            assert lost.json()["reason"]["code"] == "volume_in_use"
        else:
            assert lost.status == 409

    for seed in range(6):
        (tmp_path / str(seed)).mkdir()
        run_story(tmp_path / str(seed), story, seed=seed)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_killed_a_volume_has_one_writer(tmp_path: Path, seed: int) -> None:
    """VMs that want the same volumes come and go, while the daemon and its hypervisors are killed."""

    async def story(world: World) -> None:
        rng = Random(seed)
        for name in ("data", "more"):
            await make(world, name)
        over = False

        async def operate(name: str) -> None:
            while not over:
                volumes = rng.choice([["data:/d"], ["data:/d:ro"], ["more:/m:ro", "data:/d:ro"], ["more:/m"]])
                body = {"name": name, "cpu_cores": 1, "memory_mb": 64, "restart_policy": "on-failure"}
                for method, target, sent in (
                    ("POST", VMS, {**body, "volumes": volumes}),
                    ("POST", f"{VMS}/{name}/{rng.choice(['stop?grace=1s', 'restart?grace=1s', 'pause'])}", None),
                    ("POST", f"{VMS}/{name}/start", None),
                    ("POST", f"{VOLUMES}/data/resize", {"size_mb": rng.randrange(64, 512)}),
                    ("POST", f"{VOLUMES}/data/clone", {"name": f"copy-{name}"}),
                    ("DELETE", f"{VOLUMES}/copy-{name}", None),
                    ("DELETE", f"{VMS}/{name}", None),
                ):
                    answer = await insist(world, method, target, sent)
                    assert answer.status in (200, 201, 204, 404, 409, 412), answer.body
                    await trio.sleep(rng.expovariate(1 / 2.0))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_writers, world.machine)
            async with trio.open_nursery() as people:
                for name in ("ada", "bob", "eve"):
                    people.start_soon(operate, name)
                with trio.move_on_after(TROUBLE_S):
                    while True:
                        await trio.sleep(rng.expovariate(1 / 5.0))
                        if rng.random() < 0.6:
                            with trio.CancelScope(shield=True):
                                await world.kill_daemon()
                                await trio.sleep(rng.expovariate(1 / 0.5))
                                await world.start_daemon()
                        elif running := world.machine.running():
                            rng.choice(running).process.end(-9)
                over = True
            nursery.cancel_scope.cancel()
        for row in world.daemon.store.projection.rows():
            assert (await insist(world, "DELETE", f"{VMS}/{row.name}")).status in (204, 404)
        volumes = await settled(world)
        assert {"data", "more"} <= set(volumes)
        for name in volumes:
            assert (await insist(world, "DELETE", f"{VOLUMES}/{name}")).status == 204
        assert not files(world)

    run_story(tmp_path, story, seed=seed)
