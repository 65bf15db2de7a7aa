"""`volar` forks, snapshots and restores, and says what has come of it."""

from __future__ import annotations

import json
from typing import Any

from tests.client.kit import answer, serving, vm

from .kit import volar

WARM: dict[str, Any] = {
    "name": "warm", "status": "ready", "vm": "demo", "vm_id": 7, "plugin": "base", "cpu_cores": 1, "memory_mb": 256,
    "disk": "none", "description": "logged in", "labels": {}, "created_at": "2025-09-24T12:34:56Z", "paused_ms": 12.5,
    "size_bytes": 3 * 2**20,
}  # fmt: skip


async def test_a_fork_names_its_copies_and_fails_with_the_one_that_failed() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/fork"] = answer([vm(name="one"), vm(name="two")], 201)
        server.routes["GET /api/v1/vms/one"] = answer(vm(name="one"), **{"Volant-Wait": "met"})
        crashed = vm(name="two", status="crashed", reason={"code": "capture_gone", "message": "it is gone"})
        server.routes["GET /api/v1/vms/two"] = answer(crashed, **{"Volant-Wait": "failed"})
        done = await volar(server, "vms", "fork", "demo", "-n", "2", "--wait")
    assert (done.code, done.out.decode().splitlines()) == (1, ["one is running", "two is crashed: it is gone"])


async def test_snapshots_are_taken_listed_shown_and_removed() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/snapshots"] = answer(WARM, 201)
        server.routes["GET /api/v1/snapshots"] = answer([WARM])
        server.routes["GET /api/v1/snapshots/warm"] = answer(WARM)
        server.routes["DELETE /api/v1/snapshots/warm"] = answer(None, 204)
        taken = await volar(server, "vms", "snapshot", "demo", "--name", "warm")
        listed = await volar(server, "snapshots", "list")
        shown = await volar(server, "snapshots", "show", "warm", "--json")
        gone = await volar(server, "snapshots", "remove", "warm")
    assert taken.out.decode().strip() == "snapshot warm of demo is ready: 3 MiB, the guest was paused for 12 ms"
    assert listed.out.decode().splitlines()[1].split()[:3] == ["warm", "ready", "demo"]
    assert json.loads(shown.out) == WARM
    assert gone.out.decode().strip() == "snapshot warm is removed"


async def test_a_vm_is_made_from_a_snapshot_with_nothing_but_its_name() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(), 201)
        done = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm")
        wrong = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm", "--env", "A=b")
    assert done.code == 0, done
    assert wrong.code == 2
