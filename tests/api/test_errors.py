"""Every mistake of a client gets its 4xx, a problem that names what is wrong; and the daemon goes on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from tests.api.kit import UPGRADE, Api, api
from volant.http import ApiSettings
from volant.model import Problem

GOOD = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    async with api(tmp_path, ApiSettings(allowed_hosts=("volant.example", "proxy.example:8443"))) as running:
        yield running


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = dict(answer.json())
    assert body["status"] == status
    assert body["error"] == body["detail"]
    assert body["type"].startswith("urn:volant:error:")
    assert body["title"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def upgrade(**headers: str) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in UPGRADE.items()} | headers


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "a" * 64}, "name"),
        ({"name": "../etc/passwd"}, "name"),
        ({"name": ""}, "name"),
        ({"name": "demo\n"}, "name"),
        ({"name": "Demo"}, "name"),
        ({"name": 5}, "name"),
        ({"cpu_cores": 0}, "cpu_cores"),
        ({"cpu_cores": "1"}, "cpu_cores"),
        ({"cpu_cores": 1.5}, "cpu_cores"),
        ({"cpu_cores": True}, "cpu_cores"),
        ({"cpu_cores": 10**30}, "cpu_cores"),
        ({"memory_mb": 63}, "memory_mb"),
        ({"colour": "red"}, "colour"),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"labels": {"": "x"}}, "labels"),
        ({"labels": {str(n): "x" for n in range(65)}}, "labels"),
        ({"env": {"A=B": "x"}}, "env"),
        ({"kernel_cmdline": "quiet\ninit=/bin/sh"}, "kernel_cmdline"),
        ({"restart_policy": "sometimes"}, "restart_policy"),
        ({"ttl": "soon"}, "ttl"),
        ({"ttl": "0s"}, "ttl"),
        ({"plugin": "a/b"}, "plugin"),
        ({"runtime": "A"}, "runtime"),
    ],
)
async def test_a_wrong_field_is_named(served: Api, change: dict[str, Any], field: str) -> None:
    answer = await served.client.post("/api/v1/vms", json={**GOOD, **change})
    assert problem(answer, 400)["field"] == field
    assert (await served.client.get("/api/v1/vms")).json() == []


async def test_a_missing_field_is_named(served: Api) -> None:
    body = {key: value for key, value in GOOD.items() if key != "name"}
    assert problem(await served.client.post("/api/v1/vms", json=body), 400)["field"] == "name"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b'{"name": "demo", "name"',
        b'{"name": "\xff\xfe"}',
        b'{"name": "demo", "labels": {"a": 1, "b": "\xff"}}',
        b'{"labels":' * 100_000,
        b"[" * 900_000,
        b'{"labels": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    ],
)
async def test_a_body_that_is_no_vm_is_400(served: Api, body: bytes) -> None:
    answer = await served.client.post("/api/v1/vms", content=body, headers={"content-type": "application/json"})
    problem(answer, 400)


async def test_a_body_of_another_type_is_415(served: Api) -> None:
    answer = await served.client.post("/api/v1/vms", data={"name": "demo"})
    problem(answer, 415)


async def test_a_body_of_100_mb_is_413_and_the_client_sees_it(served: Api) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b"x" * 1_000_000

    problem(await served.client.post("/api/v1/vms", content=chunks()), 413)
    answer = await served.client.post(
        "/api/v1/vms", content=chunks(), headers={"content-length": "100000000", "content-type": "application/json"}
    )
    problem(answer, 413)
    assert (await served.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/api/v1/nothing", 404),
        ("GET", "/api/v1/vms/none", 404),
        ("GET", "/api/v1/vms/none/inspect", 404),
        ("GET", "/api/v1/vms/none/memory", 404),
        ("GET", "/api/v1/vms/..%2f..%2fetc", 404),
        ("GET", "/api/v1/vms//inspect", 404),
        ("POST", "/api/v1/vms//start", 404),
        ("POST", "/api/v1/vms/a%2Fb/start", 404),
        ("GET", "/api/v1/vms/none/agent/healthz", 404),
        ("GET", "/api/v1/vms/none/ports/80/", 404),
        ("GET", "/api/v1/vms/none/logs", 404),
        ("DELETE", "/api/v1/vms/none", 404),
        ("POST", "/api/v1/vms/none/start", 404),
        ("POST", "/api/v1/vms/none/explode", 404),
        ("PUT", "/api/v1/vms", 405),
        ("DELETE", "/healthz", 405),
        ("GET", "/api/v1/vms/none/start", 405),
        ("POST", "/api/v1/events/vms", 405),
        ("GET", "/ws/v1/vms/none/logs", 426),
        ("POST", "/ws/v1/vms/none/logs", 405),
        ("TRACE", "/ws/v1/agui", 405),
        ("GET", "/api/v1/plugins/none", 404),
        ("GET", "/api/v1/plugins/..", 404),
        ("DELETE", "/api/v1/plugins/none", 404),
        ("DELETE", "/api/v1/plugins/base", 409),
        ("GET", "/api/v1/vms/demo/ports/0/", 400),
        ("GET", "/api/v1/vms/demo/ports/65536/", 400),
        ("GET", "/api/v1/vms/demo/ports/ssh/", 400),
    ],
)
async def test_what_is_not_there_is_a_problem(served: Api, method: str, path: str, status: int) -> None:
    answer = await served.client.request(method, path)
    problem(answer, status)
    assert (status == 405) == ("allow" in answer.headers)


async def test_a_list_is_found_with_a_final_slash_and_with_head(served: Api) -> None:
    (await served.client.post("/api/v1/vms/", json=GOOD)).raise_for_status()
    listed, named = await served.client.get("/api/v1/vms/"), await served.client.head("/api/v1/vms/demo/")
    assert [one["name"] for one in listed.json()] == ["demo"]
    assert (named.status_code, named.content) == (200, b"")


@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        ("GET", "/api/v1/vms?colour=red", "colour"),
        ("GET", "/api/v1/vms?status=happy", "status"),
        ("GET", "/api/v1/vms?label=x", "label"),
        ("GET", "/api/v1/vms?limit=0", "limit"),
        ("GET", "/api/v1/vms?limit=5&limit=6", "limit"),
        ("GET", "/api/v1/vms?cursor=-1", "cursor"),
        ("GET", "/api/v1/vms?plugin=base&plugin=a/b", "plugin"),
        ("GET", "/api/v1/vms/none2?wait=running", None),
        ("POST", "/api/v1/vms?wait=flying", "wait"),
        ("POST", "/api/v1/vms?timeout=11m", "timeout"),
        ("POST", "/api/v1/vms?timeout=5", "timeout"),
        ("POST", "/api/v1/vms/none/stop?grace=-1s", "grace"),
        ("POST", "/api/v1/vms/none/stop?grace=", "grace"),
        ("POST", "/api/v1/vms/none/start?grace=1s", "grace"),
        ("DELETE", "/api/v1/vms/none?force=true", "force"),
        ("GET", "/api/v1/system/status?verbose=1", "verbose"),
        ("GET", "/api/v1/system/tree?x", "x"),
        ("GET", "/api/v1/events/vms?types=VM_EXPLODED", "types"),
        ("GET", "/api/v1/events/vms?vm=../x", "vm"),
        ("GET", "/api/v1/events/vms?on_gap=panic", "on_gap"),
        ("GET", "/api/v1/events/vms?after=1", "after"),
        ("GET", "/api/v1/vms/none/logs?tail=-1", "tail"),
        ("GET", "/api/v1/vms/none/logs?stream=stdin", "stream"),
        ("GET", "/api/v1/vms/none/logs?since=yesterday", "since"),
        ("GET", "/api/v1/vms/none/logs?since=2025-01-01T00:00:00", "since"),
        ("GET", "/api/v1/vms/none/logs?follow=maybe", "follow"),
        ("GET", "/api/v1/vms?a=%ff", None),
        ("GET", "/api/v1/vms?" + "a=1&" * 200, None),
    ],
)
async def test_a_wrong_parameter_is_named(served: Api, method: str, path: str, field: str | None) -> None:
    answer = await served.client.request(method, path)
    if path.startswith("/api/v1/vms/none2"):
        problem(answer, 404)
    else:
        assert problem(answer, 400).get("field") == field


async def test_a_command_takes_no_body(served: Api) -> None:
    for content in (b"", b"{}"):
        problem(await served.client.post("/api/v1/vms/none/start", content=content), 404)
    answer = await served.client.post("/api/v1/vms/none/start", json={"grace": "1s"})
    assert problem(answer, 400)["field"] == "grace"


async def test_a_websocket_where_there_is_none_is_a_problem(served: Api) -> None:
    for path in ("/ws/v1/vms/none/logs", "/ws/v1/nothing", "/api/v1/vms", "/api/v1/events/vms"):
        problem(await served.client.get(path, headers=upgrade()), 404)


# Host and Origin


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9999", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("[::1]:7777", True),
        ("volant.example", True),
        ("volant.example:80", True),
        ("proxy.example:8443", True),
        ("proxy.example", False),
        ("attacker.example", False),
        ("localhost.attacker.example", False),
        ("127.0.0.1.attacker.example", False),
        ("192.168.7.7", False),
        ("0.0.0.0", False),
        ("user@127.0.0.1", False),
        ("127.0.0.1/", False),
        ("127.0.0.1:port", False),
        ("[::1", False),
        ("2130706433", False),
        ("", False),
    ],
)
async def test_only_requests_to_our_names_are_answered(served: Api, host: str, ours: bool) -> None:
    for path in ("/healthz", "/api/v1/events/vms?on_gap=410", "/api/v1/vms/none/agent/"):
        answer = await served.client.head(path, headers={"host": host})
        assert (answer.status_code != 421) == ours


async def test_a_name_that_is_not_ours_is_421(served: Api) -> None:
    problem(await served.client.get("/healthz", headers={"host": "attacker.example"}), 421)


async def test_an_unsafe_method_from_another_origin_is_refused(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(cors_origins=("https://console.example",))) as served:
        own = f"http://127.0.0.1:{served.server.port}"
        for origin, status in (
            (own, 404),
            ("https://console.example", 404),
            ("http://127.0.0.1:1", 403),
            ("http://localhost:3000", 403),
            ("https://attacker.example", 403),
            ("null", 403),
            ("file://", 403),
        ):
            for method, path in (("POST", "/api/v1/vms/none/start"), ("DELETE", "/api/v1/vms/none")):
                problem(await served.client.request(method, path, headers={"origin": origin}), status)
            for path in ("/ws/v1/vms/none/logs", "/api/v1/vms/none/agent/v1/exec"):
                problem(await served.client.get(path, headers=upgrade(origin=origin)), status)
            assert (await served.client.get("/api/v1/vms", headers={"origin": origin})).status_code == 200


# Identity, and faults of our own


async def test_a_request_id_is_kept_if_it_is_one(served: Api) -> None:
    for given, kept in (("abc-123", True), ("a" * 65, False), ("a b", False), ("<x>", False)):
        answer = await served.client.get("/healthz", headers={"x-request-id": given})
        assert (answer.headers["x-request-id"] == given) == kept


async def test_the_log_has_the_request_and_no_secret(served: Api, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="volant.api.request"):
        await served.client.get("/api/v1/vms/none?api_key=hunter2", headers={"x-request-id": "r1"})
        await trio.testing.wait_all_tasks_blocked()
    lines = [record.getMessage() for record in caplog.records if record.name == "volant.api.request"]
    assert len(lines) == 1
    assert lines[0].startswith("r1 GET /api/v1/vms/none 400 ")
    assert "hunter2" not in caplog.text


async def test_a_bug_is_a_500_without_details(
    served: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.deps.store.projection, "rows", broken)
    body = problem(await served.client.get("/api/v1/vms", headers={"x-request-id": "r2"}), 500)
    assert "secret" not in json.dumps(body)
    assert body["request_id"] == "r2"
    assert "secret detail" in caplog.text
    assert (await served.client.get("/healthz")).status_code == 200


async def test_a_problem_of_a_handler_is_the_answer(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object, **__: object) -> None:
        raise Problem(503, "no-capacity", "no room", hint="delete one")

    monkeypatch.setattr(served.deps.vms, "create", full)
    body = problem(await served.client.post("/api/v1/vms", json=GOOD), 503)
    assert (body["type"], body["hint"]) == ("urn:volant:error:no-capacity", "delete one")
