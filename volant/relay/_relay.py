"""Relays between a client and a server inside a guest: HTTP exchanges, and WebSockets as bytes.

At most one piece of a body is buffered: the next one is read from one side when the other side has taken the previous
one. Each piece is charged to the VM in `FairShare`, so that busy relays leave time for the rest of the daemon.

A WebSocket is not decoded. The client's handshake goes to the guest unchanged, the guest's answer comes back, and then
bytes are passed on. That is cheap, and extensions, fragments, pings and closing codes are unchanged. Only the
boundaries of the guest's frames are tracked, so that a closing frame (1001) can be inserted between two of them when
the daemon stops. A WebSocket library on both sides was rejected: it unmasks and masks every byte in Python, and limits
the size of messages.

No piece has a deadline: an open stream may be silent for days, a command in the guest may print nothing for an hour.
A stream ends when either side ends, which the kernel's keep-alive (`_serving.py`) or the channel detects.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol, cast

import trio

from volant.channel import AgentClient, AgentProtocolError, AgentResponse, AgentUnreachable, Channel, ChannelStream
from volant.concurrency import FairShare
from volant.http import Call, interruptible
from volant.model import Problem, invalid

from ._headers import Header
from ._redirect import unreachable

HEAD_S = 600.0
"""How long a server in a guest may take to begin its answer."""
CONNECT_S = 10.0
_PIECE = 256 * 1024
"""The size of one read. Smaller reads take more iterations for a gigabyte: 64 KiB cost twice the processor time."""
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
_MAX_REFUSAL = 64 * 1024
_MAX_REASON = 123
"""Maximum bytes of the reason in a closing frame (RFC 6455, 5.5)."""
_REFUSAL_S = 30.0
"""How long a guest may take for the body of a refusal, which is read before the client gets it."""
_FRAMES = 512
"""Maximum frames of a guest's WebSocket that are tracked before other tasks run."""
_FRAME_COST = 256
"""The cost of a frame in `FairShare`, in bytes: tracking it takes at least as long as passing on this many. An empty
frame has two bytes."""
_SEND_S = 300.0
"""How long a guest may take to accept a piece of a WebSocket's bytes."""

_REST_S = 1.0
"""How long a guest that accepts no more bytes of a WebSocket may send its remaining data."""
_UNKNOWN = frozenset({404, 405})
Explain = Callable[[int, bytes], Problem | None]
"""Receives status and body of an answer; returns a clearer problem to send instead, or None."""


class Server(Protocol):
    """The target of a relayed request."""

    @property
    def name(self) -> str:
        """The name for logs."""

    @property
    def target(self) -> str:
        """The path and the query of the request at the target."""

    def request_headers(self, headers: Iterable[Header]) -> list[Header]:
        """Returns the headers of the request at the target, from those of the client."""

    def answer_headers(self, headers: Iterable[Header]) -> list[Header]:
        """Returns the headers for the client, from those of the answer."""

    def upgrade_headers(self, headers: Iterable[Header]) -> list[Header]:
        """Returns the headers like `answer_headers`, for the answer to an upgrade."""

    def unreachable(self, why: str) -> Problem:
        """Returns the problem of a server that does not answer."""

    def closing(self) -> tuple[int, str] | None:
        """Returns the code and the reason for closing a WebSocket that has ended in the middle; None if it just
        ends."""


class Relay:
    """Relays requests, within one budget."""

    def __init__(self, share: FairShare) -> None:
        self._share = share

    async def run(
        self,
        call: Call,
        client: AgentClient,
        server: Server,
        *,
        share: int,
        method: str | None = None,
        explain: Explain | None = None,
        explained: Collection[int] = _UNKNOWN,
    ) -> None:
        """Passes `call` on to `client` as a request to `server`, with its own method or with another one.

        `explain` receives the answers with a status of `explained`, which must be short, and may replace them. `share`
        is charged for it.

        :raises Problem: 502, no answer arrived; or the result of `explain`.
        """
        problem = None
        try:
            if call.is_websocket:
                problem = await self._websocket(call, client, share, server, explain, explained)
            else:
                problem = await self._http(call, client, share, method or call.method, server, explain, explained)
        except* (AgentUnreachable, AgentProtocolError) as group:
            if call.started:
                raise trio.BrokenResourceError(f"{server.name}: its answer broke off") from group
            raise server.unreachable(first_text(group)) from None
        except* ValueError as group:
            if call.started:
                raise
            raise Problem(400, "malformed-request", f"the request can't be passed on: {first_text(group)}") from None
        if problem is not None:
            raise problem

    # HTTP

    async def _http(
        self,
        call: Call,
        client: AgentClient,
        share: int,
        method: str,
        server: Server,
        explain: Explain | None,
        explained: Collection[int],
    ) -> Problem | None:
        problem = None
        headers = server.request_headers(call.scope["headers"])
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in call.scope["headers"])
        # Unbuffered: the client's next piece is read when the guest has taken this one.
        put, take = trio.open_memory_channel[bytes](0)
        async with trio.open_nursery() as nursery:
            body = _Body(take, self._share, share) if has_body else None
            nursery.start_soon(self._take_in, call, put if has_body else None, nursery.cancel_scope)
            async with client.stream(method, server.target, headers, body, timeout_s=HEAD_S) as response:
                begin = b""
                if explain is not None and response.status in explained:
                    begin = await _read_refusal(response)
                    problem = explain(response.status, begin)
                if problem is None:
                    await call.start(response.status, server.answer_headers(response.headers))
                    while data := begin or await response.receive():
                        begin = b""
                        await self._share.take(share, len(data))
                        await call.write(data)
            if problem is None:
                await call.finish()
            nursery.cancel_scope.cancel()
        return problem

    async def _take_in(self, call: Call, put: trio.MemorySendChannel[bytes] | None, scope: trio.CancelScope) -> None:
        """Passes on the client's body, with an empty piece at its end; cancels `scope` when the client disconnects."""
        if put is not None:
            async with put:
                more = True
                while more:
                    message = await call.receive()
                    if message["type"] == "http.disconnect":
                        scope.cancel()
                        return
                    more = message["more_body"]
                    if message["body"]:
                        await put.send(message["body"])
                await put.send(b"")
        while (await call.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    # WebSockets

    async def _websocket(
        self,
        call: Call,
        client: AgentClient,
        share: int,
        server: Server,
        explain: Explain | None,
        explained: Collection[int],
    ) -> Problem | None:
        problem = None
        headers = server.request_headers(call.scope["headers"])
        headers += [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
        headers += [(b"sec-websocket-extensions", value) for value in call.scope["state"]["websocket_extensions"]]
        async with trio.open_nursery() as nursery:
            splice = _Splice(call, self._share, share, server.closing)
            nursery.start_soon(splice.to_guest, nursery.cancel_scope)
            async with client.stream("GET", server.target, headers, timeout_s=HEAD_S) as response:
                if response.switched and response.status == 101:
                    upgrade = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
                    call.started = True
                    splice.upstream = response.upgraded()
                    await call.send(
                        {
                            "type": "volant.websocket.switch",
                            "headers": server.upgrade_headers(response.headers) + upgrade,
                        }
                    )
                    await splice.from_guest()
                else:
                    body = await _read_refusal(response)
                    # Clients that follow a redirect send their key along (Puppeteer, Playwright).
                    dropped = (b"content-length", b"location")
                    refusal = [field for field in server.upgrade_headers(response.headers) if field[0] not in dropped]
                    refusal.append((b"content-length", b"%d" % len(body)))
                    if explain is not None and response.status in explained:
                        problem = explain(response.status, body)
                    if problem is None:
                        await call.reject(502 if response.status // 100 in (1, 3) else response.status, refusal, body)
            nursery.cancel_scope.cancel()
        return problem


class _Body:
    """The pieces of a request's body. It is no async generator, as the reader may stop in the middle."""

    def __init__(self, take: trio.MemoryReceiveChannel[bytes], share: FairShare, vm_id: int) -> None:
        self._take = take
        self._share = share
        self._vm_id = vm_id

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        try:
            data = await self._take.receive()
        except trio.EndOfChannel:
            # The client left in the middle. The guest must not take the part that arrived for the whole body.
            raise trio.BrokenResourceError("the client left") from None
        if not data:
            raise StopAsyncIteration
        await self._share.take(self._vm_id, len(data))
        return data


class _Splice:
    """The bytes of one WebSocket, in both directions."""

    def __init__(self, call: Call, share: FairShare, vm_id: int, closing: Callable[[], tuple[int, str] | None]) -> None:
        self.upstream: ChannelStream | None = None
        self._closing = closing
        self._call = call
        self._share = share
        self._vm_id = vm_id
        self._frames = FrameBounds()

    async def to_guest(self, scope: trio.CancelScope) -> None:
        """Passes on bytes until the client disconnects or the guest stops reading; then cancels `scope`."""
        while True:
            message = await self._call.receive()
            if message["type"] == "volant.websocket.bytes" and self.upstream is not None:
                data = message["bytes"]
                await self._share.take(self._vm_id, len(data))
                try:
                    with trio.fail_after(_SEND_S):
                        await self.upstream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    # First read the data that the guest has already sent, and its end.
                    await trio.sleep(_REST_S)
                    break
                except trio.TooSlowError:
                    break
            elif message["type"] == "websocket.disconnect":
                break
        scope.cancel()

    async def from_guest(self) -> None:
        """Passes on bytes until the guest closes, or the daemon stops; then it closes between two frames."""
        assert self.upstream is not None
        receive = partial(self.upstream.receive_some, _PIECE)
        async with interruptible(self._call.stopping) as waits:
            while True:
                try:
                    data = await waits.until(receive) if self._frames.between else await receive()
                except trio.BrokenResourceError:
                    data = b""
                if data is None:
                    await self._close(self._call.stopping.closing)
                    return
                if not data:
                    await self._close(self._closing())
                    return
                await self._follow(data)
                await self._call.send({"type": "volant.websocket.bytes", "bytes": data})

    async def _close(self, why: tuple[int, str] | None) -> None:
        if why is not None and self._frames.between:
            await self._call.send({"type": "volant.websocket.bytes", "bytes": closing_frame(*why)})

    async def _follow(self, data: bytes) -> None:
        """Charges for the next bytes of the guest, and for the frames in them."""
        place = 0
        while place < len(data):
            end, frames = self._frames.feed(data, place)
            await self._share.take(self._vm_id, max(end - place, frames * _FRAME_COST))
            place = end


class FrameBounds:
    """Tracks the boundaries of WebSocket frames (RFC 6455, 5.2) in a stream of bytes."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._payload = 0

    @property
    def between(self) -> bool:
        """Whether the bytes so far end with the end of a frame."""
        return not self._header and not self._payload

    def feed(self, data: bytes, place: int = 0) -> tuple[int, int]:
        """Tracks the bytes from `place` on. Returns the new place, and the number of frames that began before it: at
        most `_FRAMES`."""
        frames = 0
        while place < len(data) and frames < _FRAMES:
            if self._payload:
                step = min(self._payload, len(data) - place)
                self._payload -= step
                place += step
                continue
            need = self._header_size()
            step = min(need - len(self._header), len(data) - place)
            self._header += data[place : place + step]
            place += step
            if len(self._header) >= 2 and len(self._header) == self._header_size():
                self._payload = self._payload_size()
                self._header.clear()
                frames += 1
        return place, frames

    def _header_size(self) -> int:
        if len(self._header) < 2:
            return 2
        length = self._header[1] & 0x7F
        extended = 2 if length == 126 else 8 if length == 127 else 0
        return 2 + extended + (4 if self._header[1] & 0x80 else 0)

    def _payload_size(self) -> int:
        length = self._header[1] & 0x7F
        if length == 126:
            return int.from_bytes(self._header[2:4], "big")
        if length == 127:
            return int.from_bytes(self._header[2:10], "big")
        return length


def closing_frame(code: int, reason: str) -> bytes:
    """Returns a server's WebSocket frame that closes with a code and a reason, which is cut to the size of a frame."""
    payload = code.to_bytes(2, "big") + reason.encode("ascii", "replace")[:_MAX_REASON]
    return b"\x88" + bytes([len(payload)]) + payload


def parse_port(text: str) -> int:
    """Parses a port in a path. :raises Problem: 400."""
    if not _PORT.match(text) or int(text) > 65535:
        raise invalid("port", f"port {text[:40]!r} is not a number from 1 to 65535")
    return int(text)


@asynccontextmanager
async def open_port(client: AgentClient, vm: str, port: int) -> AsyncIterator[ChannelStream]:
    """Opens a connection to a port of the guest's loopback.

    :raises Problem: 502, nothing listens there, or the agent can't be reached.
    """
    try:
        async with client.stream("CONNECT", f"127.0.0.1:{port}", timeout_s=CONNECT_S) as response:
            if not response.switched:
                raise Problem(
                    502, "port-unreachable", f"nothing answers on port {port} in VM {vm!r}", vm=vm,
                    hint="it must listen on the guest's loopback",
                )  # fmt: skip
            yield response.upgraded()
    except (AgentUnreachable, AgentProtocolError) as error:
        raise unreachable(vm, str(error)) from None


@asynccontextmanager
async def to_port(client: AgentClient, vm: str, port: int) -> AsyncIterator[AgentClient]:
    """Connects to a port of the guest's loopback; the client can send one request.

    :raises Problem: see `open_port`.
    """
    async with open_port(client, vm, port) as stream, trio.open_nursery() as nursery:
        # AgentClient uses two methods of a channel, and _Tunnel has both.
        yield AgentClient(cast(Channel, _Tunnel(stream, nursery)))
        nursery.cancel_scope.cancel()


class _Tunnel:
    """A substitute for a channel, for one request: its only stream is a connection to a port of the guest's
    loopback."""

    def __init__(self, stream: ChannelStream, nursery: trio.Nursery) -> None:
        self._stream = stream
        self._nursery = nursery

    async def open_stream(self, *, timeout_s: float, reserved: bool = False) -> ChannelStream:
        return self._stream

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(task)


async def _read_refusal(response: AgentResponse) -> bytes:
    """Returns the body of a refusal, or its beginning. :raises AgentUnreachable: it does not arrive in time."""
    body = b""
    try:
        with trio.fail_after(_REFUSAL_S):
            while len(body) < _MAX_REFUSAL and (data := await response.receive()):
                body += data
    except trio.TooSlowError:
        raise AgentUnreachable(
            f"it refused with {response.status}, and did not send the rest of that within {_REFUSAL_S:g} s"
        ) from None
    return body


def first_text(group: BaseExceptionGroup[Exception]) -> str:
    """Returns the text of the first error of a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)
