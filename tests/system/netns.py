"""Network namespaces for tests: a daemon in one, clients in another, and a link between them that can be cut.

`python -m tests.system.netns ADDRESS PORT COUNT` runs the clients: it opens that many event streams and waits to be
killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

DAEMON = "192.0.2.1"
CLIENTS = "192.0.2.2"

IN_ITS_OWN = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs the following command in its own network namespace, as the same process."""

_S = 30.0


class Clients:
    """Opens event streams from another namespace than the daemon's."""

    def __init__(self, daemon_pid: int) -> None:
        self._daemon_pid = daemon_pid
        # Keeps the namespace when the clients are gone.
        self._holder = subprocess.Popen(
            [*IN_ITS_OWN, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE, text=True
        )
        self._clients: subprocess.Popen[str] | None = None

    def connect(self, port: int, count: int) -> None:
        """Connects the namespaces and opens the streams."""
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        in_daemons, in_ours = self._ip(self._daemon_pid), self._ip(self._holder.pid)
        in_daemons("link", "add", "vtd", "type", "veth", "peer", "name", "vtc", "netns", str(self._holder.pid))
        for ip, link, address in ((in_daemons, "vtd", DAEMON), (in_ours, "vtc", CLIENTS)):
            ip("addr", "add", f"{address}/24", "dev", link)
            ip("link", "set", link, "up")
        command = [sys.executable, "-m", "tests.system.netns", DAEMON, str(port), str(count)]
        self._clients = subprocess.Popen([*self._enter(self._holder.pid), *command], stdout=subprocess.PIPE, text=True)
        assert self._clients.stdout is not None
        assert self._clients.stdout.readline() == "connected\n"

    def vanish(self) -> None:
        """Cuts the link, then kills the clients: the daemon is not notified."""
        assert self._clients is not None
        self._ip(self._holder.pid)("link", "set", "vtc", "down")
        self._clients.kill()
        self._clients.wait(_S)

    def close(self) -> None:
        """Kills the remaining processes."""
        for process in (self._clients, self._holder):
            if process is not None:
                process.kill()
                process.wait(_S)
                if process.stdout is not None:
                    process.stdout.close()

    def _enter(self, pid: int) -> Sequence[str]:
        return ("nsenter", f"--net=/proc/{pid}/ns/net", "--")

    def _ip(self, pid: int):  # type: ignore[no-untyped-def]
        def ip(*arguments: str) -> None:
            subprocess.run([*self._enter(pid), "ip", *arguments], check=True, timeout=_S)

        return ip


@contextmanager
def clients(daemon_pid: int) -> Iterator[Clients]:
    """Gives `Clients` that end with the block."""
    made = Clients(daemon_pid)
    try:
        yield made
    finally:
        made.close()


def main(address: str, port: int, count: int) -> None:
    """Opens the streams, prints a line, and waits."""
    request = f"GET /api/v1/events/vms HTTP/1.1\r\nHost: {address}:{port}\r\n\r\n".encode()
    streams = []
    for _ in range(count):
        stream = socket.create_connection((address, port), timeout=_S)
        stream.sendall(request)
        streams.append(stream)
    for stream in streams:
        head = b""
        while b"retry: 1000" not in head:
            piece = stream.recv(4096)
            assert piece, head
            head += piece
        assert head.startswith(b"HTTP/1.1 200"), head
    print("connected", flush=True)
    signal.pause()


if __name__ == "__main__":
    os.environ.pop("PYTHONSTARTUP", None)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
