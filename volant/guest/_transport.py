"""Accepts byte streams: on vsock if the guest has it, otherwise from the multiplexer on its virtio-serial port."""

# ruff: noqa: PTH110, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time

from volant.model import agent

from ._system import read_text, say
from ._watch import CHECK_S, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_PORTS = "/sys/class/virtio-ports"
_HOST_CID = 2
_NETLINK_KOBJECT_UEVENT = 15
_BACKLOG = 128


def listen_on_vsock(serve: Callable[[socket.socket], None]) -> bool:
    """Starts accepting the host's connections to the agent's vsock port; returns False if this guest has no vsock."""
    if not os.path.exists("/dev/vsock"):
        return False
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        listener.bind((socket.VMADDR_CID_ANY, agent.AGENT_PORT))
        listener.listen(_BACKLOG)
    except OSError as error:
        say(f"vsock can't be used: {error}")
        return False
    threading.Thread(target=_accept, args=(listener, serve), name="vsock", daemon=True).start()
    return True


def _accept(listener: socket.socket, serve: Callable[[socket.socket], None]) -> None:
    while True:
        try:
            connection, (cid, _) = listener.accept()
        except OSError as error:
            say(f"vsock: {error}")
            time.sleep(0.1)  # out of descriptors or memory for a moment
            continue
        # Any process in the guest can connect; only the host may command the agent.
        if cid == _HOST_CID:
            serve(connection)
        else:
            connection.close()


def find_serial_port() -> str | None:
    """Returns the device of the agent's virtio-serial port, or None if there is none yet."""
    try:
        names = sorted(os.listdir(_PORTS))
    except OSError:
        return None
    for name in names:
        if read_text(f"{_PORTS}/{name}/name") == agent.SERIAL_PORT_NAME:
            return f"/dev/{name}"
    return None


def open_serial_port() -> int:
    """Waits until the guest has the port, opens it and returns its descriptor.

    :raises OSError: the port can't be opened
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        while True:
            path = find_serial_port()
            if path is not None and os.path.exists(path):
                return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            # The kernel sends an event for the driver, and one for the port's name, which comes later from the host.
            poll({events.fileno(): select.POLLIN}, CHECK_S)
            try:
                while events.recv(65536):
                    pass
            except OSError:
                pass


def serve_serial_port(serve: Callable[[socket.socket], None], opened: Callable[[], None]) -> None:
    """Runs the multiplexer on the serial port, in a separate thread. If it ends, the agent exits and PID 1 starts a new
    one.

    :param opened: called each time the port was opened
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
    say("the multiplexer has ended")
    os._exit(1)
