"""`volar vms exec` is the guest's command: its bytes, on its descriptors, with its exit code."""

from __future__ import annotations

import base64
import json

import pytest

from tests.client.kit import Handler, answer, ndjson, problem, serving, vm, websocket

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
        ({"error": "no such user", "code": "no_such_user"}, 126),
        ({"error": "no room", "code": "io_error"}, 125),
    ],
)
async def test_every_end_of_a_command_has_its_exit_code(end: dict[str, object], code: int) -> None:
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(output("stdout", b"x"), end))
        done = await volar(server, "vms", "exec", "demo", "--", "x")
        document = await volar(server, "vms", "exec", "-o", "json", "demo", "--", "x")
    assert (done.code, done.out, document.code) == (code, b"x", code)
    assert [json.loads(line) for line in document.out.splitlines()] == [output("stdout", b"x"), end]
    assert (str(end.get("error", "")) in done.err) == ("error" in end or not done.err)


async def test_a_stream_that_breaks_off_is_no_success() -> None:
    async with serving() as server:
        server.routes[PATH] = ndjson(wire(output("stdout", b"x")))
        # The VM runs as before.
        server.routes["GET /api/v1/vms/demo"] = answer(vm(), Volant_Wait="timeout")
        done = await volar(server, "vms", "exec", "demo", "x")
    assert done.code == 125
    assert "before the command did" in done.err
    # A VM that runs has met none of the ends that are waited for.
    asked = next(each for each in server.asked("/api/v1/vms/demo") if each.param("wait"))
    assert asked.param("wait") == "stopping,stopped,crashed,deleting,deleted"


async def test_t_without_a_terminal_is_wrong_usage_and_sends_no_request() -> None:
    async with serving() as server:
        done = await volar(server, "vms", "exec", "-it", "demo", "--", "sh")
    assert (done.code, server.requests) == (125, [])
    assert "-t with -i needs a terminal, and standard input is not one; leave out -t" in done.err


def not_running(status: str) -> Handler:
    return problem(409, "vm-not-running", f"VM 'demo' is {status}", vm="demo")


async def test_a_command_waits_for_a_vm_that_is_starting() -> None:
    async with serving() as server:
        server.routes[PATH] = [not_running("starting"), ndjson(wire(output("stdout", b"x"), {"exit_code": 3}))]
        server.routes["GET /api/v1/vms/demo"] = [answer(vm(status="starting")), answer(vm(), Volant_Wait="met")]
        done = await volar(server, "vms", "exec", "--timeout", "7s", "demo", "--", "x")
    assert (done.code, done.out) == (3, b"x")
    assert done.err == "volar: demo is starting; waiting until it runs\n"
    assert [(at.param("wait"), at.param("timeout")) for at in server.asked("/api/v1/vms/demo")][1] == ("running", "7s")


async def test_the_wait_for_a_vm_that_is_starting_has_a_deadline() -> None:
    async with serving() as server:
        server.routes[PATH] = not_running("starting")
        server.routes["GET /api/v1/vms/demo"] = answer(vm(status="starting"), Volant_Wait="timeout")
        late = await volar(server, "vms", "exec", "--timeout", "10ms", "demo", "--", "x")
        reason = {"code": "boot_timeout", "message": "the agent did not answer", "console": []}
        crashed = answer(vm(status="crashed", reason=reason), Volant_Wait="failed")
        server.routes["GET /api/v1/vms/demo"] = [answer(vm(status="starting")), crashed]
        failed = await volar(server, "vms", "exec", "demo", "--", "x")
        server.routes["GET /api/v1/vms/demo"] = answer(vm(status="stopped"))
        server.routes[PATH] = not_running("stopped")
        stopped = await volar(server, "vms", "exec", "demo", "--", "x")
    assert late.code == 124
    assert "VM 'demo' does not run after 0.01 s" in late.err
    assert failed.code == 125
    assert "VM 'demo' is crashed: the agent did not answer" in failed.err
    assert (stopped.code, "VM 'demo' is stopped" in stopped.err) == (125, True)


async def test_a_guest_that_crashes_meanwhile_is_reported() -> None:
    reason = {"code": "guest_panicked", "message": "the kernel panicked", "console": []}
    unreachable = problem(502, "agent-unreachable", "VM 'demo' does not answer: the stream to the agent broke")
    async with serving() as server:
        for handler, out in ((ndjson(wire(output("stdout", b"x"))), b"x"), (unreachable, b"")):
            server.routes[PATH] = handler
            server.routes["GET /api/v1/vms/demo"] = answer(vm(status="crashed", reason=reason), Volant_Wait="met")
            done = await volar(server, "vms", "exec", "demo", "--", "x")
            assert (done.code, done.out) == (125, out)
            assert done.err.startswith("volar: VM 'demo' crashed: the kernel panicked\n")
        # The VM runs as before.
        server.routes["GET /api/v1/vms/demo"] = answer(vm(), Volant_Wait="timeout")
        alive = await volar(server, "vms", "exec", "demo", "--", "x")
    assert (alive.code, "the stream to the agent broke" in alive.err) == (125, True)


async def test_the_id_that_a_guest_gives_commands_no_terminal() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms/demo/agent/v1/exec"] = websocket({"id": "7\x1b]0;x\x07"}, stay=True)
        done = await volar(server, "vms", "exec", "--detach", "demo", "sleep", "1000")
    assert (done.code, done.out) == (0, b"7\\x1b]0;x\\x07\n"), done.err
    assert "\x1b" not in done.err
