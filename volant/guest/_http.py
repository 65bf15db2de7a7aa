"""HTTP/1.1 on one byte stream: one request, one answer, then the stream ends.

Not the standard library's `http.server`: it pulls in `email`, `html` and `socketserver`, half a second of imports under
emulation, and it is lenient where this must be strict. What is relayed to a workload goes through two parsers, and a
head that they read differently is how one request becomes two. So what is unusual is refused: other line ends than
CRLF, folded lines, two lengths, a length beside chunks, any other transfer coding.
"""

from __future__ import annotations

import time

from volant.model import agent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from socket import socket

    Headers = list[tuple[bytes, bytes]]

HEAD_TIMEOUT_S = 30.0
"""How long a client may take for the head of its request, and for the body of one of the agent's own routes."""
WRITE_TIMEOUT_S = 60.0
"""How long a client may leave a short answer unread."""

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONTROL = bytes([*range(9), *range(10, 32), 127])
_VISIBLE = bytes(range(0x21, 0x7F))
_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"
_MAX_HEADERS = 256
_MAX_LENGTH_DIGITS = 18
_MAX_CHUNK_LINE = 256
_MAX_TRAILER = 8 * 1024
_READ = 64 * 1024

_TITLES = {
    100: "Continue",
    200: "OK",
    201: "Created",
    202: "Accepted",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    417: "Expectation Failed",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
    507: "Insufficient Storage",
}


class Problem(Exception):
    """An answer that says why not, as `application/problem+json`."""

    def __init__(
        self, status: int, detail: str, *, field: str = "", hint: str = "", headers: Iterable[tuple[str, str]] = ()
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.field = field
        self.hint = hint
        self.headers = tuple(headers)

    def body(self) -> bytes:
        """Return the JSON of it."""
        import json

        value: dict[str, object] = {
            "type": "about:blank",
            "title": _TITLES.get(self.status, "Error"),
            "status": self.status,
            "detail": self.detail,
            "error": self.detail,
        }
        if self.field:
            value["field"] = self.field
        if self.hint:
            value["hint"] = self.hint
        return json.dumps(value).encode() + b"\n"


class Gone(Exception):
    """The client has left: there is nobody to answer."""


class Framing:
    """How long a body is: `length` bytes, or chunks, or up to the end of the stream when `length` is None."""

    __slots__ = ("chunked", "length")

    def __init__(self, length: int | None, chunked: bool = False) -> None:
        self.length = length
        self.chunked = chunked

    @property
    def empty(self) -> bool:
        """Whether there is no body."""
        return self.length == 0 and not self.chunked


class Request:
    """The head of a request."""

    __slots__ = ("framing", "headers", "method", "target")

    def __init__(self, method: str, target: str, headers: Headers, framing: Framing) -> None:
        self.method = method
        self.target = target
        """As it came: path and query for all methods but CONNECT."""
        self.headers = headers
        """In order, names in lower case."""
        self.framing = framing

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.split("?", 1)[0]

    @property
    def query(self) -> str:
        """What follows the `?`, as it came."""
        return self.target.partition("?")[2]

    def header(self, name: bytes) -> bytes:
        """Return a field's values, joined by commas; empty when there is none."""
        return b", ".join(value for key, value in self.headers if key == name)


def parse_head(data: bytes) -> tuple[bytes, Headers]:
    """Return the first line and the fields of a head (without the empty line).

    :raises ValueError: it is malformed, and how
    """
    lines = data.split(b"\r\n")
    if len(lines) > _MAX_HEADERS + 1:
        raise ValueError(f"more than {_MAX_HEADERS} header fields")
    headers: Headers = []
    for line in lines:
        # Also catches bare CR and LF, and NUL.
        if line.translate(None, _CONTROL) != line:
            raise ValueError("control characters in the head")
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, _TOKEN):
            raise ValueError("a line of the head is no header field")
        headers.append((name.lower(), value.strip(b" \t")))
    return lines[0], headers


def framing_of(headers: Headers) -> Framing | None:
    """Return what the fields say about the body, or None when they say nothing.

    :raises ValueError: they contradict themselves, or name a coding that is not known here
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings:
        if lengths:
            raise ValueError("both Content-Length and Transfer-Encoding")
        if len(codings) != 1 or codings[0].lower() != b"chunked":
            raise ValueError("a Transfer-Encoding that is not chunked")
        return Framing(None, chunked=True)
    if not lengths:
        return None
    text = lengths[0]
    if len(lengths) != 1 or not text or text.translate(None, _DIGITS) or len(text) > _MAX_LENGTH_DIGITS:
        raise ValueError("a malformed Content-Length")
    return Framing(int(text))


def parse_request(data: bytes) -> Request:
    """Return the request of a head; :raises Problem: 400, 501 or 505, and why."""
    try:
        line, headers = parse_head(data)
        words = line.split(b" ")
        if len(words) != 3:
            raise ValueError("the first line is no request line")
        method, target, version = words
        if not method or len(method) > 32 or method.translate(None, _TOKEN):
            raise ValueError("the method is no token")
        if version != b"HTTP/1.1":
            if version[:5] == b"HTTP/" and len(version) == 8:
                raise Problem(505, "only HTTP/1.1 is spoken here")
            raise ValueError("the first line is no request line")
        if not target or target.translate(None, _VISIBLE):
            raise ValueError("the target has characters that must be encoded")
        if method != b"CONNECT" and not target.startswith(b"/") and target != b"*":
            raise ValueError("the target is no path")
        if len([1 for name, _ in headers if name == b"host"]) > 1:
            raise ValueError("more than one Host")
        framing = framing_of(headers)
    except ValueError as error:
        raise Problem(400, f"malformed request: {error}") from None
    return Request(method.decode(), target.decode(), headers, framing or Framing(0))


class Stream:
    """A byte stream with what has been read from it and not been used."""

    def __init__(self, sock: socket) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self.eof = False
        self.answered = False
        """Whether the head of the answer is out: an error can't be told any more."""

    def _fill(self, deadline: float) -> bool:
        """Read some more; return whether there was any. :raises Gone, Problem: as `read_head` says."""
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
        """Return a head, without the empty line that ends it.

        :raises Gone: the stream ended before; :raises Problem: 408 it was too slow, 431 it is too long
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
        """Return the body of a request to the agent itself.

        :raises Problem: 413 too long, 408 too slow, 400 malformed; :raises Gone: the stream ended in it
        """
        limit = agent.MAX_JSON_BYTES
        if request.framing.length is not None and request.framing.length > limit:
            raise Problem(413, f"the body is longer than {limit} bytes")
        self.expect(request)
        deadline = time.monotonic() + HEAD_TIMEOUT_S
        filter_ = BodyFilter(request.framing)
        raw = bytearray()
        while not filter_.done:
            if not self.buffer and not self._fill(deadline):
                raise Gone
            try:
                used = filter_.feed(self.buffer, raw)
            except ValueError as error:
                raise Problem(400, f"malformed body: {error}") from None
            del self.buffer[:used]
            if len(raw) > limit:
                raise Problem(413, f"the body is longer than {limit} bytes")
        return bytes(raw)

    def pieces(self, request: Request, silence_s: float) -> Iterator[bytes]:
        """Yield the body of a request, however long it is, as it comes.

        :raises Problem: 408 nothing came for `silence_s`, 400 malformed; :raises Gone: the stream ended in it
        """
        self.expect(request)
        filter_ = BodyFilter(request.framing)
        while not filter_.done:
            if not self.buffer and not self._fill(time.monotonic() + silence_s):
                raise Gone
            data = bytearray()
            try:
                used = filter_.feed(self.buffer, data)
            except ValueError as error:
                raise Problem(400, f"malformed body: {error}") from None
            del self.buffer[:used]
            if data:
                yield bytes(data)

    def expect(self, request: Request) -> None:
        """Say "100 Continue" to a client that waits for it; :raises Problem: 417 it expects something else."""
        expected = request.header(b"expect").lower()
        if expected == b"100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif expected:
            raise Problem(417, "this expectation can't be met")

    def send(self, data: bytes | bytearray | memoryview, timeout_s: float = WRITE_TIMEOUT_S) -> None:
        """Write all of `data`; :raises Gone: the client has left, or did not read for `timeout_s`."""
        try:
            self.sock.settimeout(timeout_s)
            self.sock.sendall(data)
        except OSError:
            raise Gone from None

    def start(self, status: int, headers: Iterable[tuple[str, str]], *, chunked: bool = False) -> None:
        """Write the head of the answer."""
        lines = [f"HTTP/1.1 {status} {_TITLES.get(status, 'Status')}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in headers]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        self.answered = True
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace"))

    def answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
        *,
        head_only: bool = False,
    ) -> None:
        """Write a whole answer."""
        fields = [("Content-Type", content_type), ("Content-Length", str(len(body))), *headers]
        self.start(status, fields)
        if not head_only:
            self.send(body)


def chunk(data: bytes) -> bytes:
    """Return `data` as one chunk; it must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


class BodyFilter:
    """Follows a body through a stream: where it ends, and that its chunks are well formed.

    With `raw` it gives the bytes as they came, chunk lines included, for a relay; otherwise the content.
    """

    def __init__(self, framing: Framing, *, raw: bool = False) -> None:
        self._chunked = framing.chunked
        self._left = framing.length if not framing.chunked else 0
        self._raw = raw
        # For chunks: "size" a size line comes, "data", "end" the CRLF after the data, "trailer".
        self._part = "size"
        self._line = bytearray()
        self._trailer = 0
        self.done = framing.empty

    @property
    def until_close(self) -> bool:
        """Whether only the end of the stream ends the body."""
        return not self._chunked and self._left is None

    def feed(self, data: bytes | bytearray, out: bytearray) -> int:
        """Append what belongs to the body to `out`; return how many bytes of `data` were used.

        :raises ValueError: a chunk is malformed
        """
        if self.done:
            return 0
        if not self._chunked:
            used = len(data) if self._left is None else min(self._left, len(data))
            out += data[:used]
            if self._left is not None:
                self._left -= used
                self.done = self._left == 0
            return used
        return self._feed_chunks(data, out)

    def _feed_chunks(self, data: bytes | bytearray, out: bytearray) -> int:
        at = 0
        while at < len(data) and not self.done:
            if self._part == "data":
                assert self._left is not None
                used = min(self._left, len(data) - at)
                out += data[at : at + used]
                at += used
                self._left -= used
                if self._left == 0:
                    self._part = "end"
                continue
            newline = data.find(b"\n", at)
            used = (newline + 1 if newline >= 0 else len(data)) - at
            self._line += data[at : at + used]
            if len(self._line) > _MAX_CHUNK_LINE and self._part != "trailer":
                raise ValueError("a chunk's size line is too long")
            if self._raw:
                out += data[at : at + used]
            at += used
            if newline >= 0:
                line = bytes(self._line)
                self._line.clear()
                self._end_of_line(line)
            elif self._trailer + len(self._line) > _MAX_TRAILER:
                raise ValueError("the trailer is too long")
        return at

    def _end_of_line(self, line: bytes) -> None:
        if not line.endswith(b"\r\n"):
            raise ValueError("a line of the chunked coding does not end with CRLF")
        text = line[:-2]
        if self._part == "end":
            if text:
                raise ValueError("a chunk is longer than it says")
            self._part = "size"
        elif self._part == "size":
            size = text.split(b";", 1)[0].rstrip(b" \t")
            if not size or len(size) > 15 or size.translate(None, _HEX) or text.translate(None, _CONTROL) != text:
                raise ValueError("a chunk's size is malformed")
            self._left = int(size, 16)
            self._part = "data" if self._left else "trailer"
        else:
            self._trailer += len(line)
            if self._trailer > _MAX_TRAILER:
                raise ValueError("the trailer is too long")
            self.done = not text


def has_left(sock: socket) -> bool:
    """Return whether a client whose end of file has been read has closed its stream, and not just one half of it.

    Writing nothing fails once the other side reads no more, for Unix sockets and for vsock alike. (For TCP the answer
    comes only with the first real write.)
    """
    try:
        sock.send(b"")
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False
