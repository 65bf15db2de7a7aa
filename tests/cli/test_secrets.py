"""`volar` sends secrets from standard input, and gives them to VMs by name."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.client.kit import answer, serving, vm

from .kit import at_terminal, volar

TOKEN: dict[str, Any] = {
    "name": "token", "version": 2, "readable": True, "used_by": ["web"], "project": "default",
    "created_at": "2025-09-24T12:34:56Z", "updated_at": "2025-09-25T12:34:56Z",
}  # fmt: skip


async def test_a_secret_comes_from_standard_input_byte_for_byte() -> None:
    value = b"correct horse\x00\xff\n"
    async with serving() as server:
        server.routes["PUT /api/v1/secrets/token"] = answer(TOKEN)
        done = await volar(server, "secrets", "set", "token", stdin=value)
        body = json.loads(server.requests[-1].body)
        empty = await volar(server, "secrets", "set", "token", stdin=b"")
        large = await volar(server, "secrets", "set", "token", stdin=b"x" * 65537)
        in_arguments = await volar(server, "secrets", "set", "token", "horse")
    assert (base64.b64decode(body["value"]), body["encoding"]) == (value, "base64")
    assert done.out.decode().strip() == "secret token is set, version 2"
    assert (empty.code, "standard input is empty" in empty.err) == (1, True)
    assert (large.code, "65536 bytes" in large.err) == (1, True)
    assert in_arguments.code == 2
    assert len([each for each in server.requests if each.method == "PUT"]) == 1


async def test_secrets_are_listed_shown_and_deleted() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/secrets"] = answer([TOKEN, TOKEN | {"name": "lost", "readable": False}])
        server.routes["GET /api/v1/secrets/token"] = answer(TOKEN)
        server.routes["DELETE /api/v1/secrets/token"] = answer(None, 204)
        server.routes["POST /api/v1/system/secrets/reencrypt"] = answer({"reencrypted": 3, "unreadable": []})
        listed = await volar(server, "secrets", "list")
        shown = await volar(server, "secrets", "get", "token")
        gone = await volar(server, "secrets", "delete", "token")
        again = await volar(server, "secrets", "reencrypt")
    lines = listed.out.decode().splitlines()
    assert lines[1].split()[:2] == ["token", "2"]
    assert [line.split()[-1] for line in lines] == ["READABLE", "yes", "no"]
    assert "web" in shown.out.decode()
    assert gone.out.decode().strip() == "secret token is deleted"
    assert "3" in again.out.decode()


async def test_a_vm_is_given_secrets_as_variables_and_files() -> None:
    made = vm(secrets=["db", "token"])
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(made, 201)
        server.routes["GET /api/v1/vms/demo"] = answer(made)
        options = ("-e", "A=B", "--env-secret", "TOKEN=token", "--secret", "db", "--secret", "db:/run/app/db")
        done = await volar(server, "vms", "create", "demo", *options)
        body = json.loads(server.requests[-1].body)
        shown = await volar(server, "vms", "get", "demo")
        twice = await volar(server, "vms", "create", "demo", "-e", "A=B", "--env-secret", "A=token")
        of_snapshot = await volar(server, "vms", "create", "demo", "--from-snapshot", "warm", "--secret", "db")
    assert done.code == 0, done
    assert body["env"] == {"A": "B", "TOKEN": {"secret": "token"}}
    assert body["secrets"] == ["db", "db:/run/app/db"]
    assert "db, token" in shown.out.decode()
    assert (twice.code, of_snapshot.code) == (2, 2)


async def test_at_a_terminal_a_secret_is_typed_twice_without_an_echo() -> None:
    async with serving() as server:
        server.routes["PUT /api/v1/secrets/token"] = answer(TOKEN)
        async with at_terminal(server.base_url, "secrets", "set", "token") as at:
            for prompt in (b"Value of token: ", b"Repeat for confirmation: "):
                await at.expect(prompt)
                at.type(b"correct horse\n")
            await at.expect(b"is set")
            assert await at.end() == 0
    assert b"horse" not in at.seen
    assert base64.b64decode(json.loads(server.requests[-1].body)["value"]) == b"correct horse"
