"""`volar vms exec` is the guest's command: its bytes, on its descriptors, with its exit code."""

from __future__ import annotations

import base64
import json

import pytest

from tests.client.kit import ndjson, serving

from .kit import volar

PATH = "POST /api/v1/vms/demo/agent/v1/exec"
BLOB = bytes(range(256)) * 200


def wire(*lines: dict[str, object]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def output(stream: str, data: bytes) -> dict[str, object]:
    return {"stream": stream, "data": base64.b64encode(data).decode()}


async def test_both_streams_and_the_code_are_the_commands_own() -> None:
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(output("stdout", BLOB), output("stderr", b"\xff\0"), {"exit_code": 7}))
        done = await volar(
            server, "vms", "exec", "--env", "A=b=c", "--timeout", "2m", "demo", "--", "sh", "-c", "x --json"
        )
        plain = await volar(server, "vms", "exec", "demo", "ls", "-l", "--")
    assert (done.code, done.out) == (7, BLOB)
    assert done.err == "\\xff\0"
    assert server.requests[0].json() == {"command": ["sh", "-c", "x --json"], "env": {"A": "b=c"}, "timeout_s": 120}
    assert plain.code == 7
    assert server.requests[1].json() == {"command": ["ls", "-l", "--"]}


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"exit_code": 0}, 0),
        ({"signal": 9}, 137),
        ({"error": "timed out", "code": "timeout"}, 124),
        ({"error": "no such file", "code": "not_found"}, 127),
        ({"error": "no", "code": "not_executable"}, 126),
        ({"error": "no such user", "code": "no_such_user"}, 1),
    ],
)
async def test_every_end_has_its_code(end: dict[str, object], code: int) -> None:
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(output("stdout", b"x"), end))
        done = await volar(server, "vms", "exec", "demo", "--", "x")
    assert (done.code, done.out) == (code, b"x")
    assert (str(end.get("error", "")) in done.err) == ("error" in end or not done.err)


async def test_json_is_the_stream_itself() -> None:
    lines = (output("stdout", b"\xff"), {"exit_code": 3})
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(*lines))
        done = await volar(server, "vms", "exec", "--json", "demo", "x")
    assert done.code == 3
    assert [json.loads(line) for line in done.out.splitlines()] == list(lines)


async def test_a_stream_that_breaks_off_is_no_success() -> None:
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(output("stdout", b"x")))
        done = await volar(server, "vms", "exec", "demo", "x")
    assert done.code == 5
    assert "before the command did" in done.err
