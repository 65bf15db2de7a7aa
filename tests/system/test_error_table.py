"""Provokes each status of the error table, with a real daemon and a real guest."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx
import trio

from tests.system.kit import Daemon, boot, patched
from volant.client import Client

KEY = "a-key-0123456789abcdef"
GOOD = {"name": "other", "cpu_cores": 1, "memory_mb": 128}
WEBSOCKET = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip

BROKEN_DOOR = """
from volant.daemon import _status

def broken(self):
    raise RuntimeError("a secret of the inside")

change(_status.DaemonStatus, "info", broken)
"""
"""Breaks a route, to provoke a 500."""


@dataclass
class Server:
    """A daemon with a key and one VM, which accepts requests from 127.0.0.1 and through the proxy 127.0.0.3."""

    daemon: Daemon
    port: int
    unix: str

    @asynccontextmanager
    async def http(self, source: str = "127.0.0.1", key: str | None = KEY) -> AsyncIterator[httpx.AsyncClient]:
        """Gives a client with the address `source`."""
        headers = {} if key is None else {"X-Volant-API-Key": key}
        transport = httpx.AsyncHTTPTransport(local_address=source)
        async with httpx.AsyncClient(
            base_url=self.daemon.base_url, headers=headers, transport=transport, trust_env=False, timeout=60
        ) as client:
            yield client

    async def raw(self, data: bytes) -> tuple[int, bytes]:
        """Returns the answer to bytes that no client library would send."""
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as stream:
            await stream.send_all(data)
            answer = b""
            with trio.fail_after(60):
                while piece := await stream.receive_some(65536):
                    answer += piece
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        parser.receive_data(answer)
        head = parser.next_event()
        assert isinstance(head, h11.Response), answer
        return head.status_code, answer.partition(b"\r\n\r\n")[2]


def problem(answer: httpx.Response, status: int, field: str | None = None) -> dict[str, Any]:
    """Checks an error; returns its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["type"].startswith("urn:volant:error:")
    assert body["detail"] == body["error"] != ""
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body.get("field") == field, body
    return body


async def test_every_status_of_the_error_table(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    unix = f"unix:{tmp_path}/api.sock"
    environ = {
        "VOLANT_API_KEY": KEY, "VOLANT_MAX_VMS": "1",
        "VOLANT_API_ALLOW_CIDR": "127.0.0.1/32", "VOLANT_TRUSTED_PROXIES": "127.0.0.3/32",
    }  # fmt: skip
    daemon = make_daemon("--listen", f"127.0.0.1:0,{unix}", environ=environ, wrapper=patched(BROKEN_DOOR))
    server = Server(daemon, int(daemon.base_url.rpartition(":")[2]), unix)
    async with Client(unix) as client:
        await boot(client, "demo")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a_request_that_does_not_end, server)
        await who_may_ask(server)
        await what_is_malformed(server)
        await what_is_not_there_or_not_possible(server)
        await what_fails_inside(server)
    assert KEY not in daemon.log_path.read_text()


async def a_request_that_does_not_end(server: Server) -> None:
    status, answer = await server.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    assert (status, json.loads(answer)["type"]) == (408, "urn:volant:error:header-timeout")


async def who_may_ask(server: Server) -> None:
    async with server.http(key=None) as anonymous:
        answer = await anonymous.get("/api/v1/vms")
        problem(answer, 401)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert (await anonymous.get("/healthz")).status_code == 200
    async with server.http(key="wrong-0123456789abcdef") as wrong:
        problem(await wrong.get("/api/v1/vms"), 401)
    async with server.http() as http:
        # DNS rebinding: the page's name points to 127.0.0.1, and the request names the page.
        for host in (
            "rebound.example",
            f"rebound.example:{server.port}",
            "127.0.0.1.rebound.example",
            "localhost@evil",
        ):
            for path in ("/api/v1/vms", "/healthz", "/docs", "/api/v1/vms/demo/agent/healthz"):
                problem(await http.get(path, headers={"Host": host}), 421)
        # A page of another origin cannot change anything or open a WebSocket.
        for origin in ("https://evil.example", "null", f"http://127.0.0.1:{server.port + 1}"):
            foreign = {"Origin": origin}
            problem(await http.post("/api/v1/vms/demo/stop", headers=foreign), 403)
            problem(await http.get("/ws/v1/vms/demo/logs", headers={**foreign, **WEBSOCKET}), 403)
    # A client that forges the header of a proxy is not trusted.
    for source, forwarded, status in (
        ("127.0.0.1", None, 200),
        ("127.0.0.1", "203.0.113.9", 200),
        ("127.0.0.2", None, 403),
        ("127.0.0.2", "127.0.0.1", 403),
        ("127.0.0.3", "127.0.0.1", 200),
        ("127.0.0.3", "203.0.113.9", 403),
        ("127.0.0.3", "127.0.0.1, 203.0.113.9", 403),
        ("127.0.0.3", "unknown", 403),
    ):
        async with server.http(source) as http:
            headers = {"X-Forwarded-For": forwarded} if forwarded else {}
            answer = await http.get("/api/v1/vms", headers=headers)
            assert answer.status_code == status, (source, forwarded)
            if status == 403:
                problem(answer, 403)


async def what_is_malformed(server: Server) -> None:
    async with server.http() as http:
        for body, field in (
            ({**GOOD, "memory_mb": 1}, "memory_mb"),
            ({**GOOD, "colour": "red"}, "colour"),
            ({"cpu_cores": 1, "memory_mb": 128}, "name"),
            ({**GOOD, "labels": {"a": 1}}, "labels.a"),
            ({**GOOD, "name": "Other"}, "name"),
        ):
            problem(await http.post("/api/v1/vms", json=body), 400, field)
        problem(await http.get("/api/v1/vms?colour=red"), 400, "colour")
        problem(await http.post("/api/v1/vms/demo/start?timeout=soon"), 400, "timeout")
        problem(await http.post("/api/v1/vms/demo/start", headers={"Idempotency-Key": "a b"}), 400, "Idempotency-Key")
        problem(await http.post("/api/v1/vms", content=b"no json"), 400)
        problem(await http.post("/api/v1/vms", content=b"[" * 2_000_000), 413)
        problem(await http.post("/api/v1/vms", content=b"<vm/>", headers={"Content-Type": "text/xml"}), 415)
        problem(await http.get("/healthz", headers={"X-Long": "a" * 40_000}), 431)
        problem(await http.get("/ws/v1/vms/demo/logs"), 426)
    status, answer = await server.raw(b"nonsense\r\n\r\n")
    assert (status, json.loads(answer)["status"]) == (400, 400)
    status, answer = await server.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert (status, json.loads(answer)["status"]) == (505, 505)


async def what_is_not_there_or_not_possible(server: Server) -> None:
    async with server.http() as http:
        shown = await http.get("/api/v1/vms/demo")
        answer = await http.get("/api/v1/vms/demo", headers={"If-None-Match": shown.headers["etag"]})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", shown.headers["etag"])
        for path in ("/api/v1/vms/nobody", "/api/v1/plugins/nothing", "/nothing"):
            problem(await http.get(path), 404)
        problem(await http.get("/ws/v1/vms/nobody/logs", headers=WEBSOCKET), 404)
        answer = await http.patch("/api/v1/vms/demo")
        problem(answer, 405)
        assert {"GET", "DELETE"} <= set(answer.headers["allow"].split(", "))
        problem(await http.post("/api/v1/plugins/base/enabled", json={"enabled": False}), 409)
        problem(await http.get("/api/v1/events/vms?since=other-1&on_gap=410"), 410)
        problem(await http.post("/api/v1/vms/demo/stop", headers={"If-Match": '"0-0"'}), 412)
        once = {"Idempotency-Key": "once"}
        manifest = {"name": "p", "version": "1"}
        assert (await http.post("/api/v1/plugins", json=manifest, headers=once)).status_code == 201
        again = await http.post("/api/v1/plugins", json=manifest, headers=once)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (201, "true")
        manifest["version"] = "2"
        problem(await http.post("/api/v1/plugins", json=manifest, headers=once), 422, "Idempotency-Key")
        problem(await http.post("/api/v1/plugins", json=manifest), 409, "name")


async def what_fails_inside(server: Server) -> None:
    async with server.http() as http:
        body = problem(await http.get("/api/v1/system/info"), 500)
        assert "secret" not in json.dumps(body)
        log = server.daemon.log_path.read_text()
        assert "a secret of the inside" in log
        assert body["request_id"] in log
        problem(await http.get("/api/v1/vms/demo/ports/9/"), 502)
        assert "VOLANT_MAX_VMS" in problem(await http.post("/api/v1/vms", json=GOOD), 503)["detail"]
        assert (await http.get("/api/v1/vms/demo/agent/healthz")).status_code == 200
        assert (await http.delete("/api/v1/vms/demo")).status_code == 204
        made = await http.post("/api/v1/vms", json=GOOD)
        assert (made.status_code, made.headers["location"]) == (201, f"/api/v1/vms/{GOOD['name']}")
        problem(await http.post("/api/v1/vms", json=GOOD), 409, "name")
        assert (await http.get("/healthz")).json() == {"status": "ok"}
