"""The commands that Docker's users know: `ps`, `start`, `stop`, `restart`, `rm`, `inspect`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.client.kit import answer, problem, serving, sse, vm

from .kit import volar

STOPPED = vm(status="stopped", desired="stopped")


async def test_ps_shows_vms_that_run_unless_all_are_wanted() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm()])
        shown = await volar(server, "ps")
        names = await volar(server, "ps", "-aq")
        document = await volar(server, "ps", "-o", "json")
    title, row = shown.out.decode().splitlines()
    assert title.split() == ["NAME", "IMAGE", "STATUS", "UP", "ADDRESS", "PORTS", "REASON"]
    assert row.split()[:3] == ["demo", "base", "running"]
    assert names.out == b"demo\n"
    assert json.loads(document.out) == [vm()]
    running, every, _ = (request.param("status") for request in server.requests)
    assert running == "pending,starting,running,paused,stopping,deleting"
    assert every is None


async def test_ps_filters() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm(name="web-1"), vm(name="db")])
        words = ("-f", "label=team=a", "-f", "status=stopped", "-f", "name=web", "-f", "plugin=base", "-q")
        done = await volar(server, "ps", *words)
        wrong = [await volar(server, "ps", "-f", text) for text in ("color=red", "status=asleep", "label=x", "name")]
    assert done.out == b"web-1\n"
    (asked,) = server.requests
    assert dict(asked.query) == {"status": "stopped", "label": "team=a", "plugin": "base"}
    assert [each.code for each in wrong] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("words", "state"), [(["start"], "running"), (["stop", "-t", "3"], "stopped"), (["restart"], "running")]
)
async def test_vms_are_changed_one_after_the_other_and_waited_for(words: list[str], state: str) -> None:
    async with serving() as server:
        for name in ("one", "two"):
            path = f"POST /api/v1/vms/{name}/{words[0]}"
            server.routes[path] = answer(vm(name=name, status=state), Volant_Wait="met")
        done = await volar(server, *words, "one", "two")
    assert (done.code, done.out, done.err) == (0, b"one\ntwo\n", "")
    assert [request.param("wait") for request in server.requests] == [state, state]
    assert server.requests[0].param("grace") == ("3s" if "-t" in words else None)


async def test_a_vm_that_ends_otherwise_is_a_failure() -> None:
    reason = {"code": "boot_timeout", "message": "the agent did not answer", "console": []}
    async with serving() as server:
        server.routes["POST /api/v1/vms/one/start"] = answer(
            vm(name="one", status="crashed", reason=reason), Volant_Wait="failed"
        )
        done = await volar(server, "start", "one", "two")
    assert (done.code, done.out) == (1, b"")
    assert "VM 'one' is crashed, not running: the agent did not answer" in done.err


async def test_rm_deletes_vms_that_run_only_with_force() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms/demo"] = answer(vm())
        server.routes["GET /api/v1/vms/old"] = answer(STOPPED)
        server.routes["DELETE /api/v1/vms/old"] = answer(None, 204)
        server.routes["DELETE /api/v1/vms/demo"] = answer(None, 204)
        server.routes["DELETE /api/v1/vms/none"] = problem(404, "vm-not-found", "no VM", vm="none")
        refused = await volar(server, "rm", "old", "demo")
        forced = await volar(server, "rm", "-f", "demo", "none")
    assert (refused.code, refused.out) == (1, b"old\n")
    assert "VM 'demo' is running" in refused.err
    assert "volar rm -f demo" in refused.err
    assert (forced.code, forced.out) == (0, b"demo\nnone\n")


async def test_inspect_prints_documents() -> None:
    found: list[dict[str, Any]] = [vm(name="one"), vm(name="two")]
    async with serving() as server:
        for each in found:
            server.routes[f"GET /api/v1/vms/{each['name']}"] = answer(each)
        done = await volar(server, "inspect", "one", "two")
    assert json.loads(done.out) == found


@pytest.mark.parametrize(
    ("text", "size_mb"),
    [("512", 512), ("512M", 512), ("1g", 1024), ("1.5GiB", 1536), ("2000k", 2), ("1T", 2**20), ("67108864b", 64)],
)
async def test_sizes_have_units(text: str, size_mb: int) -> None:
    async with serving() as server:
        server.routes["POST /api/v1/vms"] = answer(vm(), 201)
        done = await volar(server, "vms", "create", "demo", "--disk", text)
    assert done.code == 0, done.err
    assert server.requests[0].json()["disk_mb"] == size_mb


@pytest.mark.parametrize("text", ["", "G", "-1", "1P", "1.G", "0", "63M", "1e9"])
async def test_what_is_no_size_is_wrong_usage(text: str) -> None:
    done = await volar(None, "vms", "create", "demo", "--memory", text)
    assert done.code == 2
    assert "is no size" in done.err or "is less than 64M" in done.err


@pytest.mark.parametrize(
    ("command", "status", "wanted", "says"),
    [
        ("pause", "paused", "paused", b"demo is being paused\n"),
        ("resume", "running", "running", b"demo is running\n"),
        ("recover", "running", "ready", b"demo is running\n"),
    ],
)
async def test_pause_and_resume_wait_only_with_wait(command: str, status: str, wanted: str, says: bytes) -> None:
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
    assert queries == [[], [("wait", wanted), ("timeout", "5s")], [("wait", wanted), ("timeout", "5s")]]
