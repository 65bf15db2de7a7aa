"""A VM that does not fit the host is refused when it is created, with figures, and not when it boots."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import World
from tests.simulated.memory import SimMachine
from tests.simulation.kit import JSON, run_story
from volant.vm._capacity import OVERHEAD_MB

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
        assert f"{65 + OVERHEAD_MB} MiB" in said["detail"]
        assert f" {left} of the host's" in said["detail"]
        assert f"{left} MiB are available, and VMs that are up or about to be may take 0 MiB of these" in said["detail"]
        assert (await world.request("GET", "/api/v1/vms")).json() == []
        made = await create(world, "fits", 64)
        assert made.status == 201
        # It has taken nothing yet, and what it will take is taken off.
        second = await create(world, "second", 64)
        assert (second.status, " 0 of the host's" in second.json()["detail"]) == (503, True)
        left += 64 + OVERHEAD_MB
        assert (await world.request("GET", "/api/v1/vms/fits?wait=running")).json()["status"] == "running"
        assert (await create(world, "second", 64)).status == 201

    run(tmp_path, story)


def test_promised_memory_is_subtracted_from_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimMachine, "memory_total_mb", lambda self: 1000)
    monkeypatch.setattr(SimMachine, "memory_available_mb", lambda self: 900)

    async def story(world: World) -> None:
        assert (await create(world, "first", 128)).status == 201
        refused = (await create(world, "second", 128)).json()["detail"]
        assert refused == (
            "the VM needs 320 MiB, and 168 of the host's 1000 MiB are not promised yet: 320 MiB are promised to VMs "
            "that are up or about to be, and 512 MiB are kept for the host (900 MiB are available now, as VMs do not "
            "use all that is promised to them)"
        )

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
