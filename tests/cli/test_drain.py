"""`volar system drain` asks for what it was told, and waits for the end of what runs, not longer."""

from __future__ import annotations

import json

import pytest

from tests.client.kit import Server, answer, event, serving, sse, vm

from .kit import volar

STATUS = {
    "status": "ok", "vm_count": 1, "vms": {"running": 1}, "cpu_percent": 1.0, "mem_percent": 2.0, "version": "0.1.0",
    "uptime_s": 3.0, "draining_since": "2026-01-02T03:04:05Z",
}  # fmt: skip
DRAIN = "/api/v1/system/drain"


def drained(server: Server) -> None:
    server.routes[f"POST {DRAIN}"] = answer(STATUS)


@pytest.mark.parametrize(
    ("words", "query"),
    [
        ((), []),
        (("--stop-vms",), [("stop_vms", "true")]),
        (("--stop-vms", "--grace", "90s"), [("stop_vms", "true"), ("grace", "90s")]),
    ],
)
async def test_options_become_the_query(words: tuple[str, ...], query: list[tuple[str, str]]) -> None:
    async with serving() as server:
        drained(server)
        done = await volar(server, "system", "drain", *words)
    assert (done.code, done.out) == (0, b"draining: no VM starts until `volar system undrain`\n")
    assert sorted(server.asked(DRAIN)[0].query) == sorted(query)


async def test_programs_get_the_status() -> None:
    async with serving() as server:
        drained(server)
        done = await volar(server, "--json", "system", "drain")
    assert json.loads(done.out) == STATUS


async def test_a_grace_is_for_vms_that_are_stopped() -> None:
    async with serving() as server:
        done = await volar(server, "system", "drain", "--grace", "5s")
    assert done.code == 2
    assert server.asked(DRAIN) == []


async def test_drain_waits_until_nothing_of_a_vm_is_on_the_host() -> None:
    async with serving() as server:
        drained(server)
        listed = [
            # The first one is for the events' number.
            answer([vm()], Volant_Event_Id="e-1"),
            answer([vm(), vm(id=8, name="two", status="stopped", pid=None)]),
            answer([vm(status="crashed", pid=4242)]),
            answer([vm(status="crashed", pid=None)]),
        ]
        server.routes["GET /api/v1/vms"] = listed
        server.routes["GET /api/v1/events/vms"] = sse(event(2), event(3), stay=True)
        done = await volar(server, "system", "drain", "--wait")
    assert done.code == 0, done.err
    assert done.err == "1 VM is up: demo\n"
    assert listed == []


async def test_drain_waits_no_longer_than_the_timeout() -> None:
    async with serving() as server:
        drained(server)
        server.routes["GET /api/v1/vms"] = answer([vm()], Volant_Event_Id="e-1")
        server.routes["GET /api/v1/events/vms"] = sse(stay=True)
        done = await volar(server, "system", "drain", "--wait", "--timeout", "1s")
    assert done.code == 124
    assert "after 1 s 1 VM is up: demo" in done.err


async def test_undrain_prints_that_vms_start() -> None:
    async with serving() as server:
        server.routes["POST /api/v1/system/undrain"] = answer({**STATUS, "draining_since": None})
        done = await volar(server, "system", "undrain")
    assert (done.code, done.out) == (0, b"VMs start again\n")
