"""The daemon is killed, or the power fails, at any moment of some operations: none is without its record, and no record
is without its operation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio

from actors.testing import Simulation, allow_real, simulate
from tests.simulated import Answer, Unreachable, World, simulated_world
from tests.simulated.guest import SimGuest
from tests.simulation.kit import JSON, VMS

ROUNDS = 100 if os.environ.get("VOLANT_TEST_FULL") else 30
VM = {"cpu_cores": 1, "memory_mb": 128}
MANIFEST = {"resources": {"memory_mb": 64}}
SMALL = {"size_mb": 64}


class Story:
    """One round: requests side by side, a kill among them, and what the next daemon has."""

    def __init__(self, world: World, reached: list[str]) -> None:
        self.world = world
        self.answers: dict[str, Answer | None] = {}
        """By the id of the request; None: the daemon died before it."""
        self.reached = reached
        """What guests were asked for."""

    async def send(self, request_id: str, method: str, path: str, body: object = None) -> None:
        headers = {"x-request-id": request_id, **({} if body is None else JSON)}
        self.answers[request_id] = None
        try:
            self.answers[request_id] = await self.world.request(method, path, body, headers)
        except Unreachable:
            pass

    async def run(self) -> None:
        world, rng = self.world, self.world.sim.rng
        await world.start_daemon()
        for name in ("demo", "other"):
            await self.send(f"create-{name}", "POST", f"{VMS}?wait=running", {"name": name, **VM})
        async with trio.open_nursery() as nursery:
            for request in (
                ("net", "POST", "/api/v1/networks", {"name": "net"}),
                ("gone", "DELETE", "/api/v1/networks/gone"),
                ("vol", "POST", "/api/v1/volumes", {"name": "vol", **SMALL}),
                ("plugin", "POST", "/api/v1/plugins", {"name": "plugin", **MANIFEST}),
                ("project", "POST", "/api/v1/projects", {"name": "project"}),
                ("new", "POST", VMS, {"name": "new", **VM}),
                ("snap", "POST", f"{VMS}/demo/snapshots", {"name": "snap"}),
                ("fork", "POST", f"{VMS}/demo/fork", {"names": ["twin"]}),
                ("pause", "POST", f"{VMS}/other/pause"),
                ("exec-1", "POST", f"{VMS}/demo/agent/v1/exec?exec-1", {"command": ["true"]}),
                ("exec-2", "POST", f"{VMS}/demo/agent/v1/exec?exec-2", {"command": ["true"]}),
                ("delete", "DELETE", f"{VMS}/other"),
                ("drain", "POST", "/api/v1/system/drain"),
                ("prune", "POST", "/api/v1/system/prune"),
            ):
                nursery.start_soon(self._after, rng.uniform(0, 0.05), request)
            await trio.sleep(rng.uniform(0.0, 0.12))
            await (world.power_cut if rng.random() < 0.3 else world.kill_daemon)()
        await world.start_daemon()
        self.check()

    async def _after(self, delay_s: float, request: tuple[Any, ...]) -> None:
        await trio.sleep(delay_s)
        await self.send(*request)

    def check(self) -> None:
        store = self.world.daemon.store
        path = self.world.settings.state_dir / "volant.db"
        with allow_real("files"):
            connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs="unix")
            records = [json.loads(data) for (data,) in connection.execute("SELECT record FROM audit ORDER BY seq")]
            events = [json.loads(data) for (data,) in connection.execute("SELECT frame FROM events ORDER BY seq")]
            connection.close()
        assert [record["seq"] for record in records] == list(range(1, len(records) + 1))
        outcomes: dict[str, list[str]] = {}
        for record in records:
            outcomes.setdefault(record["request_id"], []).append(record["outcome"])
        assert outcomes.keys() <= self.answers.keys()
        for request_id, answer in self.answers.items():
            if answer is not None:
                # Answered, so recorded.
                wanted = "begun" if request_id.startswith("exec") else "done"
                if answer.status >= 400 and not request_id.startswith("exec"):
                    wanted = f"{answer.status} {answer.json()['type'].rpartition(':')[2]}"
                assert wanted in outcomes.get(request_id, ()) or answer.status == 503, (request_id, answer, outcomes)
        done = {request_id for request_id, found in outcomes.items() if "done" in found}
        begun = {request_id for request_id, found in outcomes.items() if "begun" in found}
        assert all(len(found) == len(set(found)) for found in outcomes.values()), outcomes
        # What a transaction of the journal did has its record in it, and the other way round.
        projection = store.projection
        there = {
            "net": any(network.name == "net" for network in projection.networks.values()),
            "plugin": any(plugin.name == "plugin" for plugin in projection.plugins_of(None)),
            "project": any(project.name == "project" for project in projection.projects.values()),
            "drain": projection.drain is not None,
            "new": any(row.name == "new" for row in projection.rows()),
            "fork": any(row.name == "twin" for row in projection.rows()),
            "snap": any(one.name == "snap" and one.status == "ready" for one in projection.snapshots.values()),
            "vol": any(one.name == "vol" and one.status == "ready" for one in projection.volumes.values()),
        }
        assert {name for name, found in there.items() if found} == done & there.keys(), (there, outcomes)
        caused = {event["request_id"] for event in events if "request_id" in event}
        assert caused <= done, (caused, outcomes)
        assert "gone" not in done
        for name in ("snap", "vol"):
            assert name not in done or name in begun
        # What reached a guest has its record, which was written before.
        assert {target.partition("?")[2] for target in self.reached} <= begun
        assert "prune" not in done or "prune" in begun


def test_no_operation_without_its_record_and_no_record_without_its_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[str] = []
    serve = SimGuest.serve

    async def spy(self: SimGuest, method: str, target: str, body: bytes, stream: Any) -> None:
        if target.startswith("/v1/exec"):
            reached.append(target)
        await serve(self, method, target, body, stream)

    monkeypatch.setattr(SimGuest, "serve", spy)
    answered: set[str] = set()
    unanswered: set[str] = set()
    guests = 0

    async def main(sim: Simulation) -> None:
        nonlocal guests
        reached.clear()
        async with simulated_world(sim, tmp_path / str(sim.seed)) as world:
            story = Story(world, reached)
            await story.run()
        for request_id, answer in story.answers.items():
            (unanswered if answer is None else answered).add(request_id)
        guests += len(reached)

    for seed in range(ROUNDS):
        (tmp_path / str(seed)).mkdir()
        simulate(main, seed=seed, faults={})
    # Else the moments have missed what this is about.
    assert guests > ROUNDS // 2
    assert {"net", "vol", "project", "new", "snap", "fork", "drain", "prune"} <= answered & unanswered
