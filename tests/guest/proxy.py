"""The real agent behind the daemon's path, on a port of this host, for fast tests of clients."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.threaded_server import serve_in_threads
from volant.guest._server import Server

PREFIX = b"/api/v1/vms/demo/agent"


class Behind:
    """A port in front of an agent. `cut` breaks all connections, as the end of a daemon does."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        serve_in_threads(self._listener, self._serve)

    def _serve(self, client: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            piece = client.recv(65536)
            if not piece:
                client.close()
                return
            data += piece
        ours, theirs = socket.socketpair()
        self._open += [client, ours]
        self.server.serve(theirs)
        ours.sendall(data.replace(b" " + PREFIX, b" ", 1))
        back = threading.Thread(target=_pass, args=(ours, client), daemon=True)
        back.start()
        _pass(client, ours)
        back.join()
        client.close()
        ours.close()

    def cut(self) -> None:
        """Breaks all connections."""
        for sock in self._open:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._open.clear()

    def close(self) -> None:
        """Stops listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()


def _pass(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    try:
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@contextmanager
def agent_behind() -> Iterator[Behind]:
    """Runs an agent for the length of a block."""
    server = Server(lambda grace: None)
    behind = Behind(server)
    try:
        yield behind
    finally:
        behind.close()
        server.workload.stop(0.0)
        server.output.finish(0.0)
