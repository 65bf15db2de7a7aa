"""The parts between a DevTools client and its browser, each in its own process, without a hypervisor.

    python -m tests.bench._relay_parts browser            # answers CDP commands, and sends bytes on request
    python -m tests.bench._relay_parts guest SOCKET       # the agent, behind a hypervisor's vsock socket
    python -m tests.bench._relay_parts daemon SOCKET PORT # the API, with a VM whose agent listens on SOCKET

Each prints its address, and serves until SIGTERM.
"""

from __future__ import annotations

import signal
import socket
import sys
import tempfile
import threading
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path

import trio

from tests.api.kit import api
from tests.channel.kit import Hypervisor
from volant.channel import AgentClient, HybridVsock, open_channel
from volant.guest._server import Server
from volant.http import Limits

VM = "demo"
_PIECE = bytes(256 * 1024)
_ANSWER = b'{"id":1,"result":{"protocolVersion":"1.3","product":"HeadlessChrome/1","jsVersion":"1"}}'


def browser() -> None:
    """Blocking sockets with a thread each, the least work in Python, so that the other parts are measured."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        _accept(listener, _browse)


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    def guarded(sock: socket.socket) -> None:
        try:
            serve(sock)
        except OSError:
            pass

    while True:
        sock, _ = listener.accept()
        threading.Thread(target=guarded, args=(sock,), daemon=True).start()


def _browse(sock: socket.socket) -> None:
    """Serves one connection: `GET /SIZE` returns so many bytes; in a WebSocket, so does the text `SIZE`."""
    with sock, sock.makefile("rb") as lines:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = lines.readline()
        if not line:
            # A probe whether a browser listens.
            return
        path = line.split()[1]
        fields = {}
        while (line := lines.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        key = fields.get(b"sec-websocket-key")
        if key is None:
            size = int(path.rpartition(b"/")[2])
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            _pour(sock, size)
            return
        accept = b64encode(sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())
        head = (
            b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %s\r\n\r\n"
        )
        sock.sendall(head % accept)
        while header := lines.read(2):
            length = header[1] & 0x7F
            mask = lines.read(4)
            said = bytes(byte ^ mask[place % 4] for place, byte in enumerate(lines.read(length)))
            if said.isdigit():
                sock.sendall(b"\x82\x7f" + int(said).to_bytes(8, "big"))
                _pour(sock, int(said))
            else:
                sock.sendall(b"\x81%c" % len(_ANSWER) + _ANSWER)


def _pour(sock: socket.socket, size: int) -> None:
    for _ in range(size // len(_PIECE)):
        sock.sendall(_PIECE)
    sock.sendall(_PIECE[: size % len(_PIECE)])


def guest(path: str) -> None:
    """The real agent."""
    hypervisor = Hypervisor(Path(path))
    hypervisor.take = Server(lambda _: None).serve
    with hypervisor.listening():
        print(f"listening on unix:{path}", flush=True)
        signal.pause()


async def daemon(path: str, port: int) -> None:
    """The real API, channel and relays; the VM is a row without a hypervisor."""
    with (
        tempfile.TemporaryDirectory(prefix="vb") as state,
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals,
    ):
        async with (
            api(Path(state), limits=Limits()) as served,
            open_channel(served.deps.host, HybridVsock(Path(path))) as channel,
        ):
            client = AgentClient(channel)
            await served.client.post("/api/v1/plugins", json={"name": "browser", "devtools": {"port": port}})
            await served.crashed(VM, plugin="browser")
            served.reach(client)
            workload = {"entrypoint": ["sleep", "1000"], "port": port}
            await client.request_json("PUT", "/v1/daemon/workload", workload, timeout_s=30)
            print(f"listening on http://127.0.0.1:{served.server.port}", flush=True)
            async for _ in signals:
                break
            await client.request_json("PUT", "/v1/daemon/workload", None, timeout_s=30)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["browser"]:
            browser()
        case ["guest", path]:
            guest(path)
        case ["daemon", path, port]:
            trio.run(daemon, path, int(port))
        case _:
            sys.exit(__doc__)
