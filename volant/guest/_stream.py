"""One request and its answer on a byte stream: reads the head and the body, writes the answer."""

from __future__ import annotations

import time

from volant.model import agent

from ._http import TITLES, BodyFilter, Gone, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from socket import socket

    from ._http import Request

HEAD_TIMEOUT_S = 30.0
"""How long a client may take for the head of its request, and for the body of one of the agent's own routes."""
WRITE_TIMEOUT_S = 60.0
"""How long a client may leave a short answer unread."""
LAST_CHUNK = b"0\r\n\r\n"
_READ = 64 * 1024


def chunk(data: bytes) -> bytes:
    """Returns `data`, which must not be empty, as one chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Stream:
    """A byte stream, and the bytes that were read from it but not processed yet."""

    def __init__(self, sock: socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.eof = False
        self.answered = False
        """Whether the head of the answer was sent. After that errors can't be answered."""

    def _fill(self, deadline: float) -> bool:
        """Reads more; returns False at the end of the stream. Raises the errors of `read_head`."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise Problem(408, "the request did not arrive in time")
        self.sock.settimeout(left)
        try:
            data = self.sock.recv(_READ)
        except TimeoutError:
            raise Problem(408, "the request did not arrive in time") from None
        except OSError:
            raise Gone from None
        if not data:
            self.eof = True
            return False
        self.buffer += data
        return True

    def read_head(self) -> bytes:
        """Returns a head, without the empty line that ends it.

        :raises Gone: the stream ended
        :raises Problem: 408, too slow; 431, too long
        """
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        seen = 0
        while True:
            end = self.buffer.find(b"\r\n\r\n", max(0, seen - 3))
            if 0 <= end <= agent.MAX_HEAD_BYTES:
                head = bytes(self.buffer[:end])
                del self.buffer[: end + 4]
                return head
            seen = len(self.buffer)
            if seen > agent.MAX_HEAD_BYTES:
                raise Problem(431, f"the head is longer than {agent.MAX_HEAD_BYTES} bytes")
            if not self._fill(deadline):
                raise Gone

    def read_body(self, request: Request) -> bytes:
        """Returns the body of a request to the agent itself.

        :raises Problem: 413, too long; 408, too slow; 400, malformed
        :raises Gone: the stream ended in the body
        """
        limit = agent.MAX_JSON_BYTES
        if request.framing.length is not None and request.framing.length > limit:
            raise Problem(413, f"the body is longer than {limit} bytes")
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        body = bytearray()
        for data in self._pieces(request, lambda: deadline):
            body += data
            if len(body) > limit:
                raise Problem(413, f"the body is longer than {limit} bytes")
        return bytes(body)

    def pieces(self, request: Request, silence_s: float) -> Iterator[bytes]:
        """Returns an iterator over a body of any length, in pieces as they arrive.

        :raises Problem: 408, nothing arrived for `silence_s`; 400, malformed
        :raises Gone: the stream ended in the body
        """
        return self._pieces(request, lambda: time.monotonic() + silence_s)

    def _pieces(self, request: Request, deadline: Callable[[], float]) -> Iterator[bytes]:
        self.expect(request)
        body = BodyFilter(request.framing)
        while not body.done:
            if not self.buffer and not self._fill(deadline()):
                raise Gone
            data = bytearray()
            try:
                used = body.feed(self.buffer, data)
            except ValueError as error:
                raise Problem(400, f"malformed body: {error}") from None
            del self.buffer[:used]
            if data:
                yield bytes(data)

    def expect(self, request: Request) -> None:
        """Sends "100 Continue" to a client that waits for it.

        :raises Problem: 417, the client expects something else
        """
        expected = request.header(b"expect").lower()
        if expected == b"100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif expected:
            raise Problem(417, "this expectation can't be met")

    def send(self, data: bytes | bytearray | memoryview, timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Writes all of `data`. :raises Gone: the client disconnected, or read nothing for `timeout_s`."""
        try:
            self.sock.settimeout(timeout_s)
            self.sock.sendall(data)
        except OSError:
            raise Gone from None

    def head(self, status: int, headers: Iterable[tuple[str, str]], *, chunked: bool = False) -> bytes:
        """Returns the head of the answer, which the caller sends."""
        lines = [f"HTTP/1.1 {status} {TITLES.get(status, 'Status')}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        self.answered = True
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def start(self, status: int, headers: Iterable[tuple[str, str]], *, chunked: bool = False) -> None:
        """Writes the head of the answer."""
        self.send(self.head(status, headers, chunked=chunked))

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
        *,
        head_only: bool = False,
    ) -> None:
        """Writes a whole answer, at once: a second write takes a guest without KVM two milliseconds."""
        fields = [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]
        self.send(self.head(status, fields) + (b"" if head_only else body))
