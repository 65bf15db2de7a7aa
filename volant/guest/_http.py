"""HTTP/1.1 messages: the head of a request, the framing of its body, and the end of that body.

Rejected: the standard library's `http.server`, which imports `email`, `html` and `socketserver`, taking half a second
under emulation, and is lenient. Requests to a workload pass two parsers, and a head that the two read differently lets
a client smuggle a second request (RFC 9112, section 11). So unusual heads are refused: line ends other than CRLF,
folded lines, two lengths, a length together with chunks, any other transfer coding.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Headers = list[tuple[bytes, bytes]]

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CONTROL = bytes([*range(9), *range(10, 32), 127])
_VISIBLE = bytes(range(0x21, 0x7F))
_DIGITS = b"0123456789"
_HEX = b"0123456789abcdefABCDEF"
_MAX_HEADERS = 256
_MAX_LENGTH_DIGITS = 18
_MAX_CHUNK_LINE = 256
_MAX_TRAILER = 8 * 1024

TITLES = {
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
    """An error to answer with, as `application/problem+json`."""

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
        """Returns the JSON document."""
        import json

        value: dict[str, object] = {
            "type": "about:blank",
            "title": TITLES.get(self.status, "Error"),
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
    """The client has disconnected, so there is no answer."""


class Framing:
    """The end of a body: after `length` bytes, with its last chunk, or with the stream if `length` is None."""

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
        """The unchanged target: path and query, or `host:port` for CONNECT."""
        self.headers = headers
        """The fields in order, with names in lower case."""
        self.framing = framing

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.split("?", 1)[0]

    @property
    def query(self) -> str:
        """The part after the `?`, unchanged."""
        return self.target.partition("?")[2]

    def header(self, name: bytes) -> bytes:
        """Returns a field's values, joined by commas; empty if there is none."""
        return b", ".join(value for key, value in self.headers if key == name)


def parse_head(data: bytes) -> tuple[bytes, Headers]:
    """Returns the first line and the fields of a head, which is given without its empty line.

    :raises ValueError: the head is malformed
    """
    lines = data.split(b"\r\n")
    if len(lines) > _MAX_HEADERS + 1:
        raise ValueError(f"more than {_MAX_HEADERS} header fields")
    headers: Headers = []
    for line in lines:
        # Including bare CR and LF, and NUL.
        if line.translate(None, _CONTROL) != line:
            raise ValueError("control characters in the head")
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not name or name.translate(None, _TOKEN):
            raise ValueError("a line of the head is not a header field")
        headers.append((name.lower(), value.strip(b" \t")))
    return lines[0], headers


def framing_of(headers: Headers) -> Framing | None:
    """Returns the framing of the body according to the fields, or None if they have none.

    :raises ValueError: the fields contradict each other, or name an unknown coding
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
    """Returns the request of a head. :raises Problem: 400, malformed; 505, not HTTP/1.1."""
    try:
        line, headers = parse_head(data)
        words = line.split(b" ")
        if len(words) != 3:
            raise ValueError("the first line is not a request line")
        method, target, version = words
        if not method or len(method) > 32 or method.translate(None, _TOKEN):
            raise ValueError("the method is not a token")
        if version != b"HTTP/1.1":
            if version[:5] == b"HTTP/" and len(version) == 8:
                raise Problem(505, "only HTTP/1.1 is spoken here")
            raise ValueError("the first line is not a request line")
        if not target or target.translate(None, _VISIBLE):
            raise ValueError("the target has characters that must be encoded")
        if method != b"CONNECT" and not target.startswith(b"/") and target != b"*":
            raise ValueError("the target is not a path")
        if len([1 for name, _ in headers if name == b"host"]) > 1:
            raise ValueError("more than one Host")
        framing = framing_of(headers)
    except ValueError as error:
        raise Problem(400, f"malformed request: {error}") from None
    return Request(method.decode(), target.decode(), headers, framing or Framing(0))


class BodyFilter:
    """Finds the end of a body in a stream, and checks its chunks.

    With `raw` it outputs the bytes unchanged, including chunk lines, for a relay; otherwise the content.
    """

    def __init__(self, framing: Framing, *, raw: bool = False) -> None:
        self._chunked = framing.chunked
        self._left = framing.length if not framing.chunked else 0
        self._raw = raw
        # The next part of a chunked body: "size" a size line, "data", "end" the CRLF after the data, "trailer".
        self._part = "size"
        self._line = bytearray()
        self._trailer = 0
        self.done = framing.empty

    @property
    def until_close(self) -> bool:
        """Whether the body ends only with the stream."""
        return not self._chunked and self._left is None

    def feed(self, data: bytes | bytearray, out: bytearray) -> int:
        """Appends the part of `data` that belongs to the body to `out`; returns the number of bytes used.

        :raises ValueError: a chunk is malformed
        """
        if self.done:
            return 0
        if not self._chunked:
            used = len(data) if self._left is None else min(self._left, len(data))
            out += data if used == len(data) else data[:used]
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
