"""A VM that does not fit the host is refused when it is created, with figures, and not when it boots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import World
from tests.simulated.memory import SimMachine
from tests.simulation.kit import JSON, run_story
from volant.vm._capacity import IDLE_MB, OVERHEAD_MB

run = partial(run_story, seed=3)


async def create(world: World, name: str, memory_mb: int, wait: str = "") -> Any:
    body = {"name": name, "cpu_cores": 1, "memory_mb": memory_mb, "boot": "cold"}
    return await world.request("POST", f"/api/v1/vms{wait}", body, JSON)


def test_memory_of_other_programs_is_not_promised_to_a_vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 64 + OVERHEAD_MB
    monkeypatch.setattr(SimMachine, "memory_available_mb", lambda self: left)

    async def story(world: World) -> None:
        nonlocal left
        refused = await create(world, "large", 65)
        said = refused.json()
        assert (refused.status, said["type"]) == (503, "urn:volant:error:no-capacity")
        assert f"the VM takes {65 + IDLE_MB} MiB when it starts, up to {65 + OVERHEAD_MB} later" in said["detail"]
        assert f"{left} of the host's 16384 MiB are available" in said["detail"]
        assert (await world.request("GET", "/api/v1/vms")).json() == []
        made = await create(world, "fits", 64)
        assert made.status == 201
        # It has taken nothing yet, and what it will take is taken off.
        second = await create(world, "second", 64)
        assert (second.status, f", {64 + IDLE_MB} for VMs that start" in second.json()["detail"]) == (503, True)
        left += 64 + OVERHEAD_MB
        assert (await world.request("GET", "/api/v1/vms/fits?wait=running")).json()["status"] == "running"
        assert (await create(world, "second", 64)).status == 201

    run(tmp_path, story)


def test_a_vm_that_starts_again_is_admitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 10_000
    monkeypatch.setattr(SimMachine, "memory_available_mb", lambda self: left)

    async def story(world: World) -> None:
        nonlocal left
        assert (await create(world, "demo", 64, "?wait=running")).json()["status"] == "running"
        assert (await world.request("POST", "/api/v1/vms/demo/stop?wait=stopped")).status == 200
        left = 64
        assert (await world.request("POST", "/api/v1/vms/demo/start")).status == 503
        left = 64 + OVERHEAD_MB
        started = await world.request("POST", "/api/v1/vms/demo/start?wait=running")
        assert started.json()["status"] == "running"

    run(tmp_path, story)


def test_a_vm_is_refused_while_programs_wait_for_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_short = True
    monkeypatch.setattr(SimMachine, "is_short_of_memory", lambda self: is_short)

    async def story(world: World) -> None:
        nonlocal is_short
        refused = await create(world, "demo", 64)
        assert (refused.status, refused.headers["retry-after"]) == (503, "10")
        assert "short of memory" in refused.json()["detail"]
        is_short = False
        assert (await create(world, "demo", 64, "?wait=running")).json()["status"] == "running"
        is_short = True
        assert (await world.request("GET", "/api/v1/vms/demo")).json()["status"] == "running", "VMs go on"

    run(tmp_path, story)
