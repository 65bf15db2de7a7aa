"""HTTP into a guest: its workload and the ports of its loopback, with streams and WebSockets.

A guest's answer is never taken for one of the daemon.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.system.kit import Daemon, shared_vm, websocket

SERVER = r"""
import base64, hashlib, socket, sys, threading

def read_head(sock):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            raise SystemExit
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    return lines[0].split(), {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}, rest

def exactly(sock, rest, count):
    while len(rest) < count:
        piece = sock.recv(65536)
        if not piece:
            raise SystemExit
        rest += piece
    return rest[:count], rest[count:]

def websocket(sock, headers, rest):
    key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
    accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
    sock.sendall(("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                  f"Sec-WebSocket-Accept: {accept}\r\nSet-Cookie: evil=1\r\n\r\n").encode())
    while True:
        (first, second), rest = exactly(sock, rest, 2)
        size = second & 127
        if size > 125:
            raw, rest = exactly(sock, rest, 2 if size == 126 else 8)
            size = int.from_bytes(raw, "big")
        mask, rest = exactly(sock, rest, 4)
        data, rest = exactly(sock, rest, size)
        mask = (mask * (size // 4 + 1))[:size]
        data = (int.from_bytes(data, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
        if size < 126:
            head = bytes([first, size])
        elif size < 65536:
            head = bytes([first, 126]) + size.to_bytes(2, "big")
        else:
            head = bytes([first, 127]) + size.to_bytes(8, "big")
        sock.sendall(head + data)
        if first & 15 == 8:
            return

def serve(sock, where):
    with sock:
        (method, target, _), headers, rest = read_head(sock)
        if headers.get("upgrade", "").lower() == "websocket":
            return websocket(sock, headers, rest)
        extra = "Set-Cookie: evil=1\r\nService-Worker-Allowed: /\r\nContent-Type: text/html\r\n"
        if target.startswith("/drip"):
            # One piece, and the next when the client has said that it has the first one.
            sock.sendall(f"HTTP/1.1 200 OK\r\n{extra}Transfer-Encoding: chunked\r\n\r\n".encode())
            sock.sendall(b"6\r\nfirst\n\r\n")
            next_one.wait(60)
            next_one.clear()
            sock.sendall(b"7\r\nsecond\n\r\n0\r\n\r\n")
            return
        if target == "/next":
            next_one.set()
        digest, size = hashlib.sha256(), 0
        left = int(headers.get("content-length", 0))
        while left:
            piece = rest or sock.recv(65536)
            rest = b""
            digest.update(piece)
            size += len(piece)
            left -= len(piece)
        seen = "\n".join(f"{k}: {v}" for k, v in sorted(headers.items()))
        body = f"{where} {method} {target} {size} {digest.hexdigest()}\n{seen}\n".encode()
        sock.sendall(f"HTTP/1.1 200 OK\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body)

def listen(port, where):
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    print(where, "listens", flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0], where), daemon=True).start()

next_one = threading.Event()
threading.Thread(target=listen, args=(9000, "port"), daemon=True).start()
listen(8080, "workload")
"""
PLUGIN = {
    "name": "web",
    "version": "1",
    "workload": {
        "entrypoint": ["python3.13", "-c", SERVER],
        "port": 8080,
        "env": {"COLOUR": "red"},
        "health_check": {"path": "/healthy", "interval_s": 0.2},
    },
}
AGENT = "/api/v1/vms/demo/agent"
PORT = "/api/v1/vms/demo/ports/9000"


@pytest.fixture(scope="module", autouse=True)
def guest(module_daemon: Daemon) -> Iterator[None]:
    """A VM whose workload serves HTTP; the tests of this module share it."""
    with shared_vm(module_daemon, PLUGIN):
        yield


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        (f"{AGENT}/some/path?x=1&y=%2F", "workload GET /some/path?x=1&y=%2F"),
        (f"{AGENT}/v1/workload/healthz", "workload GET /healthz"),
        (f"{PORT}/a%20b/?q", "port GET /a%20b/?q"),
        (f"{PORT}/", "port GET /"),
    ],
)
async def test_paths_and_queries_arrive_unchanged(daemon: Daemon, path: str, seen: str) -> None:
    async with daemon.http() as http:
        answer = await http.get(path)
    assert answer.status_code == 200
    assert answer.text.startswith(f"{seen} 0 ")


async def test_what_a_guest_answers_never_runs_as_ours(daemon: Daemon) -> None:
    async with daemon.http() as http:
        for path in (f"{AGENT}/page", f"{PORT}/page"):
            answer = await http.get(path)
            assert answer.headers["content-security-policy"] == "sandbox"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "set-cookie" not in answer.headers
            assert "service-worker-allowed" not in answer.headers


async def test_credentials_and_hop_by_hop_headers_are_removed(daemon: Daemon) -> None:
    headers = {
        "Authorization": "Bearer secret",
        "Cookie": "secret=1",
        "X-Volant-API-Key": "secret",
        "Connection": "close, X-Hop",
        "X-Hop": "secret",
        "X-Kept": "kept",
    }
    async with daemon.http() as http:
        for path in (f"{AGENT}/h?api_key=secret&a=1", f"{PORT}/h?ticket=secret&a=1"):
            text = (await http.get(path, headers=headers)).text
            assert "secret" not in text
            assert "x-kept: kept" in text
            assert "/h?a=1 " in text


async def test_an_answer_streams(daemon: Daemon) -> None:
    """The guest writes the second piece only after another request says that the first has arrived."""
    async with daemon.http() as http, http.stream("GET", f"{PORT}/drip") as response:
        pieces = response.aiter_bytes()
        with trio.fail_after(20):
            assert await anext(pieces) == b"first\n"
            await http.get(f"{PORT}/next")
            assert await anext(pieces) == b"second\n"
            with pytest.raises(StopAsyncIteration):
                await anext(pieces)


async def test_a_large_body_arrives_unchanged(daemon: Daemon) -> None:
    data = bytes(range(251)) * 40_000

    async def body() -> AsyncIterator[bytes]:
        for i in range(0, len(data), 100_000):
            yield data[i : i + 100_000]

    expected = f"{len(data)} {hashlib.sha256(data).hexdigest()}"
    async with daemon.http() as http:
        for path, where in ((f"{AGENT}/up", "workload"), (f"{PORT}/up", "port")):
            answer = await http.put(path, content=body(), headers={"Content-Length": str(len(data))})
            assert answer.text.startswith(f"{where} PUT /up {expected}\n")


@pytest.mark.parametrize("path", [f"{AGENT}/echo", f"{PORT}/echo"])
async def test_a_websocket_is_passed_through(daemon: Daemon, path: str) -> None:
    url = f"ws{daemon.base_url.removeprefix('http')}{path}"
    with trio.fail_after(60):
        async with websocket(url) as socket:
            for message in ("hello", "ä" * 1000, bytes(range(256)) * 1000):
                await socket.send_message(message)
                assert await socket.get_message() == message
            assert not [value for name, value in socket.handshake_headers if name.lower() == b"set-cookie"]


async def test_closed_ports_and_the_daemons_own_routes_are_refused(daemon: Daemon) -> None:
    async with daemon.http() as http:
        closed = await http.get("/api/v1/vms/demo/ports/9001/")
        assert closed.status_code == 502
        assert closed.json()["vm"] == "demo"
        assert (await http.get("/api/v1/vms/demo/ports/0/")).status_code == 400
        assert (await http.get("/api/v1/vms/demo/ports/65536/")).status_code == 400
        # Clients cannot reach the agent's routes for the daemon, in any spelling.
        for route in ("v1/daemon/logs", "v1//daemon/logs", "v1/x/../daemon/logs", "v1/%64aemon/logs"):
            raw = f"GET {AGENT}/{route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            assert b" 404 " in await ask(daemon, raw)
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    text = f"GET /api/v1/vms/demo/ports/9001/ HTTP/1.1\r\nHost: localhost\r\n{upgrade}Sec-WebSocket-Version: 13\r\n\r\n"
    assert b" 502 " in await ask(daemon, text.encode())


async def ask(daemon: Daemon, request: bytes) -> bytes:
    """Returns the head of the answer to a request that no client library would send."""
    host, port = daemon.base_url.removeprefix("http://").split(":")
    with trio.fail_after(20):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(request)
            return await stream.receive_some(65536)


async def test_a_page_of_another_origin_gets_nothing(daemon: Daemon) -> None:
    async with daemon.http() as http:
        answer = await http.post(f"{PORT}/", headers={"Origin": "http://evil.example"})
        assert answer.status_code == 403
