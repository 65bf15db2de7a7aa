"""A model gets what it asked for or is told why not, in both eras of the protocol, in a text that it can bear."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import trio
from msgspec.structs import replace

from tests.api.kit import FAST, Api, request, until, web_vm
from tests.names import named
from volant.host import Host
from volant.http import Limits
from volant.logs import LogEntry
from volant.mcp._server import hint_for_a_model
from volant.mcp._text import BUDGET, MAX_TEXT, Window, clip, fitting, weight
from volant.mcp._tools import tools
from volant.model import Problem
from volant.operations import TABLE

PATH = "/api/v1/mcp"
BOTH = {"Accept": "application/json, text/event-stream"}
MODERN = "2026-07-28"
META = "io.modelcontextprotocol"


def message(answer: httpx.Response) -> Any:
    """The last message of an answer, JSON or events."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return json.loads(re.findall(r"^data: (.*?)\r?$", answer.text, re.MULTILINE)[-1])
    return answer.json()


async def rpc(served: Api, method: str, params: dict[str, Any], *, modern: bool = False) -> Any:
    headers = dict(BOTH)
    if modern:
        params = {**params, "_meta": {f"{META}/protocolVersion": MODERN, f"{META}/clientCapabilities": {}}}
        headers |= {"MCP-Protocol-Version": MODERN, "Mcp-Method": method}
        if "name" in params or "uri" in params:
            headers["Mcp-Name"] = params.get("name") or params["uri"]
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return message(await served.client.post(PATH, json=body, headers=headers))


async def call(served: Api, tool: str, /, *, modern: bool = False, **arguments: Any) -> Any:
    return (await rpc(served, "tools/call", {"name": tool, "arguments": arguments}, modern=modern))["result"]


async def command(served: Api, name: str, /, **params: Any) -> Any:
    answer = await served.client.post(PATH, json={"command": name, "params": params})
    assert answer.status_code == 200
    return answer.json()


# The protocol


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25"])
async def test_older_versions_begin_with_initialize_and_have_no_sessions(served: Api, version: str) -> None:
    hello = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    answer = await served.client.post(PATH, json=body, headers=BOTH)
    assert answer.status_code == 200
    assert "mcp-session-id" not in answer.headers
    result = message(answer)["result"]
    assert result["protocolVersion"] == version
    assert result["serverInfo"]["name"] == "volant"
    told = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    assert (await served.client.post(PATH, json=told, headers=BOTH)).status_code == 202
    assert (await rpc(served, "tools/list", {}))["result"]["tools"]


async def test_the_newest_version_needs_no_initialize(served: Api) -> None:
    found = (await rpc(served, "server/discover", {}, modern=True))["result"]
    assert found["supportedVersions"] == [MODERN]
    assert found["capabilities"].keys() == {"tools", "resources"}
    listed = (await rpc(served, "tools/list", {}, modern=True))["result"]
    assert [tool["name"] for tool in listed["tools"]] == [tool.name for tool in tools(TABLE)]
    # It depends on the role of the caller.
    assert listed["cacheScope"] == "private"


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"MCP-Protocol-Version": "2030-01-01", "Mcp-Method": "tools/list"}, 400, -32022),
        ({"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call"}, 400, -32020),
        ({"MCP-Protocol-Version": MODERN}, 400, -32020),
    ],
)
async def test_headers_that_do_not_fit_are_refused(
    served: Api, headers: dict[str, str], status: int, code: int
) -> None:
    meta = {f"{META}/protocolVersion": headers["MCP-Protocol-Version"], f"{META}/clientCapabilities": {}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}
    answer = await served.client.post(PATH, json=body, headers={**BOTH, **headers})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_get_and_delete_are_405(served: Api) -> None:
    for method in ("GET", "DELETE"):
        answer = await served.client.request(method, PATH, headers={"Accept": "text/event-stream"})
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_a_client_that_takes_no_stream_gets_json(served: Api) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    answer = await served.client.post(PATH, json=body, headers={"Accept": "application/json"})
    assert answer.json() == {"jsonrpc": "2.0", "id": 1, "result": {}}
    refused = await served.client.post(PATH, json=body, headers={"Accept": "text/html"})
    assert (refused.status_code, refused.headers["content-type"]) == (406, "application/problem+json")


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, -32700),
        (b"", 400, -32700),
        (b"\xff", 400, -32700),
        (b"[" * 100_000, 400, -32700),
        (b"[1]", 400, -32602),
        (b'{"jsonrpc":"1.0","id":1,"method":"ping"}', 400, -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"nope"}', 200, -32601),
    ],
)
async def test_what_is_no_message_is_answered_as_json_rpc_wants(
    served: Api, content: bytes, status: int, code: int
) -> None:
    headers = {**BOTH, "Content-Type": "application/json"}
    answer = await served.client.post(PATH, content=content, headers=headers)
    assert (answer.status_code, message(answer)["error"]["code"]) == (status, code)


@pytest.mark.parametrize("id", [{}, [], 1.5, True, None])
async def test_a_request_whose_id_is_none_is_no_notification(served: Api, id: object) -> None:
    answer = await served.client.post(PATH, json={"jsonrpc": "2.0", "method": "tools/list", "id": id})
    assert (answer.status_code, answer.json()["field"]) == (400, "id")


async def test_a_body_that_is_neither_form_is_a_400_with_a_hint(served: Api) -> None:
    neither = await served.client.post(PATH, json={"method": "tools/list"})
    assert (neither.status_code, neither.headers["content-type"]) == (400, "application/problem+json")
    assert "jsonrpc" in neither.json()["hint"]
    wrong = await served.client.post(PATH, json={"command": 1})
    assert (wrong.status_code, wrong.json()["field"]) == (400, "command")
    form = await served.client.post(PATH, content=b"command=x", headers={"Content-Type": "text/plain"})
    assert form.status_code == 415


async def test_a_body_over_a_mebibyte_is_too_large(served: Api) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "vms_list", "x": "x" * 1024 * 1024}}
    assert (await served.client.post(PATH, json=body, headers=BOTH)).status_code == 413


async def test_a_foreign_page_gets_nothing(served: Api) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    answer = await served.client.post(PATH, json=body, headers={**BOTH, "Origin": "https://evil.example"})
    assert answer.status_code == 403


# The tools


async def test_tools_declare_their_arguments_results_and_hints(served: Api) -> None:
    tools = {tool["name"]: tool for tool in (await rpc(served, "tools/list", {}))["result"]["tools"]}
    for tool in tools.values():
        assert re.fullmatch(r"[a-z]+_[a-z_]+", tool["name"])
        assert len(tool["description"]) > 60
        assert tool["inputSchema"]["type"] == tool["outputSchema"]["type"] == "object"
        assert tool["inputSchema"]["additionalProperties"] is False
        assert "$ref" not in json.dumps(tool)
    hints = {name: tool["annotations"] for name, tool in tools.items()}
    for operation in TABLE:
        for declared in operation.tools:
            hint = hints.pop(declared.name or str(operation.client).replace(".", "_"))
            reads = operation.method == "GET"
            assert (hint["readOnlyHint"], hint["destructiveHint"]) == (reads, declared.destructive)
            assert hint["idempotentHint"] is (reads or declared.idempotent)
    # Those that are written by hand.
    assert {name for name, hint in hints.items() if hint["readOnlyHint"]} == {
        "vms_read_file", "vms_logs", "vms_events", "plugins_list",
    }  # fmt: skip
    assert {name for name, hint in hints.items() if hint["destructiveHint"]} == {
        "vms_exec", "vms_write_file", "vms_call_action",
    }  # fmt: skip
    # What REST takes, a tool takes: it is the same struct.
    created = tools["vms_create"]["inputSchema"]
    assert created["required"] == ["name"]
    assert created["properties"]["env"]["description"]


@pytest.mark.parametrize("modern", [False, True])
async def test_failures_are_for_the_model_to_read(served: Api, modern: bool) -> None:
    missing = await call(served, "vms_get", modern=modern, vm="nobody")
    assert missing["isError"] is True
    assert "there is no VM named 'nobody'" in missing["content"][0]["text"]
    assert "`vms_list` shows what there is" in missing["content"][0]["text"]
    wrong = await call(served, "vms_create", modern=modern, name="a", cpu_cores="two", memory_mb=128)
    assert wrong["isError"] is True
    assert "cpu_cores" in wrong["content"][0]["text"]
    lacking = await call(served, "vms_exec", modern=modern, vm="a")
    assert lacking["content"][0]["text"] == "the call lacks the field 'command'"
    surplus = await call(served, "vms_list", modern=modern, colour="red")
    assert "colour" in surplus["content"][0]["text"]
    unknown = await rpc(served, "tools/call", {"name": "vms_fly", "arguments": {}}, modern=modern)
    assert unknown["error"]["code"] == -32602


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        r'{"plugin": "\ud800"}',
        r'{"\ud800": 1}',
        '{"limit": %s}' % ("9" * 200),
        '{"labels": %s}' % ("[" * 150 + "]" * 150),
    ],
)
async def test_arguments_that_can_not_be_encoded_are_the_clients_fault(
    served: Api, caplog: pytest.LogCaptureFixture, arguments: str, modern: bool
) -> None:
    headers = {**BOTH, "Content-Type": "application/json"}
    meta = ""
    if modern:
        headers |= {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "vms_list"}
        meta = f', "_meta": {{"{META}/protocolVersion": "{MODERN}", "{META}/clientCapabilities": {{}}}}'
    params = f'{{"name": "vms_list", "arguments": {arguments}{meta}}}'
    text = f'{{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {params}}}'
    answer = await served.client.post(PATH, content=text.encode(), headers=headers)
    told = message(answer)
    assert told.get("error", {}).get("code") == -32700 or told["result"]["isError"] is True
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_vm_that_fails_to_boot_is_reported_with_its_reason_and_progress(served: Api) -> None:
    arguments = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
    params = {"name": "vms_create", "arguments": arguments, "_meta": {"progressToken": "mine"}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    answer = await served.client.post(PATH, json=body, headers=BOTH)
    result = message(answer)["result"]
    assert result["isError"] is True
    assert result["structuredContent"]["outcome"] == "failed"
    assert result["structuredContent"]["vm"]["reason"]["code"] == "image_missing"
    assert json.loads(result["content"][0]["text"]) == result["structuredContent"]
    link = next(block for block in result["content"] if block["type"] == "resource_link")
    assert link["uri"] == "volant://vms/demo/logs"
    progress = [json.loads(data)["params"] for data in re.findall(r"data: (.*progress.*?)\r?\n", answer.text)]
    assert {one["progressToken"] for one in progress} == {"mine"}
    assert any("preparing the image" in one["message"] for one in progress)
    # Its end is the same as REST's.
    assert (await call(served, "vms_get", vm="demo"))["structuredContent"] == (
        await served.client.get("/api/v1/vms/demo")
    ).json()
    stopped = (await call(served, "vms_stop", vm="demo"))["structuredContent"]
    assert (stopped["outcome"], stopped["vm"]["status"]) == ("done", "stopped")
    assert (await call(served, "vms_delete", vm="demo"))["structuredContent"] == {"name": "demo", "deleted": True}


async def test_lists_come_in_pages_that_fit(served: Api) -> None:
    for number in range(7):
        await served.crashed(f"vm-{number}", labels={"big": "x" * 200, "odd": str(number % 2)})
    seen: list[str] = []
    cursor: int | None = 0
    while cursor is not None:
        page = (await call(served, "vms_list", limit=3, cursor=cursor))["structuredContent"]
        assert page["total"] == 7
        seen += [vm["name"] for vm in page["vms"]]
        cursor = page["next_cursor"]
    assert seen == [f"vm-{number}" for number in range(7)]
    odd = (await call(served, "vms_list", labels={"odd": "1"}, status=["crashed"]))["structuredContent"]
    assert [vm["name"] for vm in odd["vms"]] == ["vm-1", "vm-3", "vm-5"]
    assert (await call(served, "vms_list", status=["running"]))["structuredContent"]["vms"] == []


async def test_events_continue_after_the_last_page(served: Api) -> None:
    await served.crashed("one")
    newest = (await call(served, "vms_events"))["structuredContent"]
    assert [event["type"] for event in newest["events"]] == ["VM_CREATED", "VM_STARTING", "VM_CRASHED"]
    assert (await call(served, "vms_events", since=newest["next"]))["structuredContent"]["events"] == []
    oldest = (await call(served, "vms_events", since="0", limit=1))["structuredContent"]
    assert [event["type"] for event in oldest["events"]] == ["VM_CREATED"]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.create, "two")
        waited = await call(served, "vms_events", since=newest["next"], vm="two", wait_s=10)
    assert waited["structuredContent"]["events"][0]["name"] == "two"
    gone = (await call(served, "vms_events", since="other-7"))["structuredContent"]
    assert gone["gap"]["requested"] == "other-7"
    assert gone["events"]


async def test_the_end_of_a_log_is_kept_and_new_lines_follow(served: Api) -> None:
    await served.crashed("demo")
    row = served.deps.store.projection.get(named("demo"))
    assert row is not None
    log = served.deps.logs.open(row.id, named(row.name))
    write(log, [f"line {number} " + "x" * 600 for number in range(300)])
    page = (await call(served, "vms_logs", vm="demo", tail=200))["structuredContent"]
    assert weight(page) <= MAX_TEXT
    assert page["lines"][-1]["line"].startswith("line 299 ")
    assert len(page["lines"]) + page["left_out"] == 200
    assert page["left_out"] > 0
    write(log, ["new", "\0" * 100_000])
    more = (await call(served, "vms_logs", vm="demo", since=page["next_since"]))["structuredContent"]
    assert more["lines"][0]["line"] == "new"
    assert "bytes left out" in more["lines"][1]["line"]
    assert more["lines"][-1]["seq"] == more["next_since"]
    assert (await call(served, "vms_logs", vm="demo", since=more["next_since"]))["structuredContent"]["lines"] == []
    early = (await call(served, "vms_logs", vm="demo", since=0))["structuredContent"]
    assert early["lines"][0]["line"].startswith("line 0 ")
    assert early["left_out"] == log.newest - early["next_since"] > 0
    text = (await rpc(served, "resources/read", {"uri": "volant://vms/demo/logs"}))["result"]["contents"][0]["text"]
    assert "stdout line 0 " in text
    assert len(text) <= 1024 * 1024


def write(log: Any, lines: list[str]) -> None:
    now = Host().clock.now()
    log.append([
        LogEntry(stream="stdout", line=line.encode(), timestamp=now, source="test", position=log.newest + number)
        for number, line in enumerate(lines, 1)
    ])  # fmt: skip


async def test_resources_are_listed_and_named_when_they_are_not_there(served: Api) -> None:
    await served.crashed("demo")
    listed = (await rpc(served, "resources/list", {}, modern=True))["result"]["resources"]
    assert [one["uri"] for one in listed] == ["volant://vms/demo", "volant://vms/demo/logs"]
    templates = (await rpc(served, "resources/templates/list", {}))["result"]["resourceTemplates"]
    assert [one["uriTemplate"] for one in templates] == [
        "volant://vms/{vm}", "volant://vms/{vm}/logs", "volant://vms/{vm}/files{+path}",
    ]  # fmt: skip
    read = (await rpc(served, "resources/read", {"uri": "volant://vms/demo"}))["result"]["contents"][0]
    assert json.loads(read["text"])["name"] == "demo"
    for uri in ("volant://vms/other", "volant://vms/demo/", "volant://vms/demo/files", "volant://vms/A", "x://y"):
        missing = (await rpc(served, "resources/read", {"uri": uri}, modern=True))["error"]
        assert (missing["code"], missing["data"]) == (-32602, {"uri": uri})


async def test_plugins_are_listed_with_their_actions(served: Api) -> None:
    manifest = {
        "name": "web", "workload": {"entrypoint": ["serve"], "port": 80},
        "actions": {"shot": {"path": "/shot", "description": "Take a screenshot", "input": {"type": "object"}}},
    }  # fmt: skip
    assert (await served.client.post("/api/v1/plugins", json=manifest)).status_code == 201
    (web,) = (await call(served, "plugins_list", plugin="web"))["structuredContent"]["plugins"]
    assert web["actions"] == [{"name": "shot", "description": "Take a screenshot", "input": {"type": "object"}}]
    assert (await call(served, "plugins_list", plugin="none"))["isError"] is True


# Inside a VM: the agent is the real one, in this process


class Demo:
    """A VM called `demo` whose agent answers, and what its workload says."""

    def __init__(self, served: Api) -> None:
        self.served = served
        self.serves: dict[str, tuple[int, str, bytes]] = {}
        self.asked: list[tuple[str, bytes]] = []

    async def call(self, tool: str, **arguments: Any) -> Any:
        return await call(self.served, tool, vm="demo", **arguments)


@pytest.fixture
def limits() -> Limits:
    return FAST


@pytest.fixture
async def demo(tmp_path: Path, limits: Limits) -> AsyncIterator[Demo]:
    found: list[Demo] = []

    async def workload(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            one = await receive()
            if one["type"] == "http.disconnect":
                return
            body, more = body + one["body"], one["more_body"]
        query = scope["query_string"].decode()
        found[0].asked.append((scope["method"] + " " + scope["path"] + (f"?{query}" if query else ""), body))
        status, kind, text = found[0].serves[scope["path"]]
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
        await send({"type": "http.response.body", "body": text})

    state = tmp_path / "state"
    state.mkdir()
    actions = {"shot": {"path": "/shot"}, "find": {"path": "/find", "method": "GET"}}
    async with web_vm(state, workload, limits, actions=actions) as served:
        found.append(Demo(served))
        yield found[0]


async def test_a_command_ends_with_its_code_and_its_output(demo: Demo) -> None:
    ran = await demo.call("vms_exec", command=["sh", "-c", "cat; echo $A >&2; exit 3"], stdin="in", env={"A": "b"})
    assert ran["isError"] is False
    assert ran["structuredContent"] == {
        "exit_code": 3, "signal": None, "error": None, "stdout": "in", "stderr": "b\n",
        "stdout_bytes": 2, "stderr_bytes": 2, "truncated": False,
    }  # fmt: skip
    missing = await demo.call("vms_exec", command=["no-such-program"])
    assert missing["isError"] is True
    assert missing["structuredContent"]["error"]
    late = await demo.call("vms_exec", command=["sh", "-c", "echo begun; sleep 100"], timeout_s=0.3)
    assert late["isError"] is True
    assert late["structuredContent"]["stdout"] == "begun\n"


@pytest.mark.parametrize("character", ["x", "\\0", "é"])
async def test_long_output_keeps_its_head_and_its_tail(demo: Demo, character: str) -> None:
    script = f"import sys; print('HEAD', '{character}' * 300_000, 'TAIL'); print('oops', file=sys.stderr)"
    ran = await demo.call("vms_exec", command=["python3", "-c", script])
    assert len(ran["content"][0]["text"].encode()) <= MAX_TEXT
    stdout = ran["structuredContent"]["stdout"]
    assert stdout.startswith("HEAD")
    assert stdout.endswith("TAIL\n")
    assert re.search(r"\n\[… \d+ bytes left out …\]\n", stdout)
    assert ran["structuredContent"]["stderr"] == "oops\n"
    assert ran["structuredContent"]["truncated"] is True


async def test_files_are_written_and_read_as_they_are(demo: Demo, tmp_path: Path) -> None:
    path = str(tmp_path / "a file")
    wrote = await demo.call("vms_write_file", path=path, content="grüße\n")
    assert wrote["structuredContent"] == {"path": path, "size": 8}
    read = (await demo.call("vms_read_file", path=path))["structuredContent"]
    assert (read["content"], read["encoding"], read["size"], read["truncated"]) == ("grüße\n", "utf-8", 8, False)
    blob = bytes(range(256))
    await demo.call("vms_write_file", path=path, content=base64.b64encode(blob).decode(), encoding="base64")
    read = (await demo.call("vms_read_file", path=path))["structuredContent"]
    assert (base64.b64decode(read["content"]), read["encoding"]) == (blob, "base64")
    uri = "volant://vms/demo/files" + path.replace(" ", "%20")
    resource = (await rpc(demo.served, "resources/read", {"uri": uri}))["result"]["contents"][0]
    assert base64.b64decode(resource["blob"]) == blob
    missing = (await rpc(demo.served, "resources/read", {"uri": "volant://vms/demo/files/no/such"}))["error"]
    assert missing["code"] == -32602
    assert "there is no" in missing["message"]
    bad = await demo.call("vms_write_file", path=path, content="!", encoding="base64")
    assert "content" in bad["content"][0]["text"]
    assert "there is no" in (await demo.call("vms_read_file", path="/no/such"))["content"][0]["text"]
    assert "is a directory" in (await demo.call("vms_read_file", path=str(tmp_path)))["content"][0]["text"]
    assert (await demo.call("vms_read_file", path="relative"))["isError"] is True
    assert (await demo.call("vms_read_file", path="/proc/self/status"))["structuredContent"]["size"] > 100


@pytest.mark.parametrize("line", ["0123456789\n", "é" * 9 + "\n", "\x01" * 20 + "\n"])
async def test_a_long_file_is_shown_at_both_ends_and_read_on_in_pages(demo: Demo, tmp_path: Path, line: str) -> None:
    path = tmp_path / "long"
    whole = "HEAD" + line * 20_000 + "TAIL"
    await trio.Path(path).write_text(whole)
    first = await demo.call("vms_read_file", path=str(path))
    assert len(first["content"][0]["text"].encode()) <= MAX_TEXT
    link = next(block for block in first["content"] if block["type"] == "resource_link")
    assert link["uri"] == f"volant://vms/demo/files{path}"
    page = first["structuredContent"]
    head, _, _ = page["content"].partition("\n[… ")
    assert whole.startswith(head)
    assert page["content"].endswith("TAIL")
    assert (page["truncated"], page["size"]) == (True, len(whole.encode()))
    text = head
    while page["next_offset"] is not None:
        answer = await demo.call("vms_read_file", path=str(path), offset=page["next_offset"])
        assert len(answer["content"][0]["text"].encode()) <= MAX_TEXT
        page = answer["structuredContent"]
        assert page["encoding"] == "utf-8"
        text += page["content"]
    assert text == whole


async def test_an_action_is_called_and_its_answer_returned(demo: Demo) -> None:
    demo.serves["/shot"] = (200, "application/json", b'{"title": "Page"}')
    done = await demo.call("vms_call_action", action="shot", input={"url": "x"})
    assert done["structuredContent"]["output"] == {"title": "Page"}
    assert demo.asked == [("POST /shot", b'{"url":"x"}')]
    demo.serves["/find"] = (404, "text/plain", b"nothing of that")
    failed = await demo.call("vms_call_action", action="find", input={"q": "a b", "n": 1})
    assert failed["isError"] is True
    assert failed["structuredContent"]["output"] == "nothing of that"
    assert demo.asked[1] == ("GET /find?q=a+b&n=1", b"")
    demo.serves["/shot"] = (200, "image/png", b"\x89PNG" * 100)
    picture = await demo.call("vms_call_action", action="shot")
    image = next(block for block in picture["content"] if block["type"] == "image")
    assert (base64.b64decode(image["data"]), image["mimeType"]) == (b"\x89PNG" * 100, "image/png")
    demo.serves["/shot"] = (200, "text/html", b"<p>" * 1_000_000)
    long = await demo.call("vms_call_action", action="shot")
    assert long["structuredContent"]["truncated"] is True
    assert len(long["content"][0]["text"].encode()) <= MAX_TEXT
    assert "there are find, shot" in (await demo.call("vms_call_action", action="fly"))["content"][0]["text"]


class Garbling:
    """An agent whose every answer is this one."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.headers: list[tuple[bytes, bytes]] = []
        self._pieces = [body]

    @asynccontextmanager
    async def stream(self, *_: object, **__: object) -> AsyncIterator[Garbling]:
        yield self

    async def read(self, limit: int) -> bytes:
        return await anext(self, b"")

    def __aiter__(self) -> Garbling:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._pieces:
            raise StopAsyncIteration
        return self._pieces.pop()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [(200, b'{"stream":"stdout\xff"}\n', "does not answer"), (409, b'{"detail": "\xff"}', "the agent answered 409")],
)
async def test_an_agent_that_garbles_its_answer_is_the_guests_fault(
    served: Api, caplog: pytest.LogCaptureFixture, status: int, body: bytes, expected: str
) -> None:
    await served.crashed("demo")
    agent: Any = Garbling(status, body)
    served.reach(lambda name: agent)
    failed = await call(served, "vms_exec", vm="demo", command=["true"])
    assert failed["isError"] is True
    assert expected in failed["content"][0]["text"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("modern", [False, True])
async def test_a_client_that_leaves_ends_its_command(demo: Demo, tmp_path: Path, modern: bool) -> None:
    mark = tmp_path / "pid"
    script = f"echo $$ > {mark}; exec sleep 1000"
    params: dict[str, Any] = {"name": "vms_exec", "arguments": {"vm": "demo", "command": ["sh", "-c", script]}}
    headers = {**BOTH, "Content-Type": "application/json"}
    if modern:
        params["_meta"] = {f"{META}/protocolVersion": MODERN, f"{META}/clientCapabilities": {}}
        headers |= {"MCP-Protocol-Version": MODERN, "Mcp-Method": "tools/call", "Mcp-Name": "vms_exec"}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    async with await demo.served.server.connect() as stream:
        await stream.send_all(request("POST", PATH, body, **headers))
        await until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    process = Path(f"/proc/{mark.read_text().strip()}")
    await until(lambda: not process.exists())


@pytest.mark.parametrize("limits", [replace(FAST, bodies=3000, small_body=100)])
async def test_large_calls_wait_for_no_memory(demo: Demo, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    async with trio.open_nursery() as nursery:
        script = ["sh", "-c", f"echo > {mark}; exec sleep 1000"]
        nursery.start_soon(partial(demo.call, "vms_exec", command=script, stdin="x" * 2000))
        await until(mark.exists)
        body = {"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": "x" * 2000}}
        refused = await demo.served.client.post(PATH, json=body, headers=BOTH)
        assert (refused.status_code, refused.headers["content-type"]) == (503, "application/problem+json")
        assert (await call(demo.served, "vms_list"))["isError"] is False
        nursery.cancel_scope.cancel()
    # The client has left, and what it had under way ends once the daemon knows.
    with trio.fail_after(10):
        while (await demo.served.client.post(PATH, json=body, headers=BOTH)).status_code == 503:
            pass


async def test_the_daemon_that_stops_answers_first(demo: Demo, tmp_path: Path) -> None:
    mark = tmp_path / "begun"
    answers: list[Any] = []

    async def run() -> None:
        answers.append(await demo.call("vms_exec", command=["sh", "-c", f"echo > {mark}; sleep 1000"]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await until(mark.exists)
        await demo.served.server.stop()
    assert answers[0]["isError"] is True
    assert answers[0]["content"][0]["text"].startswith("the daemon stops")


# The document's own form


async def test_commands_answer_what_rest_answers(served: Api) -> None:
    assert await command(served, "volant.vms.list") == {"result": [], "error": ""}
    made = await command(served, "volant.vms.create", name="demo", cpu_cores=1, memory_mb=128)
    assert (made["result"]["name"], made["error"]) == ("demo", "")
    await served.client.get("/api/v1/vms/demo?wait=crashed")
    got = await command(served, "volant.vms.get", name="demo")
    assert got == {"result": (await served.client.get("/api/v1/vms/demo")).json(), "error": ""}
    listed = await command(served, "volant.vms.list", status=["crashed"], labels={})
    assert listed == {"result": (await served.client.get("/api/v1/vms")).json(), "error": ""}
    assert await command(served, "volant.vms.delete", name="demo") == {"result": None, "error": ""}
    able = await command(served, "volant.system.get_capabilities")
    assert able["result"]["plugins"] == ["base"]
    assert MODERN in able["result"]["mcp_versions"]
    assert set(able["result"]["commands"]) == {
        "volant.vms.list", "volant.vms.create", "volant.vms.get", "volant.vms.delete",
        "volant.system.get_capabilities",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params", "named"),
    [
        ("volant.vms.fly", {}, "volant.vms.fly"),
        ("volant.vms.get", {"name": "nobody"}, "nobody"),
        ("volant.vms.get", {}, "name"),
        ("volant.vms.get", {"name": 7}, "name"),
        ("volant.vms.create", {"name": "a", "cpu_cores": 1, "memory_mb": 1}, "memory_mb"),
        ("volant.vms.create", {"name": "A", "cpu_cores": 1, "memory_mb": 128}, "name"),
        ("volant.vms.list", {"limit": 1}, "limit"),
        ("volant.system.get_capabilities", {"x": 1}, "x"),
    ],
)
async def test_a_command_that_fails_has_the_reason_and_names_the_field(
    served: Api, name: str, params: dict[str, Any], named: str
) -> None:
    answer = await command(served, name, **params)
    assert answer["result"] is None
    assert named in answer["error"]


async def test_a_command_that_waits_in_vain_is_answered_as_any(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stuck(*_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        raise Problem(503, "not-deleted", "its process does not end")

    await served.crashed("demo")
    monkeypatch.setattr(served.deps.vms, "delete", stuck)
    failed = await command(served, "volant.vms.delete", name="demo")
    assert failed == {"result": None, "error": "its process does not end"}


# How texts are cut


@pytest.mark.parametrize("make", [lambda n: "x" * n, lambda n: "\0" * n, lambda n: "é€😀" * (n // 3)])
@pytest.mark.parametrize("budget", [100, 1000, BUDGET])
def test_a_text_is_cut_to_its_budget_and_no_further(make: Callable[[int], str], budget: int) -> None:
    text = make(500_000)
    cut = clip(text, budget)
    assert budget - 60 <= weight(cut) <= budget
    short = make(budget // 10)
    assert clip(short, budget) is short


def test_a_window_keeps_both_ends_of_anything() -> None:
    for piece in (1, 7, 4096):
        window = Window(1000)
        data = bytes(range(256)) * 400
        for start in range(0, len(data), piece):
            window.add(data[start : start + piece])
        assert window.size == len(data)
        assert not window.is_whole
        assert window.head == data[:1000]
    whole = Window(1000)
    whole.add(b"x" * 1500)
    assert whole.is_whole
    assert whole.head == b"x" * 1500


def test_at_least_one_item_is_given_however_large() -> None:
    assert fitting(["x" * 100, "y"], 10) == ["x" * 100]
    assert fitting(["x", "y"], 100) == ["x", "y"]
    assert fitting([], 100) == []


async def test_hints_for_a_model_name_tools_instead_of_commands(served: Api) -> None:
    network = {"name": "a", "cpu_cores": 1, "memory_mb": 128, "network": "missing"}
    for tool, arguments in (("vms_get", {"vm": "missing"}), ("vms_create", network)):
        failed = await call(served, tool, **arguments)
        assert failed["isError"] is True
        assert "volar" not in failed["content"][0]["text"]
    assert "vms_list" in (await call(served, "vms_get", vm="missing"))["content"][0]["text"]


def test_a_hint_names_tools_and_marks_what_only_an_operator_can_do() -> None:
    assert hint_for_a_model("`volar vms start demo` starts it") == "`vms_start` starts it"
    drained = hint_for_a_model("`volar system undrain` ends it; VMs that run go on")
    assert drained == "`volar system undrain` (to be run by the operator) ends it; VMs that run go on"


async def test_a_generated_client_reads_and_writes_a_file_below_a_directory(demo: Demo, tmp_path: Path) -> None:
    client, files = demo.served.client, "/api/v1/vms/demo/agent/v1/files/"
    path = f"{tmp_path}/a b"
    for encoded in (quote(path[1:], safe=""), quote(path[1:], safe="").replace("%2F", "%2f")):
        assert (await client.put(files + encoded, content=b"text")).status_code in (201, 204)
        assert (await client.get(files + encoded)).content == b"text"
    assert Path(path).read_bytes() == b"text"  # noqa: ASYNC240
    # Decoded once, and checked as any other path.
    Path(tmp_path, "%2F").write_bytes(b"literal")  # noqa: ASYNC240
    assert (await client.get(files + quote(f"{tmp_path}/%2F"[1:], safe=""))).content == b"literal"
    for wrong in ("..%2Fetc%2Fpasswd", "etc%2F..%2Fpasswd", "etc%2F%2e%2E%2Fpasswd", "etc%2F.%2Fpasswd", "etc%2F%00"):
        assert (await demo.served.server.get(files + wrong)).status == 400, wrong
    assert (await demo.served.server.get(files + "..%2Fdaemon%2Flogs")).status in (400, 404)
