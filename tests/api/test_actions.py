"""A VM's actions and its OpenAPI document: what its own manifest says, asked of its workload, within bounds."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.api.kit import Api, api, request, web_vm
from volant.api._workload_api import through_proxy

DOCUMENT: dict[str, Any] = {"openapi": "3.1.0", "info": {"title": "Web", "version": "1"}, "paths": {"/shot": {}}}
HOME = "/api/v1/vms/demo"


@dataclass
class Web:
    """A VM called `demo` of the plugin `web`, whose agent answers and whose workload is this."""

    api: Api
    seen: list[dict[str, Any]] = field(default_factory=list)
    """The scopes of what the workload was asked."""
    bodies: list[bytes] = field(default_factory=list)
    serves: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    """By path: status, content type, body."""

    async def call(self, action: str, **more: Any) -> httpx.Response:
        return await self.api.client.post(f"{HOME}/actions/web/{action}", **more)

    async def document(self) -> httpx.Response:
        return await self.api.client.get(f"{HOME}/openapi")

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        self.bodies.append(body)
        if scope["path"] == "/silent":
            await trio.sleep_forever()
        status, kind, text = self.serves.get(scope["path"], (404, "text/plain", b"none"))
        headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(text)), (b"set-cookie", b"a=b")]
        if scope["path"] == "/half":
            headers[1] = (b"content-length", b"%d" % (len(text) + 1))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": scope["path"] == "/half"})
        if scope["path"] == "/half":
            await trio.sleep_forever()


ACTIONS = {
    "shot": {"path": "/v1/shot"},
    "find": {"path": "/find", "method": "GET"},
    "slow": {"path": "/silent", "timeout_s": 0.2},
    "half": {"path": "/half", "timeout_s": 0.2},
}


@asynccontextmanager
async def web(path: Path, *, listens: bool = True, **members: Any) -> AsyncIterator[Web]:
    found: list[Web] = []

    async def loopback(scope: Any, receive: Any, send: Any) -> None:
        await found[0].answer(scope, receive, send)

    if not listens:
        members["workload"] = {"entrypoint": ["serve"], "port": 1}
    async with web_vm(path, loopback, actions=ACTIONS, **members) as served:
        found.append(Web(served))
        yield found[0]


async def test_body_type_and_query_go_to_the_path_of_the_manifest(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        demo.serves["/v1/shot"] = (201, "image/png", b"\x89PNG")
        answer = await demo.call("shot?full=1&a=%2F", content=b"\xff\x00", headers={"Content-Type": "x/y"})
        assert (answer.status_code, answer.content) == (201, b"\x89PNG")
        assert answer.headers["content-type"] == "image/png"
        (seen,) = demo.seen
        assert (seen["method"], seen["raw_path"], seen["query_string"]) == ("POST", b"/v1/shot", b"full=1&a=%2F")
        assert dict(seen["headers"])[b"content-type"] == b"x/y"
        assert demo.bodies == [b"\xff\x00"]


async def test_the_method_is_the_manifests(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        demo.serves["/find"] = (200, "text/plain", b"found")
        assert (await demo.call("find")).text == "found"
        assert demo.seen[0]["method"] == "GET"
        for method in ("GET", "PUT", "DELETE"):
            refused = await demo.api.client.request(method, f"{HOME}/actions/web/find")
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


async def test_an_answer_of_a_workload_never_runs_with_our_origin(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        demo.serves["/find"] = (200, "text/html", b"<script>")
        answer = await demo.call("find", headers={"Cookie": "secret=1", "Authorization": "Bearer secret"})
        assert answer.headers["content-security-policy"] == "sandbox"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers
        assert b"secret" not in b"".join(value for _, value in demo.seen[0]["headers"])


async def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        client = demo.api.client
        no_vm = await client.post("/api/v1/vms/other/actions/web/shot")
        assert (no_vm.status_code, no_vm.json()["vm"]) == (404, "other")
        no_plugin = await client.post(f"{HOME}/actions/base/shot")
        assert (no_plugin.status_code, no_plugin.json()["field"]) == (404, "plugin")
        assert "'web'" in no_plugin.json()["detail"]
        no_action = await demo.call("shoot")
        assert (no_action.status_code, no_action.json()["field"]) == (404, "action")
        assert no_action.json()["hint"] == "there are find, half, shot, slow"
        assert not demo.seen


async def test_a_vm_that_does_not_run_is_a_conflict(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        manifest = {"name": "web", "workload": {"entrypoint": ["x"], "port": 80}, "actions": {"a": {"path": "/"}}}
        await served.client.post("/api/v1/plugins", json=manifest)
        await served.crashed("demo", plugin="web")
        answer = await served.client.post(f"{HOME}/actions/web/a")
        assert (answer.status_code, answer.json()["vm"]) == (409, "demo")
        # One that is not there is not there whether the VM runs or not.
        assert (await served.client.post(f"{HOME}/actions/web/b")).status_code == 404


async def test_a_workload_that_can_not_be_reached_is_a_502(tmp_path: Path) -> None:
    async with web(tmp_path, listens=False) as demo:
        answer = await demo.call("shot")
        assert (answer.status_code, answer.json()["vm"]) == (502, "demo")
        assert "port 1" in answer.json()["detail"]


async def test_an_action_that_takes_too_long_is_a_502(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        with trio.fail_after(10):
            answer = await demo.call("slow", json={})
        assert answer.status_code == 502
        assert answer.json()["detail"] == "action 'slow' of VM 'demo' took longer than the 0.2 s that it has"


async def test_an_answer_that_takes_too_long_breaks_off(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        demo.serves["/half"] = (200, "text/plain", b"half")
        with trio.fail_after(10):
            async with await demo.api.server.connect() as stream:
                await stream.send_all(request("POST", f"{HOME}/actions/web/half", b""))
                data = b""
                while piece := await stream.receive_some():
                    data += piece
        assert data.startswith(b"HTTP/1.1 200 ")
        assert data.endswith(b"\r\n\r\nhalf")


# The document


async def test_the_manifest_names_the_path_of_the_document(tmp_path: Path) -> None:
    async with web(tmp_path, openapi="/docs/api") as demo:
        demo.serves["/docs/api"] = (200, "application/json", json.dumps(DOCUMENT).encode())
        answer = await demo.document()
        assert answer.status_code == 200
        assert answer.json() == {**DOCUMENT, "servers": [{"url": f"{HOME}/agent"}]}
        assert answer.headers["content-security-policy"] == "sandbox"
        assert demo.seen[0]["raw_path"] == b"/docs/api"


async def test_the_manifest_has_the_document_itself_whether_the_vm_runs_or_not(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await served.client.post("/api/v1/plugins", json={"name": "web", "openapi": DOCUMENT})
        await served.crashed("demo", plugin="web")
        for _ in range(2):
            answer = await served.client.get(f"{HOME}/openapi")
            assert answer.json() == {**DOCUMENT, "servers": [{"url": f"{HOME}/agent"}]}
        assert (await served.client.get("/api/v1/plugins/web/manifest")).json()["openapi"] == DOCUMENT


async def test_a_running_workloads_document_overrides_the_manifests(tmp_path: Path) -> None:
    async with web(tmp_path, openapi={**DOCUMENT, "info": {"title": "Kept", "version": "1"}}) as demo:
        own = {**DOCUMENT, "servers": [{"url": "http://localhost:8080/v2"}]}
        demo.serves["/openapi.json"] = (200, "application/json", json.dumps(own).encode())
        assert (await demo.document()).json() == {**DOCUMENT, "servers": [{"url": f"{HOME}/agent/v2"}]}
        for status, kind, body, _ in BROKEN:
            demo.serves["/openapi.json"] = (status, kind, body)
            assert (await demo.document()).json()["info"]["title"] == "Kept"


async def test_where_the_workload_is_down_the_manifests_document_counts(tmp_path: Path) -> None:
    async with web(tmp_path, listens=False, openapi=DOCUMENT) as demo:
        assert (await demo.document()).json()["info"] == DOCUMENT["info"]


async def test_without_a_path_in_the_manifest_the_usual_path_is_tried(tmp_path: Path) -> None:
    async with web(tmp_path) as demo:
        for none in (
            (404, "text/plain", b""),
            (302, "text/plain", b""),
            (200, "text/html; charset=utf-8", b"<html>"),
            (200, "text/plain", b"hello"),
            (200, "application/json", b'{"count": 1}'),
        ):
            demo.serves["/openapi.json"] = none
            assert (await demo.document()).status_code == 404
        demo.serves["/openapi.json"] = (200, "application/json", json.dumps(DOCUMENT).encode())
        assert (await demo.document()).json()["info"] == DOCUMENT["info"]


async def test_without_a_document_it_is_a_404(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        assert (await served.client.get(f"{HOME}/openapi")).status_code == 404
        await served.client.post(
            "/api/v1/plugins", json={"name": "web", "openapi": "/x", "workload": {"entrypoint": ["x"], "port": 80}}
        )
        await served.crashed("demo")
        await served.crashed("stopped", plugin="web")
        none = await served.client.get(f"{HOME}/openapi")
        assert (none.status_code, none.json()["vm"]) == (404, "demo")
        stopped = await served.client.get("/api/v1/vms/stopped/openapi")
        assert stopped.status_code == 404
        assert "crashed" in stopped.json()["detail"]


BROKEN = [
    (404, "text/plain", b"none", "the status 404"),
    (500, "application/json", b"{}", "the status 500"),
    (200, "application/yaml", b"openapi: 3.1.0", "as YAML"),
    (200, "application/json", b"openapi: 3.1.0", "no JSON"),
    (200, "application/json", b"\xff", "no JSON"),
    (200, "application/json", b"[" * 500_000, "no JSON"),
    (200, "application/json", b"[]", "no OpenAPI document"),
    (200, "application/json", b'{"swagger": "2.0"}', "no OpenAPI document"),
    (200, "application/json", b'{"openapi": "3.1.0", "x": ' + b"[" * 70 + b"]" * 70 + b"}", "too deeply"),
    (200, "application/json", b'{"openapi": "3.1.0", "x": "' + b"x" * 1_048_576 + b'"}', "1048576 bytes"),
]


async def test_a_broken_document_at_the_manifests_path_is_a_502_with_the_cause(tmp_path: Path) -> None:
    async with web(tmp_path, openapi="/doc") as demo:
        for status, kind, body, words in BROKEN:
            demo.serves["/doc"] = (status, kind, body)
            answer = await demo.document()
            assert answer.status_code == 502, (body[:50], answer.text)
            assert words in answer.json()["detail"]
            assert len(answer.content) < 1000


async def test_a_workload_that_is_down_is_a_502(tmp_path: Path) -> None:
    async with web(tmp_path, listens=False) as demo:
        assert (await demo.document()).status_code == 502


def proxied(servers: Any, **paths: Any) -> Any:
    return through_proxy({"openapi": "3.1.0", "servers": servers, "paths": paths}, "demo", "/docs/openapi.json")


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("/", ""),
        ("", ""),
        ("http://localhost:8080", ""),
        ("https://api.example/v2/", "/v2"),
        ("/api", "/api"),
        ("v2", "/docs/v2"),
        ("{scheme}://host/{base}/x", "/b/x"),
    ],
)
def test_the_path_of_a_server_is_kept(url: str, base: str) -> None:
    variables = {"scheme": {"default": "https"}, "base": {"default": "b"}}
    (server,) = proxied([{"url": url, "variables": variables, "description": "It"}])["servers"]
    assert server == {"url": f"{HOME}/agent{base}", "description": "It"}


@pytest.mark.parametrize(
    "servers",
    [
        None,
        "x",
        [],
        [{"url": 3}],
        [7],
        [{"url": "http://[/"}],
        [{"url": "mailto:x"}],
        [{"url": "/a/../../.."}],
        [{"url": "/%2e%2e/x"}],
        [{"url": "/a\\..\\.."}],
        [{"url": "{x}", "variables": {"x": {"default": "/.."}}}],
    ],
)
def test_an_invalid_server_leads_nowhere_else(servers: Any) -> None:
    for server in proxied(servers)["servers"]:
        assert server["url"] == f"{HOME}/agent" or ".." not in server["url"]
        assert server["url"].startswith(f"{HOME}/agent")


def test_the_variables_of_a_server_do_not_fill_the_memory() -> None:
    bombs = [
        {"url": "/" + "{x}" * count, "variables": {"x": {"default": "x" * size}}}
        for count, size in ((170_000, 500_000), (600, 500_000), (600, 256))
    ]
    found = proxied([*bombs, {"url": "/v{x}", "variables": {"x": {"default": 2}}}])
    assert len(json.dumps(found)) < 10_000


def test_many_servers_and_many_paths_take_no_long_time() -> None:
    paths = {f"/p{number}": {"servers": [{"url": f"/b{number}/{n}"} for n in range(16)]} for number in range(2_000)}
    paths |= {f"/q{number}": {} for number in range(40_000)}
    began = time.process_time()
    assert proxied(None, **paths)["servers"] == [{"url": f"{HOME}/agent"}]
    # Each of the one with each of the other would be minutes.
    assert time.process_time() - began < 10


def test_servers_of_paths_and_methods_are_rewritten_too() -> None:
    elsewhere = [{"url": "https://evil.example/x"}]
    found = proxied(None, **{"/a": {"servers": elsewhere, "get": {"servers": elsewhere}, "put": {}}})
    assert "evil" not in json.dumps(found)
    assert found["paths"]["/a"]["get"]["servers"] == [{"url": f"{HOME}/agent/x"}]
    assert found["paths"]["/a"]["put"] == {}


def test_no_other_object_of_a_document_names_a_server() -> None:
    elsewhere = [{"url": "https://evil.example/x"}]
    callback = {"called": {"{$request.body#/url}": {"servers": elsewhere, "post": {"servers": elsewhere}}}}
    answer = {"links": {"next": {"operationId": "x", "server": elsewhere[0]}}}
    schema = {"properties": {"server": {"type": "string"}, "servers": {"type": "array"}}, "required": ["servers"]}
    document = {
        "openapi": "3.1.0",
        "paths": {"/a": {"$ref": "#/components/pathItems/A"}, "/b": {"post": {"callbacks": callback}}},
        "webhooks": {"hook": {"servers": elsewhere, "post": {"responses": {"200": answer}}}},
        "components": {
            "pathItems": {"A": {"servers": elsewhere, "get": {"servers": elsewhere}}},
            "schemas": {"S": schema},
        },
    }
    found = through_proxy(document, "demo", "/openapi.json")
    assert "evil" not in json.dumps(found)
    assert found["components"]["schemas"] == {"S": schema}
    assert found["components"]["pathItems"] == {"A": {"get": {}}}


@pytest.mark.parametrize(
    "schema", [{"const": ".."}, {"enum": ["a", ".."]}, {"default": "%2e%2e"}, {"examples": ["../x"]}]
)
def test_no_parameter_of_a_path_has_a_value_that_leads_out_of_it(schema: Any) -> None:
    found = proxied(None, **{"/{p}/stop": {"parameters": [{"name": "p", "in": "path", "schema": schema}]}})
    assert ".." not in json.dumps(found).replace("%2e", ".")


@pytest.mark.parametrize(("path", "hidden"), [("/v1/x", True), ("/healthz", True), ("/v10/x", False), ("/x", False)])
def test_paths_of_the_agents_names_are_reached_below_v1_workload(path: str, hidden: bool) -> None:
    (server,) = proxied(None, **{path: {}})["servers"]
    assert server["url"] == f"{HOME}/agent" + ("/v1/workload" if hidden else "")


def test_a_path_with_dots_is_left_out() -> None:
    found = proxied(None, **{"/a": {}, "/../../other/stop": {}, "/%2e%2e/x": {}, "/a\\..\\x": {}})
    assert list(found["paths"]) == ["/a"]
