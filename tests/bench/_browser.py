"""A browser of a few lines: it answers CDP commands, and sends bytes on request.

It needs the standard library alone, so that a guest can run this file's text: `python3 -c TEXT PORT`.
"""

from __future__ import annotations

import socket
import sys
import threading
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha1

_PIECE = bytes(256 * 1024)
_ANSWER = b'{"id":1,"result":{"protocolVersion":"1.3","product":"HeadlessChrome/1","jsVersion":"1"}}'


def browser(port: int = 0) -> None:
    """Serves on the loopback, and prints the address: blocking sockets with a thread each, the least work in Python, so
    that the other parts are measured."""
    with socket.create_server(("127.0.0.1", port), backlog=64) as listener:
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


if __name__ == "__main__":
    browser(int(sys.argv[1]))
