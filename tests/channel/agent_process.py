"""The guest's agent in a process of its own: `python -m tests.channel.agent_process serial|vsock FD`.

FD is the guest's end of its virtio-serial port, or a socket on which connections to its vsock port come.
"""

from __future__ import annotations

import os
import socket
import sys

from volant.guest import _mux
from volant.guest._server import Server


def main(how: str, fd: int) -> None:
    server = Server(lambda _: None)
    if how == "serial":
        _mux.run(lambda: os.dup(fd), server.serve)
    with socket.socket(fileno=fd) as connections:
        while True:
            _, descriptors, _, _ = socket.recv_fds(connections, 1, 1)
            if not descriptors:
                return
            server.serve(socket.socket(fileno=descriptors[0]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
