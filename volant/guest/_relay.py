"""Relays between a client and a port of the guest's loopback: requests to the workload, upgrades, and `CONNECT`.

One thread and one poll loop for each stream, with one bounded buffer for each direction. A side is read only when the
other has accepted everything before, so a slow side slows down the other.

A request is forwarded unchanged except for its hop-by-hop fields. Its body and the body of the answer are parsed
(`_http.BodyFilter`), so neither can smuggle a second message, and the relay finds the end of the answer even if the
workload leaves its connection open.
"""

from __future__ import annotations

import select
import socket
import time

from volant.model import agent

from ._http import BodyFilter, Framing, Gone, Problem, framing_of, parse_head
from ._watch import CHECK_S, POLLRDHUP, has_left, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ._http import Headers, Request
    from ._stream import Stream

CONNECT_TIMEOUT_S = 10.0
STARTING_S = 30.0
"""How long to wait for the port of a workload that is starting."""
_RETRY_S = 0.1
_BUFFER = 64 * 1024
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_END_TO_END = {b"content-length", b"content-type", b"host", b"transfer-encoding", b"trailer"}
"""Fields that `Connection` can't remove, as that would change the meaning of the message."""


def connect(stream: Stream, request: Request, is_starting: Callable[[int], bool]) -> None:
    """Answers `CONNECT`, and relays.

    :param is_starting: whether the workload is starting and will listen at a port
    :raises Problem: 400 or 403, the target is refused; 502 or 504, nothing listens
    """
    host, colon, text = request.target.rpartition(":")
    if not colon or not text.isascii() or not text.isdecimal() or len(text) > 5 or not 0 < int(text) < 65536:
        raise Problem(400, "CONNECT wants host:port")
    if host not in _LOOPBACK:
        raise Problem(403, f"only the guest's loopback can be reached, not {host[:80]}")
    upstream = dial(int(text), is_starting, ipv6=host == "[::1]", what=f"port {int(text)} of the guest")
    with upstream:
        stream.answered = True
        stream.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        relay = _Relay(stream, upstream, None)
        relay.run()


def dial(
    port: int, is_starting: Callable[[int], bool], *, ipv6: bool = False, what: str = "the workload"
) -> socket.socket:
    """Connects to a port of the loopback, and waits for a workload that is starting: a VM counts as running when its
    agent answers, before the workload has started.

    :raises Problem: 502 or 504
    """
    give_up_at = time.monotonic() + STARTING_S
    while True:
        try:
            return _dial(port, ipv6, what)
        except Problem as problem:
            if problem.status != 502 or not is_starting(port) or time.monotonic() > give_up_at:
                raise
        time.sleep(_RETRY_S)


def _dial(port: int, ipv6: bool, what: str) -> socket.socket:
    family, host = (socket.AF_INET6, "::1") if ipv6 else (socket.AF_INET, "127.0.0.1")
    upstream = socket.socket(family, socket.SOCK_STREAM)
    try:
        upstream.settimeout(CONNECT_TIMEOUT_S)
        upstream.connect((host, port))
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except TimeoutError:
        upstream.close()
        raise Problem(504, f"{what} does not accept connections") from None
    except OSError as error:
        upstream.close()
        raise Problem(502, f"{what} can't be reached: {error.strerror}") from None
    return upstream


def forward(stream: Stream, request: Request, target: str, port: int, is_starting: Callable[[int], bool]) -> None:
    """Forwards a request to the workload at `port` with the path `target`, and the answer back.

    :param is_starting: see `connect`
    :raises Problem: 502 or 504, the workload did not answer
    :raises Gone: the client disconnected
    """
    with dial(port, is_starting) as upstream:
        upgrade = request.header(b"upgrade") if _wants_upgrade(request.headers) else b""
        if upgrade and not request.framing.empty:
            raise Problem(400, "a request to upgrade can't have a body")
        lines = [f"{request.method} {target} HTTP/1.1".encode()]
        lines += [name + b": " + value for name, value in without_hops(request.headers)]
        lines += [b"connection: upgrade", b"upgrade: " + upgrade] if upgrade else [b"connection: close"]
        exchange = _Exchange(request, bool(upgrade))
        relay = _Relay(stream, upstream, exchange)
        relay.up += b"\r\n".join(lines) + b"\r\n\r\n"
        relay.run()


def without_hops(headers: Headers) -> Headers:
    """Returns the fields without hop-by-hop ones (RFC 9110, section 7.6.1)."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    gone = agent.HOP_BY_HOP | (named - _END_TO_END)
    return [(name, value) for name, value in headers if name not in gone]


def _wants_upgrade(headers: Headers) -> bool:
    tokens = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    return b"upgrade" in tokens and any(name == b"upgrade" for name, _ in headers)


class _Exchange:
    """Parses one request and its answer on their way through the relay."""

    def __init__(self, request: Request, upgrade: bool) -> None:
        self._method = request.method
        self._upgrade = upgrade
        self.request = BodyFilter(request.framing, raw=True)
        self._head: bytearray | None = bytearray()
        self._body: BodyFilter | None = None
        self.answered = False
        self.upgraded = False
        self.done = False

    def from_client(self, data: bytearray, out: bytearray) -> int:
        """Moves the bytes of the request; returns their number. Bytes after it are ignored."""
        return len(data) if self._pass(data, out) else self.request.feed(data, out)

    def _pass(self, data: bytearray, out: bytearray) -> bool:
        if self.upgraded:
            out += data
        return self.upgraded

    def from_workload(self, data: bytearray, out: bytearray) -> int:
        """Moves the bytes of the answer; returns their number. :raises ValueError: the answer is malformed."""
        used = 0
        while used < len(data) and not self.done:
            rest = data[used:] if used else data
            if self._pass(rest, out):
                return len(data)
            if self._head is not None:
                used += self._collect(rest, out)
            else:
                assert self._body is not None
                used += self._body.feed(rest, out)
                self.done = self._body.done
        return used

    def _collect(self, data: bytearray, out: bytearray) -> int:
        assert self._head is not None
        had = len(self._head)
        self._head += data
        end = self._head.find(b"\r\n\r\n", max(0, had - 3))
        if end < 0 or end > agent.MAX_HEAD_BYTES:
            if len(self._head) > agent.MAX_HEAD_BYTES:
                raise ValueError(f"a head longer than {agent.MAX_HEAD_BYTES} bytes")
            return len(data)
        head = bytes(self._head[:end])
        self._head.clear()
        self._take_head(head, out)
        return end + 4 - had

    def _take_head(self, head: bytes, out: bytearray) -> None:
        line, headers = parse_head(head)
        version, _, rest = line.partition(b" ")
        code = rest[:3]
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(code) != 3 or not code.isdigit() or rest[3:4].strip():
            raise ValueError("its first line is not a status line")
        status = int(code)
        if not 100 <= status <= 599:
            raise ValueError(f"the status {status}")
        fields = without_hops(headers)
        lines = [b"HTTP/1.1 " + rest]
        if status == 101:
            if not self._upgrade:
                raise ValueError("an upgrade that was not requested")
            protocol = b", ".join(value for name, value in headers if name == b"upgrade")
            fields += [(b"connection", b"upgrade"), (b"upgrade", protocol)]
            self._head = None
            self.upgraded = True
        elif status >= 200:
            self._body = BodyFilter(self._framing(status, headers, version), raw=True)
            self._head = None
            self.done = self._body.done
            fields.append((b"connection", b"close"))
        self.answered = self.answered or self._head is None
        lines += [name + b": " + value for name, value in fields]
        out += b"\r\n".join(lines) + b"\r\n\r\n"

    def _framing(self, status: int, headers: Headers, version: bytes) -> Framing:
        if self._method == "HEAD" or status in (204, 304):
            return Framing(0)
        framing = framing_of(headers)
        if framing is not None and framing.chunked and version == b"HTTP/1.0":
            raise ValueError("chunks in HTTP/1.0")
        return framing or Framing(None)


class _Relay:
    """Two sockets and the buffers between them. Without an exchange all bytes pass unchanged."""

    def __init__(self, stream: Stream, upstream: socket.socket, exchange: _Exchange | None) -> None:
        self._stream = stream
        self._client = stream.sock
        self._upstream = upstream
        self._exchange = exchange
        self.up = bytearray()
        self._up_raw = stream.buffer
        self._down = bytearray()
        self._down_raw = bytearray()
        self._client_eof = stream.eof
        self._upstream_eof = False
        self._up_closed = False
        self._down_closed = False

    @property
    def _tunnel(self) -> bool:
        return self._exchange is None or self._exchange.upgraded

    def run(self) -> None:
        """Relays until both sides have ended. :raises Problem: 502, the workload closed before it answered."""
        self._client.setblocking(False)
        self._upstream.setblocking(False)
        while True:
            self._move()
            if self._is_over():
                return
            self._wait()

    def _is_over(self) -> bool:
        if self._down or (self._exchange is not None and self._exchange.done):
            return not self._down
        if self._tunnel:
            return self._down_closed and self._up_closed
        if self._upstream_eof and not self._down_raw:
            assert self._exchange is not None
            if not self._exchange.answered:
                raise Problem(502, "the workload closed the connection without an answer")
            # The stream ends without the end of the body, so that the client sees the answer was cut short.
            return True
        return False

    def _move(self) -> None:
        """Moves bytes through the parsers, as far as buffers and sockets allow."""
        moved = True
        while moved:
            moved = False
            if self._up_raw and not self.up:
                if self._exchange is None:
                    self.up, self._up_raw = self._up_raw, self.up
                else:
                    try:
                        used = self._exchange.from_client(self._up_raw, self.up)
                    except ValueError as error:
                        self._refuse(400, f"malformed body: {error}")
                    del self._up_raw[:used]
                moved = moved or bool(self.up)
            if self._down_raw and not self._down:
                if self._exchange is None:
                    self._down, self._down_raw = self._down_raw, self._down
                else:
                    try:
                        used = self._exchange.from_workload(self._down_raw, self._down)
                    except ValueError as error:
                        self._refuse(502, f"the workload's answer is malformed: {error}")
                    del self._down_raw[:used]
                    if self._exchange.done:
                        self._down_raw.clear()
                moved = moved or bool(self._down)
            if self.up and not self._up_closed:
                moved = self._send(self._upstream, self.up) or moved
            if self._down:
                self._stream.answered = True
                moved = self._send(self._client, self._down) or moved
        self._forward_ends()

    def _refuse(self, status: int, detail: str) -> None:
        if self._stream.answered or self._down:
            raise Gone
        raise Problem(status, detail)

    def _forward_ends(self) -> None:
        if not self._tunnel:
            return
        if self._client_eof and not self._up_raw and not self.up and not self._up_closed:
            self._up_closed = True
            self._half_close(self._upstream)
        if self._upstream_eof and not self._down_raw and not self._down and not self._down_closed:
            self._down_closed = True
            self._half_close(self._client)

    def _half_close(self, sock: socket.socket) -> None:
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def _send(self, sock: socket.socket, data: bytearray) -> bool:
        try:
            sent = sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            if sock is self._client:
                raise Gone from None
            # The workload answers without reading the whole request, which is allowed.
            self._up_closed = True
            data.clear()
            if self._tunnel:
                self._up_raw.clear()
            return False
        del data[:sent]
        return sent > 0

    def _wants_client(self) -> bool:
        if self._client_eof or self._up_raw or self._up_closed:
            return False
        return self._tunnel or (self._exchange is not None and not self._exchange.request.done)

    def _wait(self) -> None:
        reading = self._wants_client()
        mask = (select.POLLIN if reading else 0) | (select.POLLOUT if self._down else 0)
        if not reading and not self._client_eof and not self._up_raw:
            mask |= POLLRDHUP
        masks = {} if self._client_eof and self._down_closed else {self._client.fileno(): mask}
        upstream = select.POLLIN if not self._upstream_eof and not self._down_raw else 0
        if self.up and not self._up_closed:
            upstream |= select.POLLOUT
        if upstream:
            # Even without a mask poll reports a hang-up, over and over.
            masks[self._upstream.fileno()] = upstream
        found = poll(masks, CHECK_S if self._client_eof and not self._down_closed else None)
        self._handle_client(found.get(self._client.fileno(), 0))
        if found.get(self._upstream.fileno(), 0) & ~select.POLLOUT:
            self._upstream_eof = self._read(self._upstream, self._down_raw) is False

    def _handle_client(self, events: int) -> None:
        """Reads from the client. :raises Gone: it has disconnected."""
        # Data may be left to read even if both halves are closed.
        if events & select.POLLIN:
            self._client_eof = self._read(self._client, self._up_raw) is False
        elif events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            raise Gone
        elif events & POLLRDHUP:
            # Nobody will read what follows the request.
            self._client_eof = True
        if not self._client_eof or self._down_closed:
            return
        unfinished = self._exchange is not None and not self._exchange.request.done and not self._up_raw
        if (not self._tunnel and unfinished) or ((self._up_closed or not self._tunnel) and has_left(self._client)):
            raise Gone

    def _read(self, sock: socket.socket, into: bytearray) -> bool | None:
        """Returns True for bytes, False for the end, None if there is nothing now."""
        try:
            data = sock.recv(_BUFFER)
        except BlockingIOError:
            return None
        except OSError:
            if sock is self._client:
                raise Gone from None
            return False
        into += data
        return bool(data)
