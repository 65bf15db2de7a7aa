"""A client reaches what runs in a VM, byte for byte, both ways; and a guest's answers never run as ours.

The agent is the real one, in this process, behind a socket in the place of a vsock; what
listens on the "guest's" loopback is a server of the test's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import pytest
import trio
import trio.testing
from msgspec.structs import replace
from trio_websocket import ConnectionClosed

from tests.api.kit import (
    FAST,
    UPGRADE,
    Api,
    agent_behind,
    api,
    bare,
    disconnected,
    read_answer,
    read_head,
    read_to_end,
    request,
    running,
    until,
    websocket,
)
from volant.channel import AgentClient, AgentUnreachable
from volant.http import Limits
from volant.model import Problem
from volant.relay import _relay
from volant.relay._relay import FrameBounds

ROOMY = replace(FAST, websocket_message=16 * 1024 * 1024)


@dataclass
class Guest:
    """A VM called `demo` whose agent answers."""

    api: Api
    port: int
    """Of the server on its loopback."""
    seen: list[dict[str, Any]]
    """The scopes of what that server was asked."""
    gone: trio.Event
    """Set when a stream of that server has lost its client."""
    ends: list[str]
    """How uploads to `/whole` ended."""

    @property
    def client(self) -> httpx.AsyncClient:
        return self.api.client

    def url(self, path: str) -> str:
        return f"ws://127.0.0.1:{self.api.server.port}{path}"


@asynccontextmanager
async def guest(path: Path, limits: Limits = FAST) -> AsyncIterator[Guest]:
    seen: list[dict[str, Any]] = []
    ends: list[str] = []
    gone = trio.Event()

    async def loopback(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        if scope["path"] == "/whole":
            while (message := await receive())["type"] == "http.request" and message["more_body"]:
                pass
            ends.append("whole" if message["type"] == "http.request" else "broken")
            return
        await (_loopback_socket if scope["type"] == "websocket" else _loopback_http)(scope, receive, send, gone)

    async with (
        agent_behind(path / "vsock") as way,
        running(bare(loopback), ROOMY) as inner,
        api(path, limits=limits) as served,
    ):
        await served.create("demo")
        async with served.reaching(way) as client:
            await client.request_json(
                "PUT",
                "/v1/daemon/workload",
                {"entrypoint": ["sleep", "1000"], "port": inner.port},
                timeout_s=5,
            )
            yield Guest(served, inner.port, seen, gone, ends)


async def _loopback_http(scope: Any, receive: Any, send: Any, gone: trio.Event) -> None:
    async def answer(body: bytes, status: int = 200, *headers: tuple[bytes, bytes]) -> None:
        length = (b"content-length", b"%d" % len(body))
        await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
        await send({"type": "http.response.body", "body": body})

    async def body() -> AsyncIterator[bytes]:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            yield message["body"]
            if not message["more_body"]:
                return

    match scope["path"]:
        case "/digest":
            digest, size = hashlib.sha256(), 0
            async for data in body():
                digest.update(data)
                size += len(data)
            await answer(json.dumps([size, digest.hexdigest()]).encode())
        case "/big":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(50):
                await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        case "/endless":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            async with trio.open_nursery() as nursery:

                async def pour() -> None:
                    while True:
                        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})

                nursery.start_soon(pour)
                await disconnected(receive)
                gone.set()
                nursery.cancel_scope.cancel()
        case "/evil":
            await answer(
                b"<script>alert(1)</script>",
                200,
                (b"content-type", b"text/html"),
                (b"set-cookie", b"a=b"),
                (b"service-worker-allowed", b"/"),
                (b"clear-site-data", b'"*"'),
                (b"secure-session-registration", b'(ES256);path="/api/v1/vms/demo/stop"'),
                (b"content-security-policy", b"sandbox allow-scripts allow-same-origin"),
                (b"x-content-type-options", b"sniff"),
                (b"x-request-id", b"forged"),
                (b"volant-location", b"http://evil.example/"),
                (b"x-own", b"kept"),
            )
        case "/page":
            await answer(b'<!doctype html><img src="picture.svg">', 200, (b"content-type", b"text/html"))
        case "/broken":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"x" * 10, "more_body": True})
            raise trio.BrokenResourceError
        case "/nothing":
            await answer(b"", 204)
        case "/moved" | "/moved/here":
            await answer(b"", 307, (b"location", parse_qs(scope["query_string"])[b"to"][0]))
        case _:
            await answer(scope["method"].encode(), 200)


async def _loopback_socket(scope: Any, receive: Any, send: Any, gone: trio.Event) -> None:
    await receive()
    if scope["path"] in ("/no", "/moved"):
        status, there = (404, []) if scope["path"] == "/no" else (302, [(b"location", b"ws://evil.example/")])
        headers = [(b"x-own", b"kept"), *there]
        await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
        await send({"type": "websocket.http.response.body", "body": b"none here"})
        return
    await send({"type": "websocket.accept", "subprotocol": "chat" if scope["subprotocols"] else None})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            gone.set()
            return
        if message.get("text") == "close":
            await send({"type": "websocket.close", "code": 4001, "reason": "as asked"})
            return
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


WAYS = ("agent", "port")


def prefix(at: Guest, way: str) -> str:
    return "/api/v1/vms/demo/agent" if way == "agent" else f"/api/v1/vms/demo/ports/{at.port}"


async def test_the_agents_own_routes_answer(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        answer = await at.client.get("/api/v1/vms/demo/agent/healthz")
        assert answer.json()["status"] == "ok"
        assert (await at.client.get("/api/v1/vms/demo/agent/v1/info")).json()["kernel"]
        lines = (await at.client.post("/api/v1/vms/demo/agent/v1/exec", json={"command": ["true"]})).text.splitlines()
        assert json.loads(lines[-1]) == {"exit_code": 0}


async def test_every_method_path_and_query_arrives_as_it_was_sent(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"):
                assert (await at.client.request(method, f"{prefix(at, way)}/x")).text == method
            raw = request("GET", f"{prefix(at, way)}/a%2Fb//c/../%C3%A4?x=%20y&api_key=k&z=1&%61pi_key=k&ticket=t&q")
            assert (await at.api.server.ask(raw)).status == 200
            assert at.seen[-1]["raw_path"] == b"/a%2Fb//c/../%C3%A4"
            assert at.seen[-1]["query_string"] == b"x=%20y&z=1&q"
            for bare_path in ("", "/"):
                await at.client.get(prefix(at, way) + bare_path)
                assert at.seen[-1]["raw_path"] == b"/"


async def test_credentials_and_hop_by_hop_headers_stay_here(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            await at.client.get(
                f"{prefix(at, way)}/x",
                headers={
                    "authorization": "Bearer key",
                    "x-volant-api-key": "key",
                    "volant-registry-auth": "key",
                    "volant-session": "key",
                    "cookie": "a=b",
                    "proxy-authorization": "x",
                    "connection": "x-mine, keep-alive",
                    "x-mine": "1",
                    "te": "trailers",
                    "x-kept": "yes",
                },
            )
            headers = dict(at.seen[-1]["headers"])
            assert headers[b"x-kept"] == b"yes"
            for name in (b"authorization", b"x-volant-api-key", b"cookie", b"proxy-authorization", b"x-mine", b"te"):
                assert name not in headers
            assert b"key" not in b"".join(headers.values())
        assert headers[b"host"] == b"localhost:%d" % at.port


async def test_a_guests_page_never_runs_with_our_origin(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            answer = await at.api.server.ask(request("GET", f"{prefix(at, way)}/evil"))
            policies = [value for name, value in answer.all_headers if name == "content-security-policy"]
            assert "sandbox" in policies
            assert [value for name, value in answer.all_headers if name == "x-content-type-options"] == ["nosniff"]
            for name in ("set-cookie", "service-worker-allowed", "clear-site-data", "secure-session-registration"):
                assert name not in answer.headers
            assert answer.headers["x-request-id"] != "forged"
            assert answer.headers["x-own"] == "kept"


async def test_large_bodies_pass_both_ways(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            data = bytes(range(256)) * 40_000
            answer = await at.client.post(f"{prefix(at, way)}/digest", content=data)
            assert answer.json() == [len(data), hashlib.sha256(data).hexdigest()]

            async def chunks(data: bytes = data) -> AsyncIterator[bytes]:
                for start in range(0, len(data), 100_000):
                    yield data[start : start + 100_000]

            answer = await at.client.put(f"{prefix(at, way)}/digest", content=chunks())
            assert answer.json() == [len(data), hashlib.sha256(data).hexdigest()]
            assert len((await at.client.get(f"{prefix(at, way)}/big")).content) == 50_000_000
            assert (await at.client.get(f"{prefix(at, way)}/nothing")).status_code == 204
            assert (await at.client.head(f"{prefix(at, way)}/x")).status_code == 200


async def test_a_client_that_leaves_ends_the_request_in_the_guest(tmp_path: Path) -> None:
    for way in WAYS:
        path = tmp_path / way
        path.mkdir()
        async with guest(path) as at:
            stream = await at.api.server.connect()
            await stream.send_all(request("GET", f"{prefix(at, way)}/endless"))
            await read_head(stream)
            await trio.aclose_forcefully(stream)
            with trio.fail_after(10):
                await at.gone.wait()


async def test_an_upload_that_breaks_off_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS * 10:
            stream = await at.api.server.connect()
            await stream.send_all(request("PUT", f"{prefix(at, way)}/whole", Transfer_Encoding="chunked"))
            await stream.send_all(b"5\r\nhello\r\n")
            await until(lambda: bool(at.seen))
            await trio.aclose_forcefully(stream)
            await until(lambda: bool(at.ends))
            assert at.ends == ["broken"]
            at.seen.clear()
            at.ends.clear()


async def test_a_client_that_does_not_read_slows_only_its_guest(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        async with await at.api.server.connect() as stream:
            await stream.send_all(request("GET", f"{prefix(at, 'port')}/endless"))
            await read_head(stream)
            await trio.sleep(0.3)
            assert (await at.client.get(f"{prefix(at, 'agent')}/healthz")).status_code == 200


async def test_an_answer_that_breaks_off_breaks_off_for_the_client(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            with pytest.raises(httpx.RemoteProtocolError):
                await at.client.get(f"{prefix(at, way)}/broken")
            assert (await at.client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("length", [b"3", b"1000"])
async def test_chunks_count_and_not_the_length_that_a_guest_says_besides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: bytes
) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await read_head(stream)
            head = b"HTTP/1.1 200 OK\r\ncontent-length: %s\r\ntransfer-encoding: chunked\r\n\r\n" % length
            await stream.send_all(head + b"5\r\nwhole\r\n0\r\n\r\n")

    async with guest(tmp_path) as at, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer, [listener])
        port = listener.socket.getsockname()[1]
        assert (await at.client.get(f"/api/v1/vms/demo/ports/{port}/")).text == "whole"
        nursery.cancel_scope.cancel()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/daemon/logs",
        "/v1/daemon",
        "/v1/%64aemon/logs",
        "/v1/%2564aemon/logs",
        "//v1/daemon/logs",
        "/v1//daemon/logs",
        "/v1/./daemon/logs",
        "/v1/x/../daemon/logs",
        "/v1/x/%2e%2e/daemon/logs",
        "/v1%2fdaemon%2flogs",
        "/V1/Daemon/logs",
        "/v1/daemon/logs?stdout=0",
    ],
)
async def test_the_daemons_own_routes_are_not_relayed(tmp_path: Path, path: str) -> None:
    async with guest(tmp_path) as at:
        answer = await at.api.server.ask(request("GET", f"/api/v1/vms/demo/agent{path}"))
        assert answer.status == 404
        assert answer.headers["content-type"] == "application/problem+json"


async def test_a_port_where_nothing_listens_is_502(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        answer = await at.client.get("/api/v1/vms/demo/ports/1/")
        assert (answer.status_code, answer.json()["vm"]) == (502, "demo")


async def test_an_unreachable_agent_is_a_502(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:

        class Absent(AgentClient):
            @asynccontextmanager
            async def stream(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
                raise AgentUnreachable("the channel is down")
                yield  # type: ignore[unreachable]

        at.api.reach(Absent.__new__(Absent))
        for path in ("/agent/healthz", "/ports/80/"):
            assert (await at.client.get(f"/api/v1/vms/demo{path}")).status_code == 502

        def stopped(name: str) -> Any:
            raise Problem(409, "vm-not-running", "it is stopped", vm=name)

        at.api.reach(stopped)
        for path in ("/agent/healthz", "/ports/80/"):
            assert (await at.client.get(f"/api/v1/vms/demo{path}")).status_code == 409
        assert (await at.api.server.get("/api/v1/vms/demo/agent/x", **UPGRADE)).status == 409


# WebSockets


async def test_a_websocket_passes_both_ways(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            async with websocket(at.url(f"{prefix(at, way)}/echo?api_key=k&x=1"), subprotocols=["chat"]) as socket_:
                assert socket_.subprotocol == "chat"
                for message in ("text", "", b"bytes", b"", b"x" * 1_000_000, "ä" * 70_000):
                    await socket_.send_message(message)
                    assert await socket_.get_message() == message
                await socket_.ping()
                await socket_.send_message("close")
                with pytest.raises(ConnectionClosed) as raised:
                    await socket_.get_message()
                assert raised.value.reason is not None
                assert (raised.value.reason.code, raised.value.reason.reason) == (4001, "as asked")
            assert at.seen[-1]["query_string"] == b"x=1"


async def test_a_refused_websocket_is_refused_as_the_guest_did(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            answer = await at.api.server.get(f"{prefix(at, way)}/no", **UPGRADE)
            assert (answer.status, answer.headers["x-own"], answer.body) == (404, "kept", b"none here")
            assert answer.headers["content-security-policy"] == "sandbox"


async def test_a_refusal_that_does_not_end_is_a_502(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_relay, "_REFUSAL_S", 0.2)

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 403 No\r\nContent-Length: 10\r\n\r\nhalf")
            await trio.sleep_forever()

    async with guest(tmp_path) as at, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, refuse, [listener])
        port = listener.socket.getsockname()[1]
        answer = await at.api.server.get(f"/api/v1/vms/demo/ports/{port}/", **UPGRADE)
        assert answer.status == 502
        assert b"it refused with 403" in answer.body
        nursery.cancel_scope.cancel()


async def test_a_websocket_is_not_sent_elsewhere(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            answer = await at.api.server.get(f"{prefix(at, way)}/moved", **UPGRADE)
            assert (answer.status, answer.headers["x-own"], answer.body) == (502, "kept", b"none here")
            assert "location" not in answer.headers


async def test_the_guest_notices_that_a_websocket_client_leaves(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        stream = await at.api.server.connect()
        await stream.send_all(request("GET", f"{prefix(at, 'port')}/echo", **UPGRADE))
        head, _ = await read_head(stream)
        assert head.startswith(b"HTTP/1.1 101")
        assert b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in head
        await trio.aclose_forcefully(stream)
        with trio.fail_after(10):
            await at.gone.wait()


async def test_websockets_are_closed_with_1001_when_the_daemon_stops(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        async with websocket(at.url(f"{prefix(at, 'port')}/echo")) as socket_:
            await socket_.send_message("x")
            await socket_.get_message()
            at.api.server.stopping.set()
            with trio.fail_after(20), pytest.raises(ConnectionClosed) as raised:
                await socket_.get_message()
            assert raised.value.reason is not None
            assert raised.value.reason.code == 1001


async def test_a_guest_that_sends_empty_frames_leaves_room_for_others(tmp_path: Path) -> None:
    async def pour(stream: trio.SocketStream) -> None:
        async with stream:
            await read_head(stream)
            await stream.send_all(b"HTTP/1.1 101 Up\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
            try:
                while True:
                    await stream.send_all(b"\x82\0" * 65536)
            except trio.BrokenResourceError:
                pass

    async with (
        guest(tmp_path) as at,
        await at.api.server.connect() as stream,
        trio.open_nursery() as nursery,
    ):
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, pour, [listener])
        path = f"/api/v1/vms/demo/ports/{listener.socket.getsockname()[1]}/"
        await stream.send_all(request("GET", path, **UPGRADE))
        await read_head(stream)

        async def drain() -> None:
            while await stream.receive_some(65536):
                pass

        nursery.start_soon(drain)
        await trio.sleep(0.2)
        with trio.fail_after(10):
            for _ in range(5):
                assert (await at.api.server.get("/healthz")).status == 200
        nursery.cancel_scope.cancel()


def test_frames_are_followed_however_they_are_cut() -> None:
    frames = b"".join(
        (b"\x82\x03abc", b"\x81\0", b"\x82\x7e\x01\0" + b"x" * 256, b"\x89\x80key!", b"\x82\x7f" + bytes(7) + b"\x02yz")
    )
    ends = {5, 7, 267, 273, 285}
    for size in (1, 2, 3, 7, len(frames)):
        bounds, place = FrameBounds(), 0
        for start in range(0, len(frames), size):
            piece = frames[start : start + size]
            assert bounds.feed(piece)[0] == len(piece)
            place += len(piece)
            assert bounds.between == (place in ends)
    bounds, many = FrameBounds(), b"\x82\0" * 1000
    assert bounds.feed(many) == (1024, 512)
    assert bounds.feed(many, 1024) == (2000, 488)


async def test_busy_relays_leave_room_for_others(tmp_path: Path) -> None:
    async with guest(tmp_path, replace(FAST, grace_s=0.1)) as at:
        streams = []
        for _ in range(20):
            stream = await at.api.server.connect()
            await stream.send_all(request("GET", f"{prefix(at, 'port')}/endless"))
            streams.append(stream)
        async with trio.open_nursery() as nursery:

            async def drain(stream: trio.SocketStream) -> None:
                while await stream.receive_some(65536):
                    pass

            for stream in streams:
                nursery.start_soon(drain, stream)
            await trio.sleep(0.2)
            for _ in range(5):
                with trio.fail_after(20):
                    assert (await at.api.server.get("/healthz")).status == 200
            nursery.cancel_scope.cancel()
        for stream in streams:
            await trio.aclose_forcefully(stream)


async def test_an_upload_that_the_guest_refuses_is_answered(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        async with await at.api.server.connect() as stream:
            size = 5_000_000
            await stream.send_all(request("POST", f"{prefix(at, 'port')}/x", Content_Length=str(size)))
            await stream.send_all(b"x" * size)
            assert (await read_answer(stream)).body == b"POST"
            await stream.send_all(request("GET", "/healthz", Connection="close"))
            assert (await read_to_end(stream)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/api/v1/vms/demo/agent/x", "/api/v1/vms/demo/ports/{port}/x"])
async def test_a_trace_is_not_passed_on(tmp_path: Path, path: str) -> None:
    async with guest(tmp_path) as demo:
        answer = await demo.client.request("TRACE", path.format(port=demo.port))
        assert answer.status_code == 405
        assert "TRACE" not in answer.headers["allow"]
        assert "GET" in answer.headers["allow"]
        assert not demo.seen


async def test_what_anonymous_clients_have_open_in_a_guest_ends_with_the_first_key(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        async with websocket(at.url(f"{prefix(at, 'port')}/echo")) as socket_:
            await socket_.send_message("x")
            await socket_.get_message()
            upload = await at.api.server.connect()
            async with upload:
                await upload.send_all(request("POST", f"{prefix(at, 'port')}/whole", Content_Length="1000"))
                await until(lambda: any(scope["path"] == "/whole" for scope in at.seen))
                made = await at.client.post("/api/v1/keys", json={"name": "ops", "role": "admin"})
                assert made.status_code == 201
                with trio.fail_after(20), pytest.raises(ConnectionClosed) as raised:
                    await socket_.get_message()
                assert raised.value.reason is not None
                assert raised.value.reason.code == 4401
                assert "requires an API key" in (raised.value.reason.reason or "")
                answer = await read_answer(upload, within_s=20)
                assert (answer.status, b"requires an API key" in answer.body) == (401, True)
        # The guest does not take the part that arrived for the whole.
        await until(lambda: "whole" not in at.ends and bool(at.ends))
