"""`volar` forks, snapshots and restores, and says what has come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.client.kit import answer, serving, vm

from .kit import volar

WARM: dict[str, Any] = {
    "name": "warm", "status": "ready", "vm": "demo", "vm_id": 7, "plugin": "base", "cpu_cores": 1, "memory_mb": 256,
    "disk": "none", "description": "logged in", "labels": {}, "created_at": "2025-09-24T12:34:56Z", "paused_ms": 12.5,
    "size_bytes": 3 * 2**20, "volumes": ["data"], "secrets": [],
    "project": "default",
    "source": None,
}  # fmt: skip


async def test_a_fork_names_its_copies_and_fails_with_the_one_that_failed() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/fork"] = answer([vm(name="one"), vm(name="two")], 201)
        server.routes["GET /api/v1/vms/one"] = answer(vm(name="one"), **{"Volant-Wait": "met"})
        crashed = vm(name="two", status="crashed", reason={"code": "checkpoint_gone", "message": "it is gone"})
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
        shown = await volar(server, "snapshots", "get", "warm", "--json")
        gone = await volar(server, "snapshots", "delete", "warm")
    assert taken.out.decode().strip() == "snapshot warm of demo is ready: 3.0 MiB, the guest was paused for 12 ms"
    assert listed.out.decode().splitlines()[1].split()[:3] == ["warm", "ready", "demo"]
    assert json.loads(shown.out) == WARM
    assert gone.out.decode().strip() == "snapshot warm is deleted"


def node(of: str, name: str, created: int, **more: object) -> dict[str, Any]:
    """A node of the fork tree, created at a second."""
    found = {"id": of, "kind": of.partition("-")[0], "name": name, "status": "running", "deleted_at": None}
    return {**found, "created_at": f"2025-09-24T12:34:{created:02}Z", "project": "default", **more}


def edge(kind: str, source: str, target: str, paused_ms: float | None) -> dict[str, Any]:
    return {"source": source, "target": target, "kind": kind, "at": "2025-09-24T12:34:56Z", "paused_ms": paused_ms}


async def test_forks_are_printed_as_a_tree_of_all_pages() -> None:
    first: dict[str, Any] = {
        "nodes": [
            node("vm-1", "demo", 1),
            node("snapshot-b", "late", 9, status="ready"),
            node("snapshot-a", "warm", 2, status=None, deleted_at="2025-09-24T13:00:00Z"),
        ],
        "edges": [edge("snapshot", "vm-1", "snapshot-b", 12.5), edge("snapshot", "vm-1", "snapshot-a", 9.0)],
        "event_id": "x-1", "next_cursor": "1-a",
    }  # fmt: skip
    second: dict[str, Any] = {
        "nodes": [node("vm-2", "again\x1b[2J", 5), node("vm-3", "copy", 6), node("vm-9", "gone", 7, created_at=None)],
        "edges": [edge("restore", "snapshot-a", "vm-2", None), edge("fork", "vm-2", "vm-3", 3.0)],
        "event_id": "x-2", "next_cursor": None,
    }  # fmt: skip
    async with serving() as server:
        server.routes["GET /api/v1/forks"] = [answer(first), answer(second)] * 3
        shown = await volar(server, "forks")
        names = await volar(server, "forks", "-q")
        whole = await volar(server, "forks", "-o", "json")
    assert shown.out.decode().splitlines() == [
        "demo  running  created 2025-09-24 12:34:01",
        "├─ snapshot warm  deleted  taken 2025-09-24 12:34:56, paused for 9 ms  deleted 2025-09-24 13:00:00",
        "│  └─ again\\x1b[2J  running  restored 2025-09-24 12:34:56",
        "│     └─ copy  running  forked 2025-09-24 12:34:56, paused for 3 ms",
        "└─ snapshot late  ready  taken 2025-09-24 12:34:56, paused for 12 ms",
        "gone  running",
    ]
    assert names.out.decode().split() == ["demo", "late", "warm", "again\\x1b[2J", "copy", "gone"]
    found = json.loads(whole.out)
    assert (found["nodes"], found["edges"]) == (first["nodes"] + second["nodes"], first["edges"] + second["edges"])
    assert found["next_cursor"] is None
    assert [request.param("cursor") for request in server.asked("/api/v1/forks")] == [None, "1-a"] * 3


async def test_a_vm_is_made_from_a_snapshot_with_nothing_but_its_name() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(), 201)
        done = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm")
        wrong = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm", "--env", "A=b")
    assert done.code == 0, done
    assert wrong.code == 2


async def test_a_snapshot_is_pushed_and_pulled_and_what_moved_is_said(tmp_path: Path) -> None:
    pushed = {
        "reference": "registry.example:5000/team/demo:1", "digest": f"sha256:{'0' * 64}", "size_bytes": 92 * 2**20,
        "sent_bytes": 4 * 2**20, "chunks": 366, "sent_chunks": 121,
    }  # fmt: skip
    file = tmp_path / "auth.json"
    file.write_text('{"auths": {"registry.example:5000": {"auth": "dTpw"}}}')
    async with serving() as server:
        server.routes["POST /api/v1/snapshots/warm/push"] = answer(pushed)
        server.routes["POST /api/v1/snapshots/pull"] = answer({**WARM, "name": "moved"}, 201)
        reference = "registry.example:5000/team/demo:1"
        sent = await volar(server, "snapshots", "push", "warm", reference, "--authfile", str(file))
        got = await volar(server, "snapshots", "pull", reference, "moved", "--registry-secret", "hub")
    assert sent.out.decode().strip() == (
        f"snapshot warm is {reference}: 92.0 MiB in 366 chunks, 121 were sent as 4.0 MiB"
    )
    assert got.out.decode().strip() == "snapshot moved of demo is ready: 3.0 MiB"
    (push,) = server.asked("/api/v1/snapshots/warm/push")
    (pull,) = server.asked("/api/v1/snapshots/pull")
    assert push.json()["reference"] == reference
    assert "volant-registry-auth" in push.headers
    assert pull.json() == {"reference": reference, "name": "moved", "registry_secret": "hub"}
    assert "volant-registry-auth" not in pull.headers
