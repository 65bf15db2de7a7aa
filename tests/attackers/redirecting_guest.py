"""A guest that redirects each request to its client's daemon, or to another service on the client's host."""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import httpx
import trio

NAME = "volant.localhost"
"""An operator's name for the daemon, in `allowed_hosts`. Names below `localhost` are loopback (RFC 6761, 6.3)."""

SERVER = r"""
import socket, threading

def decoded(text):
    first, *rest = text.replace("+", " ").split("%")
    return first + "".join(chr(int(part[:2], 16)) + part[2:] for part in rest)

def serve(sock):
    with sock:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = sock.recv(65536)
            if not piece:
                return
            data += piece
        to = decoded(data.split()[1].decode().partition("?to=")[2])
        status = f"307 Moved\r\nLocation: {to}" if to else "200 OK"
        sock.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

listener = socket.create_server(("127.0.0.1", 8080), backlog=64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
PLUGIN: dict[str, Any] = {
    "name": "redirecting",
    "version": "1",
    "workload": {
        "entrypoint": ["python3.13", "-c", SERVER],
        "port": 8080,
        "health_check": {"path": "/", "interval_s": 0.2},
    },
}
"""A plugin for a real guest whose workload redirects to what the parameter `to` says."""

OWN = ("127.0.0.1", "localhost", "LOCALHOST", "[::1]")
"""The name of a server in the guest. A redirect to it leads to a port of the guest."""
HOSTS = (
    # Curl, browsers and getaddrinfo() accept them.
    "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "0.0.0.0",
    "127.0.0.1.", "localhost.", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::]",
    NAME, f"user@{NAME}", "user:secret@127.1",
)  # fmt: skip
"""Other spellings of loopback."""


def spellings(port: int, path: str, *, own: bool = True) -> list[str]:
    """Returns URLs of `path` on the daemon at `port` of loopback, and some that clients may interpret as such.

    :param own: with those that are also the guest's own
    """
    hosts = (*OWN, *HOSTS) if own else HOSTS
    addresses = [f"http://{host}:{port}{path}" for host in hosts]
    addresses += [f"//{host}:{port}{path}" for host in hosts]
    addresses += [
        path,
        f"/../../../..{path}",
        f"/%2e%2e/%2e%2e/%2e%2e/..{path}",
        f"\\\\127.1:{port}{path}",
        f"/\\127.1:{port}{path}",
        f"HTTP://127.1:{port}{path}",
        f"http:127.1:{port}{path}",
        f" http://127.1:{port}{path}",
    ]
    return addresses


async def curl(method: str, url: str) -> None:
    """Runs `curl -L`, which repeats the method at the new address. Its result does not matter."""
    command = ["curl", "--silent", "--location", "--max-time", "20", "--noproxy", "*", "--request", method, url]
    await trio.run_process(command, check=False, stdout=subprocess.DEVNULL)


async def follow(method: str, url: str) -> None:
    """Runs httpx with redirects. Its result does not matter."""
    async with httpx.AsyncClient(follow_redirects=True, trust_env=False, timeout=20) as client:
        try:
            await client.request(method, url)
        except (httpx.HTTPError, httpx.InvalidURL):
            pass


CLIENTS: dict[str, Callable[[str, str], Awaitable[None]]] = {"curl": curl, "httpx": follow}
"""Clients that repeat the method at the redirect's target."""


async def send_to_all(client: str, method: str, guest: str, addresses: list[str]) -> None:
    """Lets `client` request a redirect to each address from the guest, eight at a time."""
    limit = trio.CapacityLimiter(8)

    async def ask(address: str) -> None:
        async with limit:
            await CLIENTS[client](method, str(httpx.URL(guest, params={"to": address})))

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(partial(ask, address))
