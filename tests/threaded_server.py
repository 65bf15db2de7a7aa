"""Servers that handle each connection in a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress


def serve_in_threads(listener: socket.socket, handle: Callable[[socket.socket], None]) -> threading.Thread:
    """Passes each connection to `handle`, in a thread of its own, until the listener is shut down.

    Returns the thread that accepts.
    """

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    return thread
