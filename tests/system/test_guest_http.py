"""HTTP into a guest: its workload, its actions and the ports of its loopback, with large bodies and WebSockets."""

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

threading.Thread(target=listen, args=(9000, "port"), daemon=True).start()
listen(8080, "workload")
"""
PLUGIN = {
    "name": "web",
    "version": "1",
    "workload": {
        "entrypoint": ["python3.13", "-c", SERVER],
        "port": 8080,
        "health_check": {"path": "/healthy", "interval_s": 0.2},
    },
    "actions": {"digest": {"path": "/v1/digest", "method": "PUT"}},
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


async def test_the_workload_performs_an_action(daemon: Daemon) -> None:
    data = bytes(range(251)) * 4000
    async with (
        daemon.client() as client,
        client.vms.call_action("demo", "digest", content=data, content_type="x/y", query={"a": "b c"}) as answer,
    ):
        seen = (await answer.read()).decode()
    assert answer.status == 200
    assert seen.startswith(f"workload PUT /v1/digest?a=b+c {len(data)} {hashlib.sha256(data).hexdigest()}\n")
    assert "\ncontent-type: x/y\n" in seen
