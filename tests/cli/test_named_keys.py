"""`volar keys`: a new key alone on standard output, its end as a duration, and tables without any key."""

from __future__ import annotations

import json

from tests.client.kit import answer, serving

from .kit import volar

KEY = {
    "name": "ci", "role": "operator", "project": "web", "created_at": "2026-01-01T00:00:00Z", "created_by": "uid 0",
    "expires_at": "2026-02-01T00:00:00Z", "expired": False, "last_used_at": "2026-01-02T03:04:05Z",
    "last_used_from": "192.0.2.1", "replaced": [],
}  # fmt: skip
OPS = {
    **KEY, "name": "ops", "role": "admin", "project": None, "expires_at": None, "last_used_at": None,
    "last_used_from": None,
}  # fmt: skip


async def test_a_new_key_is_all_that_is_on_standard_output() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/keys"] = answer({"name": "ci", "key": "vlt_1"}, 201)
        server.routes["POST /api/v1/keys/ci/rotate"] = answer({"name": "ci", "key": "vlt_2"})
        words = ("keys", "create", "ci", "--role", "operator", "--project", "web", "--expires", "30d")
        made = await volar(server, *words)
        as_json = await volar(server, *words, "--json")
        turned = await volar(server, "keys", "rotate", "ci", "--overlap", "1h")
        roleless = await volar(server, "keys", "create", "ci")
    assert (made.code, made.out) == (0, b"vlt_1\n")
    assert "can't be shown again" in made.err
    assert json.loads(as_json.out) == {"name": "ci", "key": "vlt_1"}
    assert as_json.err == ""
    assert (turned.code, turned.out) == (0, b"vlt_2\n")
    assert roleless.code == 2
    assert [request.json() for request in server.requests] == [
        {"name": "ci", "role": "operator", "project": "web", "expires_in_s": 2592000.0},
        {"name": "ci", "role": "operator", "project": "web", "expires_in_s": 2592000.0},
        {"overlap_s": 3600.0},
    ]


async def test_keys_are_listed_shown_and_deleted() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/keys"] = answer([KEY, OPS])
        server.routes["GET /api/v1/keys/ci"] = answer(KEY)
        server.routes["DELETE /api/v1/keys/ci"] = answer(None, 204)
        table = await volar(server, "keys")
        names = await volar(server, "keys", "ls", "-q")
        shown = await volar(server, "keys", "get", "ci")
        gone = await volar(server, "keys", "rm", "ci")
    _, ci, ops = table.out.decode().splitlines()
    assert ci.split() == ["ci", "operator", "web", "2026-02-01", "00:00:00Z", "2026-01-02", "03:04:05Z", "192.0.2.1"]
    assert ops.split() == ["ops", "admin", "all", "never"]
    assert names.out == b"ci\nops\n"
    assert "uid 0" in shown.out.decode()
    assert (gone.code, gone.out.decode()) == (0, "key ci is deleted\n")
