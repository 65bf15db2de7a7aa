"""Network namespaces for tests: a daemon in one, clients in another, and a link between them that can be cut.

`python -m tests.system.netns ADDRESS PORT COUNT` runs the clients: it opens that many event streams and waits to be
killed.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.processes import read_line

DAEMON = "192.0.2.1"
CLIENTS = "192.0.2.2"

IN_ITS_OWN = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""Runs the following command in its own network namespace, as the same process."""

_S = 30.0


class Namespace:
    """A network namespace, which exists until it is closed."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            [*IN_ITS_OWN, "sh", "-c", "echo; exec sleep 3600"], stdout=subprocess.PIPE, text=True
        )
        self.pid = self._holder.pid
        self.enter = ("nsenter", f"--net=/proc/{self.pid}/ns/net", "--")
        try:
            read_line(self._holder)
        except BaseException:
            self.close()
            raise

    def run(self, *command: str) -> str:
        """Returns the output of a command, which must succeed."""
        done = subprocess.run([*self.enter, *command], check=True, stdout=subprocess.PIPE, text=True, timeout=_S)
        return done.stdout

    def links(self) -> set[str]:
        """Returns the names of the network interfaces."""
        return {link["ifname"] for link in json.loads(self.run("ip", "-j", "link"))}

    def close(self) -> None:
        """Ends the process that keeps the namespace."""
        self._holder.kill()
        self._holder.communicate(timeout=_S)


class Clients:
    """Opens event streams from another namespace than the daemon's."""

    def __init__(self, daemon_pid: int) -> None:
        self._daemon_pid = daemon_pid
        # Exists when the clients are gone.
        self._namespace = Namespace()
        self._clients: subprocess.Popen[str] | None = None

    def connect(self, port: int, count: int) -> None:
        """Connects the namespaces and opens the streams."""
        peer = str(self._namespace.pid)
        self._in_daemons("ip", "link", "add", "vtd", "type", "veth", "peer", "name", "vtc", "netns", peer)
        for run, link, address in ((self._in_daemons, "vtd", DAEMON), (self._namespace.run, "vtc", CLIENTS)):
            run("ip", "addr", "add", f"{address}/24", "dev", link)
            run("ip", "link", "set", link, "up")
        command = [sys.executable, "-m", "tests.system.netns", DAEMON, str(port), str(count)]
        self._clients = subprocess.Popen([*self._namespace.enter, *command], stdout=subprocess.PIPE, text=True)
        assert read_line(self._clients) == "connected\n"

    def vanish(self) -> None:
        """Cuts the link, then kills the clients: the daemon is not notified."""
        assert self._clients is not None
        self._namespace.run("ip", "link", "set", "vtc", "down")
        self._clients.kill()
        self._clients.wait(_S)

    def close(self) -> None:
        """Kills the remaining processes."""
        if self._clients is not None:
            self._clients.kill()
            self._clients.communicate(timeout=_S)
        self._namespace.close()

    def _in_daemons(self, *command: str) -> None:
        enter = ("nsenter", f"--net=/proc/{self._daemon_pid}/ns/net", "--")
        subprocess.run([*enter, *command], check=True, timeout=_S)


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
