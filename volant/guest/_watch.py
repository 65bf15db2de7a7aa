"""Waiting for something and for the client's leaving at the same time."""

from __future__ import annotations

import os
import select
import time

from ._http import Gone, has_left

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

_POLLRDHUP = 0x2000
_LOOK_AGAIN_MS = 1000


class Bell:
    """Wakes up the one thread that waits for it, from any other."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def ring(self) -> None:
        """Wake it up, now or when it next waits."""
        try:
            os.eventfd_write(self.fd, 1)
        except (BlockingIOError, OSError):
            pass

    def quiet(self) -> None:
        """Forget that it rang."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Give the descriptor back; nobody may ring any more."""
        os.close(self.fd)


class Client:
    """A client that is being answered, and that may leave at any time.

    Its half close is no leaving: it may say "no more of the request" and still wait for the answer.
    """

    def __init__(self, sock: socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self._half_closed = False

    def wait(self, others: dict[int, int], timeout_s: float | None, *, writable: bool = False) -> dict[int, int]:
        """Wait for `others` (descriptor to poll mask), or, with `writable`, until the client takes bytes.

        Returns the events by descriptor, those of the client's socket too; empty when the time is over.

        :raises Gone: the client has left
        """
        poll = select.poll()
        mask = (select.POLLOUT if writable else 0) | (0 if self._half_closed else _POLLRDHUP)
        poll.register(self.sock, mask)
        for fd, events in others.items():
            poll.register(fd, events)
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_ms = None if end is None else max(0, int((end - time.monotonic()) * 1000 + 0.999))
            # A vsock that was closed after a half close does not say so: it has to be looked at.
            slice_ms = left_ms
            if self._half_closed:
                slice_ms = _LOOK_AGAIN_MS if left_ms is None else min(left_ms, _LOOK_AGAIN_MS)
            found = dict(poll.poll(slice_ms))
            mine = found.get(self.sock.fileno(), 0)
            if mine & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                raise Gone
            if (mine & _POLLRDHUP or self._half_closed) and has_left(self.sock):
                raise Gone
            if mine & _POLLRDHUP:
                self._half_closed = True
                mask &= ~_POLLRDHUP
                poll.modify(self.sock, mask)
                found[self.sock.fileno()] = mine & ~_POLLRDHUP
                if not found[self.sock.fileno()]:
                    del found[self.sock.fileno()]
            if found or (end is not None and time.monotonic() >= end):
                return found

    def send_some(self, data: memoryview) -> int:
        """Write what fits now, perhaps nothing; :raises Gone: the client has left."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            raise Gone from None
