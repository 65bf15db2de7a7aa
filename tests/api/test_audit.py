"""The audit log: each operation that changes something or reaches into a guest has its record before its answer."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import httpx
import pytest
import trio

from tests.api.kit import UPGRADE, Api, api, read_answer, request, streamed, until, web_vm
from tests.api.test_mcp import call
from tests.api.test_operations import Callers
from volant.host import Host
from volant.http import ApiSettings
from volant.journal import Evidence, Recorder, Retention, restore_offline
from volant.model import Caller, Cause, Key, Permission, Role
from volant.operations import TABLE, Recorded

AUDIT = "/api/v1/audit"


async def records(served: Api, **query: Any) -> list[dict[str, Any]]:
    """What the log has, without its own reading."""
    answer = await served.client.get(AUDIT, params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json())


async def of_request(served: Api, method: str, path: str, **more: Any) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """Sends a request; returns its answer and its records."""
    answer = await served.client.request(method, path, **more)
    return answer, await records(served, request_id=answer.headers["x-request-id"])


def stored(path: Path) -> list[dict[str, Any]]:
    """What is on the disk."""
    connection = apsw.Connection(str(path / "volant.db"), flags=apsw.SQLITE_OPEN_READONLY)
    found = [json.loads(data) for (data,) in connection.execute("SELECT record FROM audit ORDER BY seq")]
    connection.close()
    return found


# What has a record


async def test_a_change_has_its_record_in_its_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, str]] = []
    write = Recorder._write

    async def spy(self: Recorder, cause: Cause, outcome: str) -> None:
        written.append((cause.operation, outcome))
        await write(self, cause, outcome)

    monkeypatch.setattr(Recorder, "_write", spy)
    async with api(tmp_path) as served:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
        answer, [record] = await of_request(served, "POST", "/api/v1/vms", json=body, headers={"X-Request-Id": "mine"})
        assert answer.status_code == 201
        vm_id = answer.json()["id"]
        assert {name: record[name] for name in ("operation", "target", "vm_id", "outcome", "request_id")} == {
            "operation": "create_vm",
            "target": "demo",
            "vm_id": vm_id,
            "outcome": "done",
            "request_id": "mine",
        }
        assert (record["caller"], record["address"], record["project"]) == ("anonymous", "127.0.0.1", "default")
        plugin = {"name": "own", "resources": {"memory_mb": 64}}
        for method, path, more in (
            ("POST", "/api/v1/vms/demo/stop", {}),
            ("POST", "/api/v1/plugins", {"json": plugin}),
            ("POST", "/api/v1/plugins/own/enabled", {"json": {"enabled": False}}),
            ("DELETE", "/api/v1/plugins/own", {}),
            ("POST", "/api/v1/system/drain", {}),
            ("POST", "/api/v1/system/undrain", {}),
        ):
            answer, found = await of_request(served, method, path, **more)
            assert answer.status_code < 300, answer.text
            assert [record["outcome"] for record in found] == ["done"], path
        answer = await served.client.post("/api/v1/keys", json={"name": "ci", "role": "admin"})
        assert answer.status_code == 201
        last = stored(tmp_path)[-1]
        assert (last["operation"], last["target"], last["outcome"]) == ("create_key", "ci", "done")
    assert written == []


async def test_a_change_outside_of_the_journal_is_recorded_before_and_after_it(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        _, found = await of_request(served, "POST", "/api/v1/system/prune")
        assert [(record["operation"], record["outcome"]) for record in found] == [("prune", "begun"), ("prune", "done")]


async def test_reads_have_no_record(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await served.crashed("demo")
        before = await records(served)
        paths = ("vms", "vms/demo", "vms/demo/logs", "system/status", "system/tasks", "plugins", "images", "audit")
        for path in paths:
            assert (await served.client.get(f"/api/v1/{path}")).status_code == 200
        assert (await served.client.post("/api/v1/tickets")).status_code == 201
        assert await records(served) == before


@pytest.mark.parametrize("operation", list(TABLE), ids=lambda operation: operation.name)
def test_what_is_recorded_follows_from_the_permission(operation: Any) -> None:
    reads = (
        operation.only_reads
        or operation.permission in (Permission.PUBLIC, Permission.VIEW)
        or (operation.permission is Permission.ADMIN and operation.method == "GET")
    )
    assert (operation.recorded is Recorded.NOT) == reads
    is_access = operation.permission is Permission.USE and not operation.only_reads
    assert (operation.recorded is Recorded.ACCESS) == is_access
    assert not operation.only_reads or operation.name in ("vm_logs", "vm_logs_websocket")
    assert not operation.each_minute or operation.recorded is Recorded.ACCESS
    assert not operation.journaled or operation.recorded is Recorded.CHANGE
    if operation.method == "GET" and operation.call is not None:
        assert operation.permission is not Permission.CONTROL, "it would have a `begun` that nothing needs"


async def test_every_refused_operation_is_recorded(tmp_path: Path) -> None:
    callers = Callers(ApiSettings())
    async with api(tmp_path, access=callers, checked=False) as served:
        await served.crashed("demo")
        missing = []
        for operation in TABLE:
            path = operation.path.replace("{name}", "demo").replace("{port}", "80").replace("{sha256}", "0" * 64)
            path = re.sub(r"{\w+}", "x", path)
            headers = {"X-Request-Id": f"of-{operation.name}"}
            if any(status == 101 for status in operation.answers):
                headers |= {name.replace("_", "-"): value for name, value in UPGRADE.items()}
            callers.role = Role.VIEWER
            async with await served.server.connect() as stream:
                await stream.send_all(request(operation.method, path, **headers))
                answer = None
                if operation.recorded is not Recorded.NOT:
                    answer = await read_answer(stream, operation.method)
                    assert answer.status == 403, operation.name
            callers.role = Role.ADMIN
            found = await records(served, request_id=f"of-{operation.name}")
            outcomes = [(record["operation"], record["outcome"]) for record in found]
            wanted = [(operation.name, "403 forbidden")] if operation.recorded is not Recorded.NOT else []
            if outcomes != wanted:
                missing.append((operation.name, outcomes))
        assert not missing


async def test_refusals_are_recorded_and_malformed_requests_are_not(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        vm = await served.crashed("demo")
        refused: list[tuple[str, str, dict[str, Any], str]] = [
            ("POST", "/api/v1/vms/none/start", {}, "404 vm-not-found"),
            ("POST", "/api/v1/vms", {"json": {"name": "demo", "cpu_cores": 1}}, "409 name-taken"),
            ("DELETE", "/api/v1/plugins/base", {}, "409 plugin-built-in"),
            ("GET", "/api/v1/vms/demo/agent/v1/info", {}, "409 vm-not-running"),
            ("GET", "/api/v1/vms/none/ports/80/", {}, "404 vm-not-found"),
            ("POST", "/api/v1/vms/demo/stop", {"headers": {"If-Match": '"1-999"'}}, "412 vm-changed"),
        ]
        for method, path, more, outcome in refused:
            answer, found = await of_request(served, method, path, **more)
            assert [record["outcome"] for record in found] == [outcome], (path, answer.text)
            assert found[0]["vm_id"] == (vm["id"] if "/demo/" in path else None)
        malformed: list[tuple[str, str, dict[str, Any]]] = [
            ("POST", "/api/v1/vms", {"json": {"name": "NO"}}),
            ("POST", "/api/v1/vms", {"content": b"{"}),
            ("POST", "/api/v1/vms/demo/stop?colour=red", {}),
            ("GET", "/api/v1/vms/demo/ports/99999/", {}),
        ]
        for method, path, more in malformed:
            answer, found = await of_request(served, method, path, **more)
            assert (answer.status_code, found) == (400, [])


async def test_a_repeated_request_is_recorded_as_such(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
        outcomes = []
        for _ in range(2):
            answer, found = await of_request(
                served, "POST", "/api/v1/vms", json=body, headers={"Idempotency-Key": "once"}
            )
            assert answer.status_code == 201
            outcomes += [(record["target"], record["outcome"]) for record in found]
        assert outcomes == [("demo", "done"), ("demo", "repeated")]


async def test_events_name_their_request(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
        await served.client.post("/api/v1/vms", json=body, headers={"X-Request-Id": "mine"})
        async with streamed(served.server, "/api/v1/events/vms?since=0") as stream:
            text = b""
            while b"VM_CREATED" not in text:
                text += await stream.more()
        event = next(json.loads(line[6:]) for line in text.splitlines() if line.startswith(b"data: "))
        assert (event["type"], event["caller"], event["request_id"]) == ("VM_CREATED", "127.0.0.1", "mine")


async def test_tools_and_commands_are_recorded_as_their_operations(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await served.crashed("demo")
        await records(served)
        await call(served, "vms_stop", vm="demo", wait=False)
        await call(served, "vms_delete", vm="none")
        await call(served, "vms_exec", vm="demo", command=["true"])
        await call(served, "vms_list")
        command = {"command": "volant.vms.delete", "params": {"name": "none"}}
        await served.client.post("/api/v1/mcp", json=command)
        shown = [(record["operation"], record["target"], record["outcome"]) for record in await records(served)]
        assert shown[1:] == [
            ("stop_vm", "demo", "done"),
            ("delete_vm", "none", "404 vm-not-found"),
            ("agent_exec", "demo", "409 vm-not-running"),
            ("delete_vm", "none", "404 vm-not-found"),
        ]


async def test_a_key_that_has_expired_is_named(tmp_path: Path) -> None:
    async with api(tmp_path, checked=False) as served:
        made = await served.client.post("/api/v1/keys", json={"name": "root", "role": "admin"})
        served.client.headers["X-Volant-API-Key"] = made.json()["key"]
        short = {"name": "ci", "role": "viewer", "expires_in_s": 0.001}
        ended = (await served.client.post("/api/v1/keys", json=short)).json()["key"]
        for _ in range(2):
            answer = await served.client.get("/api/v1/vms", headers={"X-Volant-API-Key": ended})
            assert answer.status_code == 401
        unknown = await served.client.get("/api/v1/vms", headers={"X-Volant-API-Key": "vlt_guess"})
        assert unknown.status_code == 401
        shown = [(record["caller"], record["operation"], record["outcome"]) for record in await records(served)]
        assert shown == [
            ("anonymous", "create_key", "done"),
            ("key:root", "create_key", "done"),
            ("key:ci", "authenticate", "401 key-expired"),
        ]


# Into guests


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Api]:
    """A VM whose workload answers with the records that are on the disk when it is reached."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1000})
            return
        body = json.dumps(stored(tmp_path)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async with web_vm(tmp_path, app, actions={"look": {"path": "/look", "method": "GET"}}) as served:
        yield served


def port_of(served: Api) -> int:
    row = served.deps.store.projection.require(Key("default", "demo"))
    assert row.manifest.workload is not None
    assert row.manifest.workload.port is not None
    return row.manifest.workload.port


async def test_an_access_is_on_the_disk_before_the_guest_is_reached(web: Api) -> None:
    port = port_of(web)
    for method, path, operation, detail in (
        # Guests take any method.
        ("PROPFIND", f"ports/{port}/any", "get_port", f"port {port}"),
        ("POST", "actions/web/look", "call_action", "web/look"),
    ):
        headers = {"X-Request-Id": f"of-{operation}"}
        answer = await web.client.request(method, f"/api/v1/vms/demo/{path}", headers=headers)
        assert answer.status_code == 200, answer.text
        seen = answer.json()[-1]
        assert (seen["request_id"], seen["operation"], seen["outcome"]) == (f"of-{operation}", operation, "begun")
        assert (seen["target"], seen["detail"], seen["vm_id"]) == ("demo", detail, 1)
    assert [record["outcome"] for record in (await records(web))[-2:]] == ["begun"] * 2


async def test_commands_and_files_have_a_record_each(web: Api) -> None:
    at = "/api/v1/vms/demo/agent/v1"
    name = f"{web.deps.store.path.parent}/a file"
    for _ in range(2):
        answer, [record] = await of_request(web, "POST", f"{at}/exec", json={"command": ["/bin/echo", "s3cret"]})
        assert answer.status_code == 200
        assert (record["operation"], record["outcome"], record["detail"]) == ("agent_exec", "begun", "")
        _, [record] = await of_request(web, "PUT", f"{at}/files{name}?mode=0600", content=b"s3cret")
        assert (record["operation"], record["outcome"], record["detail"]) == ("write_file", "begun", name)
    _, [record] = await of_request(web, "GET", f"{at}/files/nothing")
    assert (record["operation"], record["outcome"]) == ("read_file", "begun")


async def test_http_to_a_port_has_one_record_a_minute(web: Api) -> None:
    path = f"/api/v1/vms/demo/ports/{port_of(web)}/"
    before = len(await records(web))

    async def get() -> None:
        assert (await web.client.get(path)).status_code == 200

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(get)
    await web.client.post(path)
    assert len(await records(web)) == before + 1
    # Another path into the guest is another place, and a WebSocket is a session.
    await web.client.get("/api/v1/vms/demo/agent/x")
    assert len(await records(web)) == before + 2
    for _ in range(2):
        async with await web.server.connect() as stream:
            await stream.send_all(request("GET", path, **UPGRADE))
            await stream.receive_some(1)
    assert len(await records(web)) == before + 4


async def test_a_guest_that_is_not_reached_has_a_second_record(web: Api) -> None:
    answer, found = await of_request(web, "GET", "/api/v1/vms/demo/ports/1/")
    assert answer.status_code == 502
    assert [(record["outcome"], record["detail"]) for record in found] == [
        ("begun", "port 1"),
        ("502 port-unreachable", "port 1"),
    ]


async def test_without_a_record_nobody_gets_into_a_guest(web: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/api/v1/vms/demo/ports/{port_of(web)}/"
    threads = web.deps.host.threads
    with monkeypatch.context() as patch:
        patch.setattr(threads, "run", failing(threads.run))
        for method, target in (
            ("GET", path),
            ("POST", "/api/v1/vms/demo/agent/v1/exec"),
            ("POST", "/api/v1/system/prune"),
        ):
            answer = await web.client.request(method, target)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:volant:error:journal-full"), answer.text
        # A refusal says what it would have said.
        assert (await web.client.post("/api/v1/vms/none/start")).status_code == 404
        assert (await web.client.get("/api/v1/vms/demo")).status_code == 200
    metrics = (await web.client.get("/metrics")).text
    assert re.search(r"^volant_audit_lost_total 4.0$", metrics, re.M)
    assert re.search(r"^volant_audit_records_total [1-9]", metrics, re.M)


def failing(run: Any) -> Any:
    async def gated(function: Any, *arguments: object) -> Any:
        if getattr(function, "__name__", "") == "write":
            raise apsw.FullError("database or disk is full")
        return await run(function, *arguments)

    return gated


# Reading it


async def many(served: Api, count: int) -> None:
    """Writes records, as one commit or few."""
    caller = Caller("one", "one")
    async with trio.open_nursery() as nursery:
        for number in range(count):
            cause = Cause(operation="fill", caller=caller, request_id=f"r{number}", target=f"t{number % 7}")
            nursery.start_soon(served.deps.recorder.answer, cause, None)


async def test_the_log_is_read_in_pages_and_filtered(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        for project in ("default", "other"):
            answer = await served.client.post(f"/api/v1/vms/none/start?project={project}")
            assert answer.status_code == 404
        await many(served, 50)
        everything = await records(served)
        assert [record["seq"] for record in everything] == list(range(1, 53))
        assert [record["project"] for record in everything[:2]] == ["default", "other"]
        got, path = [], f"{AUDIT}?limit=20&operation=fill&api_key=hush"
        while path:
            answer = await served.client.get(path)
            got += answer.json()
            assert "hush" not in answer.headers.get("link", "")
            path = answer.links.get("next", {}).get("url", "")
        assert got == everything[2:]
        assert await records(served, target="t3") == [each for each in everything if each["target"] == "t3"]
        assert await records(served, caller="one", limit=3) == everything[2:5]
        assert await records(served, project="other") == [everything[1]]
        assert await records(served, project="*", operation="start_vm") == everything[:2]
        assert await records(served, tail=2) == everything[-2:]
        assert await records(served, cursor=50) == everything[-2:]
        assert await records(served, since=everything[0]["time"]) == everything
        assert await records(served, until="2020-01-01T00:00:00Z") == []
        for wrong in ("since=now", "limit=0", "cursor=-1", "follow=true", "tail=1&cursor=1", "colour=red"):
            assert (await served.client.get(f"{AUDIT}?{wrong}")).status_code == 400, wrong


async def test_the_log_can_be_exported_as_lines(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await many(served, 2500)
        answer = await served.client.get(AUDIT, headers={"Accept": "application/x-ndjson"})
        assert answer.headers["content-type"] == "application/x-ndjson"
        lines = [json.loads(line) for line in answer.text.splitlines()]
        assert [line["seq"] for line in lines] == list(range(1, 2501))
        some = await served.client.get(f"{AUDIT}?target=t1&tail=5", headers={"Accept": "application/x-ndjson"})
        assert [json.loads(line) for line in some.text.splitlines()] == [x for x in lines if x["target"] == "t1"][-5:]


async def test_a_follower_gets_what_is_stored_and_what_comes(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await many(served, 1500)
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "1400"}
        async with streamed(served.server, f"{AUDIT}?caller=one", **headers) as events:
            async with streamed(served.server, f"{AUDIT}?follow=true", Accept="application/x-ndjson") as lines:
                await served.client.post("/api/v1/vms/none/start")
                await many(served, 100)
                text = b""
                while text.count(b"event: AUDIT") < 200:
                    text += await events.more()
                seqs = [int(line[4:]) for line in text.splitlines() if line.startswith(b"id: ")]
                assert seqs == [*range(1401, 1501), *range(1502, 1602)]
                got = b""
                while got.count(b"\n") < 1601:
                    got += await lines.more()
                assert [json.loads(line)["seq"] for line in got.splitlines()] == list(range(1, 1602))


async def test_a_reader_that_is_behind_retention_gets_a_gap(tmp_path: Path) -> None:
    retention = Retention(max_records=300)
    async with api(tmp_path, retention=retention) as served:
        log = served.deps.store.audit
        async with streamed(served.server, f"{AUDIT}?follow=true", Accept="application/x-ndjson") as slow:
            for _ in range(10):
                await many(served, 300)
            with trio.fail_after(20):
                while log.oldest.seq < 2000:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            oldest = log.oldest.seq
            resumed = await served.client.get(f"{AUDIT}?cursor=5", headers={"Accept": "application/x-ndjson"})
            first, second = map(json.loads, resumed.text.splitlines()[:2])
            assert first == {"gap": {"from": 6, "to": second["seq"] - 1}}
            assert second["seq"] >= oldest
            seqs: list[int] = []
            got = b""
            while not seqs or seqs[-1] < 3000:
                got += await slow.more()
                seqs = []
                for line in got.splitlines(keepends=True):
                    if line.endswith(b"\n"):
                        read = json.loads(line)
                        seqs += range(read["gap"]["from"], read["gap"]["to"] + 1) if "gap" in read else [read["seq"]]
            assert seqs == list(range(1, 3001)), "nothing twice, and what is lost is named"


async def test_administrators_alone_read_the_log(tmp_path: Path) -> None:
    callers = Callers(ApiSettings())
    async with api(tmp_path, access=callers) as served:
        for role in Role:
            callers.role = role
            assert (await served.client.get(AUDIT)).status_code == (200 if role is Role.ADMIN else 403)


# Nothing secret


async def test_nothing_secret_is_in_it(web: Api) -> None:
    secret = "s3cret-0f-somebody"
    at = "/api/v1/vms/demo/agent/v1"
    made = (await web.client.post("/api/v1/keys", json={"name": "ci", "role": "admin"})).json()["key"]
    web.client.headers["X-Volant-API-Key"] = made
    ticket = (await web.client.post("/api/v1/tickets", json={})).json()["ticket"]
    body = {"name": "two", "cpu_cores": 1, "memory_mb": 128, "env": {"TOKEN": secret}, "labels": {"token": secret}}
    assert (await web.client.post("/api/v1/vms", json=body)).status_code == 201
    await web.client.post(f"{at}/exec", json={"command": ["/bin/echo", secret], "env": {"TOKEN": secret}})
    await web.client.put(f"{at}/files{web.deps.store.path.parent}/f?mode=0600", content=secret.encode())
    await web.client.get(f"/api/v1/vms/demo/ports/{port_of(web)}/?token={secret}&ticket={ticket}")
    await web.client.post(
        "/api/v1/images/pull", json={"reference": "127.0.0.1:1/none"}, headers={"Volant-Registry-Auth": secret}
    )
    await web.client.get(f"/api/v1/vms/demo/ports/1/?api_key={made}")
    text = json.dumps(stored(web.deps.store.path.parent))
    for hidden in (secret, made, ticket, "TOKEN"):
        assert hidden not in text


async def test_a_key_of_the_settings_shows_8_digits(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=("correct horse",))) as served:
        served.client.headers["X-Volant-API-Key"] = "correct horse"
        _, [record] = await of_request(served, "POST", "/api/v1/vms/none/start")
        assert re.fullmatch("[0-9a-f]{8}", record["caller_id"])
        assert record["caller"] == f"key {record['caller_id']}"


async def test_control_characters_are_replaced(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        _, [record] = await of_request(served, "POST", f"/api/v1/vms/%1b[2J{'x' * 500}/start")
        assert "\x1b" not in record["target"]
        assert len(record["target"]) <= 256


async def test_a_restore_keeps_the_records_of_now(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await many(served, 10)
        answer, found = await of_request(served, "POST", "/api/v1/system/backup")
        assert [record["outcome"] for record in found] == ["done"]
        # Its end comes after the last byte.
        await until(lambda: not served.deps.backups._is_busy)
        await many(served, 10)
        before = stored(tmp_path)
    backup = tmp_path / "backup"
    backup.write_bytes(answer.content)
    cause = Cause(operation="restore", caller=Caller("uid 0", "uid 0"), request_id="restoring")
    restore_offline(Host(), tmp_path / "volant.db", backup, Evidence(), "0" * 10, replace=False, cause=cause)
    after = stored(tmp_path)
    assert after[:-1] == before
    last = after[-1]
    assert (last["seq"], last["operation"], last["outcome"]) == (len(before) + 1, "restore", "done")
    assert last["request_id"] == "restoring"
