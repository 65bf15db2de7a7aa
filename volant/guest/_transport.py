"""Where streams come from: vsock where the guest has it, the multiplexer on its virtio-serial port where it has not."""

# ruff: noqa: PTH110, PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time

from volant.model import agent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PORTS = "/sys/class/virtio-ports"
_HOST_CID = 2
_NETLINK_KOBJECT_UEVENT = 15
_LOOK_AGAIN_MS = 1000
_BACKLOG = 128


def listen_on_vsock(serve: Callable[[socket.socket], None]) -> bool:
    """Take the host's connections to the agent's vsock port; return whether this guest has a vsock."""
    if not os.path.exists("/dev/vsock"):
        return False
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, agent.AGENT_PORT))
        listener.listen(_BACKLOG)
    except OSError as error:
        _say(f"vsock can't be used: {error}")
        return False
    threading.Thread(target=_accept, args=(listener, serve), name="vsock", daemon=True).start()
    return True


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    while True:
        try:
            connection, (cid, _) = listener.accept()
        except OSError as error:
            _say(f"vsock: {error}")
            time.sleep(0.1)  # out of descriptors, or of memory: some will be given back
            continue
        # A process inside the guest may be anyone; only the host may tell the agent what to do.
        if cid == _HOST_CID:
            serve(connection)
        else:
            connection.close()


def find_serial_port() -> str | None:
    """Return the device of the virtio-serial port that has our name, or None when there is none now."""
    try:
        names = sorted(os.listdir(_PORTS))
    except OSError:
        return None
    for name in names:
        try:
            with open(f"{_PORTS}/{name}/name") as handle:
                if handle.read(256).strip() == agent.SERIAL_PORT_NAME:
                    return f"/dev/{name}"
        except OSError:
            continue
    return None


def open_serial_port() -> int:
    """Return a descriptor of the port, waiting until the guest has it; :raises OSError: it can't be opened."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        poll = select.poll()
        poll.register(events, select.POLLIN)
        while True:
            path = find_serial_port()
            if path is not None and os.path.exists(path):
                return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            # The port's name comes from the host, after the driver; the kernel tells of both.
            poll.poll(_LOOK_AGAIN_MS)
            try:
                while events.recv(65536):
                    pass
            except OSError:
                pass


def serve_serial_port(serve: Callable[[socket.socket], None], opened: Callable[[], None]) -> None:
    """Let the multiplexer bring the host's streams, in a thread of its own; `opened` is called each time it begins.

    If it ends, so does the agent: PID 1 starts a new one, and that is better than one that can't be reached.
    """
    threading.Thread(target=_multiplex, args=(serve, opened), name="mux", daemon=True).start()


def _multiplex(serve: Callable[[socket.socket], None], opened: Callable[[], None]) -> None:
    def open_port() -> int:
        port = open_serial_port()
        opened()
        return port

    try:
        from . import _mux

        _mux.run(open_port, serve)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    _say("the multiplexer has ended")
    os._exit(1)


def _say(text: str) -> None:
    try:
        os.write(2, f"volant: {text}\n".encode(errors="replace"))
    except OSError:
        pass
