"""Waits for descriptors, for other threads, and for a client to disconnect."""

from __future__ import annotations

import os
import select
import time

from ._http import Gone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

POLLRDHUP = 0x2000
CHECK_S = 1.0
"""The interval of checks of a half-closed client: a vsock that closes after a half close wakes no poll."""


def poll(masks: dict[int, int], timeout_s: float | None = None) -> dict[int, int]:
    """Waits for events; returns them by descriptor, empty when the time is over.

    :param masks: descriptors and the events to wait for
    :param timeout_s: None for no limit; negative for no wait
    """
    poller = select.poll()
    for fd, mask in masks.items():
        poller.register(fd, mask)
    return dict(poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999))))


def has_left(sock: socket) -> bool:
    """Returns whether a client whose end of file was read has closed its stream, and not just one half of it.

    Sending no bytes fails once the peer reads no more, for Unix sockets and vsock. (For TCP only a real write fails.)
    """
    try:
        sock.send(b"")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False


class Wakeup:
    """Wakes the one thread that polls `fd`, from any other thread."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        """Wakes the thread, now or when it polls next."""
        try:
            os.eventfd_write(self.fd, 1)
        except (BlockingIOError, OSError):
            pass

    def clear(self) -> None:
        """Makes the next poll wait again."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Closes the descriptor; `wake` must not be called any more."""
        os.close(self.fd)


class Client:
    """A client that waits for its answer, and may disconnect at any time.

    A half close is not a disconnect: the client ends its request and still waits for the answer.
    """

    def __init__(self, sock: socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self._half_closed = False

    def wait(self, others: dict[int, int], timeout_s: float | None, *, writable: bool = False) -> dict[int, int]:
        """Waits for events of other descriptors, and with `writable` until the client accepts bytes.

        Returns the events by descriptor, including those of the client's socket; empty when the time is over.

        :raises Gone: the client has disconnected
        """
        own = self.sock.fileno()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if end is None else end - time.monotonic()
            wait_s = left_s
            if self._half_closed:
                wait_s = CHECK_S if left_s is None else min(left_s, CHECK_S)
            mask = (select.POLLOUT if writable else 0) | (0 if self._half_closed else POLLRDHUP)
            found = poll({own: mask, **others}, wait_s)
            events = found.pop(own, 0)
            if events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                raise Gone
            if (events & POLLRDHUP or self._half_closed) and has_left(self.sock):
                raise Gone
            self._half_closed = self._half_closed or bool(events & POLLRDHUP)
            if events & ~POLLRDHUP:
                found[own] = events & ~POLLRDHUP
            if found or (end is not None and time.monotonic() >= end):
                return found

    def send_some(self, data: memoryview) -> int:
        """Writes as much as fits now, possibly nothing; returns the number of bytes. :raises Gone: the client has
        disconnected."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            raise Gone from None
