"""`volar volumes`: sizes with units, tables for people, and what a VM is created with."""

from __future__ import annotations

import json

from tests.client.kit import answer, serving, vm

from .kit import volar

VOLUME = {
    "name": "data", "status": "ready", "size_mb": 10240, "used_bytes": 3 * 2**20, "labels": {}, "used_by": ["a", "b"],
    "writer": None, "project": "default", "created_at": "2026-01-01T00:00:00Z",
}  # fmt: skip


async def test_a_size_has_a_unit() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/volumes"] = answer(VOLUME, 201)
        server.routes["POST /api/v1/volumes/data/resize"] = answer(VOLUME)
        made = await volar(server, "volumes", "create", "data", "--size", "10G")
        grown = await volar(server, "volumes", "resize", "data", "--size", "20480")
        small = await volar(server, "volumes", "create", "data", "--size", "1M")
    assert (made.code, made.out.decode()) == (0, "volume data is created\n")
    assert (grown.code, grown.out.decode()) == (0, "volume data has 10 GiB\n")
    assert (small.code, "less than 16M" in small.err) == (2, True)
    assert [request.json() for request in server.requests] == [{"name": "data", "size_mb": 10240}, {"size_mb": 20480}]


async def test_people_see_sizes_and_programs_the_answer() -> None:
    lost = {**VOLUME, "name": "lost", "used_bytes": None}
    async with serving() as server:
        server.routes["GET /api/v1/volumes"] = answer([VOLUME, lost])
        server.routes["GET /api/v1/volumes/data"] = answer(VOLUME)
        table = await volar(server, "volumes", "list")
        shown = await volar(server, "volumes", "get", "data")
        found = await volar(server, "volumes", "list", "--json")
    assert "10 GiB" in table.out.decode()
    assert "its file is missing" in table.out.decode()
    assert "a, b" in shown.out.decode()
    assert json.loads(found.out) == [VOLUME, lost]


async def test_a_vm_is_created_with_volumes_and_limits() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(), 201)
        words = ("-v", "data:/d:ro", "--volume", "more:/m", "--disk-iops", "500", "--disk-mbps", "20")
        done = await volar(server, "vms", "create", "demo", *words)
    assert done.code == 0, done.err
    body = server.requests[0].json()
    assert (body["volumes"], body["disk_iops"], body["disk_mbps"]) == (["data:/d:ro", "more:/m"], 500, 20)


async def test_a_repair_leaves_no_vm() -> None:
    for status, code in (("running", 0), ("crashed", 1)):
        reason = {"code": "volume_failed", "message": "no ext4", "console": [], "at": "2026-01-01T00:00:00Z"}
        found = vm(status=status, reason=reason if status == "crashed" else None)
        async with serving() as server:
            server.routes["POST /api/v1/vms"] = answer(vm(), 201)
            server.routes["GET /api/v1/vms/demo"] = answer(found, **{"Volant-Wait": "failed" if code else "met"})
            server.routes["DELETE /api/v1/vms/demo"] = answer(None, 204)
            server.routes["GET /api/v1/volumes/data"] = answer(VOLUME)
            done = await volar(server, "volumes", "repair", "data")
        assert (done.code, "no ext4" in done.err) == (code, status == "crashed"), done.err
        asked = [f"{request.method} {request.path}" for request in server.requests]
        assert "DELETE /api/v1/vms/demo" in asked, asked
        body = server.requests[0].json()
        assert (body["volumes"], body["ttl"]) == (["data:/volume:nocopy"], "15m")


async def test_a_copy_is_named_after_its_source() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/volumes/data/clone"] = answer({**VOLUME, "name": "copy"}, 201)
        server.routes["DELETE /api/v1/volumes/copy"] = answer(None, 204)
        copied = await volar(server, "volumes", "clone", "data", "copy")
        gone = await volar(server, "volumes", "delete", "copy")
    assert copied.out.decode() == "volume copy is a copy of data\n"
    assert gone.out.decode() == "volume copy is deleted\n"
