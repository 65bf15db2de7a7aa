"""The state of a workload is reported, and a wait for a ready workload ends when it can't become ready."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from tests.simulated import Answer, World
from tests.simulated.guest import MISSING_PROGRAM
from tests.simulation.kit import JSON, VMS, run_story


async def create(world: World, program: str, wait: str = "ready") -> Answer:
    manifest = {"name": "site", "workload": {"entrypoint": [program]}}
    assert (await world.request("POST", "/api/v1/plugins", manifest, JSON)).status == 201
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "plugin": "site", "boot": "cold"}
    answer = await world.request("POST", f"{VMS}?wait={wait}&timeout=60s", body, JSON)
    assert answer.status == 201, answer.body
    return answer


async def notes(world: World) -> list[str]:
    answer = await world.request("GET", f"{VMS}/demo/logs?stream=stderr")
    lines: list[dict[str, Any]] = [json.loads(line) for line in answer.body.splitlines()]
    return [line["line"] for line in lines]


def test_a_workload_that_can_not_start_is_reported_once_and_not_awaited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        began = trio.current_time()
        answer = await create(world, MISSING_PROGRAM)
        vm = answer.json()
        assert (answer.headers["volant-wait"], vm["status"]) == ("failed", "running")
        assert trio.current_time() - began < 20, "it was waited for all the same"
        failed = {"state": "failed", "exit_code": None, "error": "there is no program nosuch"}
        assert vm["workload"] == failed
        [listed] = (await world.request("GET", VMS)).json()
        inspected = (await world.request("GET", f"{VMS}/demo/inspect")).json()
        assert (listed["workload"], inspected["vm"]["workload"]) == (failed, failed)
        assert await notes(world) == ["volant: the workload has failed: there is no program nosuch"]

        # The next daemon asks again, and says nothing twice.
        await world.kill_daemon()
        await world.start_daemon()
        await trio.sleep(30)
        assert (await world.request("GET", f"{VMS}/demo")).json()["workload"] == failed
        assert len(await notes(world)) == 1
        await world.request("POST", f"{VMS}/demo/stop?wait=stopped")
        assert (await world.request("GET", f"{VMS}/demo")).json()["workload"] is None

    run_story(tmp_path, story, seed=1)


def test_a_running_workload_is_ready(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        answer = await create(world, "server")
        assert (answer.headers["volant-wait"], answer.json()["workload"]["state"]) == ("met", "healthy")
        # Without one to wait for, a VM is ready when it runs.
        body = {"name": "bare", "cpu_cores": 1, "memory_mb": 128, "boot": "cold"}
        answer = await world.request("POST", f"{VMS}?wait=ready&timeout=60s", body, JSON)
        assert (answer.headers["volant-wait"], answer.json()["workload"]) == ("met", None)

    run_story(tmp_path, story, seed=2)
