"""`volar vms pause` and `resume` say what they have asked for, or wait until it is so."""

from __future__ import annotations

import pytest

from tests.client.kit import answer, problem, serving, sse, vm

from .kit import volar


@pytest.mark.parametrize(
    ("command", "status", "says"),
    [
        ("pause", "paused", b"demo is being paused\n"),
        ("resume", "running", b"demo is running\n"),
        # It has no code of its own.
        ("recover", "running", b"demo is running\n"),
    ],
)
async def test_pause_and_resume_wait_only_with_wait(command: str, status: str, says: bytes) -> None:
    async with serving() as server:
        path = f"/api/v1/vms/demo/{command}"
        server.routes[f"POST {path}"] = [
            answer(vm()),
            answer(vm(status=status), Volant_Wait="met"),
            answer(vm(status="crashed"), Volant_Wait="failed"),
        ]
        server.routes["GET /api/v1/vms"] = answer([vm()], Volant_Event_Id="e-1")
        server.routes["GET /api/v1/events/vms"] = sse()
        asked = await volar(server, "vms", command, "demo")
        waited = await volar(server, "vms", command, "demo", "--wait", "--timeout", "5s")
        failed = await volar(server, "vms", command, "demo", "--wait", "--timeout", "5s")
        queries = [request.query for request in server.asked(path)]
    assert (asked.code, asked.out) == (0, says)
    assert (waited.code, failed.code) == (0, 1)
    assert queries == [[], [("wait", status), ("timeout", "5s")], [("wait", status), ("timeout", "5s")]]


async def test_exec_in_a_paused_vm_is_an_error_with_a_hint() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms/demo/agent/v1/exec"] = problem(409, "vm-not-running", "VM 'demo' is paused")
        server.routes["GET /api/v1/vms/demo"] = answer(vm(status="paused"))
        done = await volar(server, "vms", "exec", "demo", "true")
    assert done.code != 0
    assert "paused" in done.err
