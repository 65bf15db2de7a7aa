"""One HTTP/1.1 connection: Hypercorn's protocol with limits.

Hypercorn 0.18 has a good parser and a good ASGI implementation, but no limits. Each class here overrides one of its
classes for one of these reasons (all reproduced in `tests/api/test_serving.py`):

- A byte after a WebSocket upgrade raises out of the connection and ends the server (hypercorn#225). Here it is
  answered with 400, and *no* exception of a connection leaves it.
- A send is shielded without a deadline, so one client that stops reading blocks the shutdown forever. Here sends are
  not shielded, and each has a deadline. A cancelled send closes the connection, as its framing is broken.
- With quart-trio no connection is ever closed or recycled: on the last chunk of a body Hypercorn sends
  `http.disconnect`, on which quart-trio cancels the task that is about to recycle. Here everything after the last chunk
  is shielded, with a deadline.
- A handler that only sends to a WebSocket whose client has disconnected never reaches a checkpoint and hangs the whole
  process. Here every send is a checkpoint.
- The answer to a request whose body was not read is lost, because the connection is closed with bytes unread, which
  resets it. Here the rest is read and dropped within limits, and closing lingers.
- An idle connection costs a sleeping task. Here it costs a deadline of the reader, which also covers slow headers.
- A client that half-closes after its request loses the answer. Here a client has disconnected only when its connection
  is reset or closed in both directions.
- TLS would be another kind of stream, which can neither half-close nor report that its client has disconnected. Here it
  is a filter between the socket and the protocol (`_tls.py`), so all of the above is the same with and without it.

HTTP/2 is not supported, neither by upgrade nor by prior knowledge. Hypercorn's implementation ends the server on a
CONNECT without `:path`, blocks all streams of a connection on the slowest handler, and has no limit on resets. On
loopback and behind a proxy HTTP/2 has no benefit that would pay for rewriting that.

This module uses private parts of Hypercorn, so `pyproject.toml` pins an exact version. A release of Hypercorn that
limits its sends and contains errors of connections would replace this module.
"""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

import h11
import msgspec
import trio
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, Data, EndBody, Event as StreamEvent, Request, Response, StreamClosed
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from volant.concurrency import Backoff
from volant.model import Problem
from volant.model.heads import MAX_FIELDS, head_of

from ._addresses import is_abandoned
from ._inbox import Inbox, Message
from ._problems import new_request_id, problem_body, problem_headers
from ._tls import PLAIN_HTTP, Session, looks_like_http

if TYPE_CHECKING:
    from ._serving import Server

_log = logging.getLogger("volant.api.serving")

SLICE = 64 * 1024
"""Maximum bytes of one read, after which other tasks run; also the bytes that a client must read within
`Limits.send_s`."""
_AT_ONCE = 256 * 1024
"""Maximum bytes of one write, after which other tasks run."""

_RESET = struct.pack("ii", 1, 0)
_LEFT = select.POLLHUP | select.POLLERR
"""The poll(2) events of a connection that is reset, or closed in both directions."""
_LEFT_POLL_S = 1.0
"""The interval for checking a client that has closed its direction. Polling is needed, as the end of its input stays
readable."""
_HALF_CLOSED_KEEPALIVE_S = 15
"""The time after which the kernel probes a client that has closed its direction, in case it has exited."""

Send = Callable[[Message | None], Awaitable[None]]
Field = tuple[bytes, bytes]


class Standing(msgspec.Struct):
    """The access of the client of one connection. It is `standing` in the state of its requests."""

    let_in: bool | None = None
    """Whether one of its requests was admitted; None if none has arrived."""


class Connection(TCPServer):
    """Serves one accepted stream until either side ends it. It never raises."""

    def __init__(self, server: Server, stream: trio.SocketStream) -> None:
        # Hypercorn annotates an SSL stream and takes any; a plain one is what its own HTTP listeners hand in.
        super().__init__(server.app, server.config, server.context, server.state, stream)  # type: ignore[arg-type]
        self.limits = server.limits
        self.inbox: Inbox | None = None
        self._socket = stream.socket
        self.is_unix = stream.socket.family == socket.AF_UNIX
        self.address = "" if self.is_unix else _address_of(stream.socket)
        """The client's address, on TCP."""
        self.peer = f"uid {_peer_uid(stream.socket)}" if self.is_unix else ""
        """On a Unix socket, the user whose process connected."""
        self._server = server
        self.heads = server.heads
        self.tls = None if server.tls is None or self.is_unix else server.tls.session()
        self._reading = trio.CancelScope()
        self.standing = Standing()
        self.busy_since = inf
        """The arrival time of the request that is being served."""
        self._idle = True
        self._dropping = False
        """Whether a request was answered, and the rest of its body is dropped."""
        self._header_begun = False
        self._closing = False
        self._torn = False
        self._input_ended = False
        """Whether the client has closed its direction with a request unanswered."""
        self.hold_next = False
        """Whether the head of the answer is held until the first piece of the body, to write both at once. ASGI
        requires that of a server."""
        self._held = b""
        self.writes = 0
        """The number of writes; each was a checkpoint."""

    async def run(self) -> None:
        try:
            family = self._socket.family
            client = parse_socket_addr(family, self._socket.getpeername())
            server = parse_socket_addr(family, self._socket.getsockname())
        except OSError:
            return  # It left before it was served.
        try:
            async with trio.open_nursery() as nursery:
                self.http = Http11(self, nursery, client, server)
                self._rest(self.limits.keep_alive_s)
                await self._read()
                # The app was notified. A handler that ignores the disconnect has some time to finish.
                nursery.cancel_scope.deadline = trio.current_time() + self.limits.finish_s
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            _log.exception("a connection failed; no other one is affected")
        finally:
            if self.tls is not None and self._server.tls is not None:
                self._server.tls.forget(self.tls)
            self.abort()
            self._release()

    def _release(self) -> None:
        """Breaks the reference cycle with the protocol, so that both are freed now.

        A flood of connections would leave the garbage collector hundreds of thousands of objects, and it would stop the
        event loop for half a second at a time.
        """
        self.inbox = None
        if (http := vars(self).pop("http", None)) is not None:
            vars(http).clear()

    @property
    def idle(self) -> bool:
        """Whether no request is waiting for an answer, or the rest of one."""
        return self._idle or self._dropping or self._closing

    @property
    def rests_until(self) -> float:
        """When the connection is closed if no request arrives. It is sooner if the connection was idle longer or sends
        headers slowly. While it sends the rest of a body: when its request began."""
        return self.busy_since if self._dropping else self._reading.deadline

    def drop_rest(self) -> None:
        """Records that the rest of the request is dropped when it is read."""
        self._dropping = True

    def abort(self) -> None:
        """Closes the socket now, even during a read or a write."""
        self._torn = True
        self._reading.cancel()
        if self.inbox is not None:
            self.inbox.settled.set()
        self._socket.close()

    def tear(self) -> None:
        """Closes the socket with a reset: a client in the middle of an answer sees an error, and the kernel keeps
        nothing."""
        if self._socket.fileno() >= 0 and not self._closing:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.abort()

    def end_when_idle(self) -> None:
        """Closes as soon as no request is being served; now, if none is."""
        if self._idle:
            self._reading.cancel()

    def peer_left(self) -> bool:
        """Returns whether the client has disconnected, without a read: its connection is reset, or closed in both
        directions.

        For a WebSocket its own direction is enough, as it can't take part in the closing handshake any more.
        """
        if self._socket.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self._socket.fileno(), _LEFT | (select.POLLRDHUP if self.http.is_websocket else 0))
        return bool(poller.poll(0))

    def rest_again(self) -> None:
        """Resets the idle deadline if the bytes that arrived did not begin a request."""
        if self._idle and not self._closing:
            self._header_begun = False
            self._rest(self.limits.keep_alive_s)

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            if self.hold_next:
                self._held = event.data
                return
            data, self._held = self._held + event.data, b""
            if data:
                await self._write(data)
        elif isinstance(event, Closed):
            if self._held:
                await self.protocol_send(RawData(b""))
            await self._end()
            await self.http.handle(Closed())
        elif isinstance(event, Updated):
            self._idle = event.idle
            self._dropping = self._header_begun = False
            if not event.idle:
                self.busy_since = trio.current_time()
                self._reading.deadline = inf
            elif self.context.terminated.is_set() or self._input_ended:
                self._reading.cancel()
            else:
                self._rest(self.limits.keep_alive_s)

    def _rest(self, seconds: float) -> None:
        self._reading.deadline = trio.current_time() + seconds

    async def _write(self, data: bytes) -> None:
        try:
            # `acquire` alone gives way to all other tasks, and the write does so itself.
            if self.send_lock.locked():
                await self.send_lock.acquire()
            else:
                self.send_lock.acquire_nowait()
            try:
                if self._torn:
                    return
                self.writes += 1
                if self.tls is not None:
                    data = self.tls.encrypt(data)
                view = memoryview(data)[await self._write_now(data) :]
                if view:
                    with self._server.unread(self, len(view)):
                        for start in range(0, len(view), SLICE):
                            with trio.fail_after(self.limits.send_s):
                                await self.stream.send_all(view[start : start + SLICE])
            finally:
                self.send_lock.release()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, ssl.SSLError) as error:
            _free_frames(error)
            self.tear()
            await self.http.handle(Closed())
        except trio.Cancelled:
            # Part of a frame may be out, or the protocol believes that it is: nothing can follow.
            self.tear()
            raise

    async def _write_now(self, data: bytes) -> int:
        """Writes as much as fits into the socket's buffer, and returns the number of bytes. It is a checkpoint. Most
        writes are complete after this and need no deadline, which saves time: an event for five hundred readers is five
        hundred writes."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            sent = os.write(self._socket.fileno(), data if len(data) <= _AT_ONCE else memoryview(data)[:_AT_ONCE])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError from error
        await trio.lowlevel.cancel_shielded_checkpoint()
        return sent

    async def _end(self) -> None:
        """Closes the server's direction; the reader drops further input for a short time."""
        if self._closing or self._torn:
            return
        self._closing = True
        self._rest(self.limits.linger_s)
        try:
            async with self.send_lock:
                if self.tls is not None:
                    with trio.move_on_after(self.limits.linger_s):
                        await self.stream.send_all(self.tls.close())
                await self.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            _free_frames(error)
            self._reading.cancel()
        if self._input_ended:
            self._reading.cancel()

    async def _read(self) -> None:
        lingered = 0
        with self._reading:
            if self.tls is not None:
                await self._secure(self.tls)
            while True:
                try:
                    data = await self._receive()
                except (trio.ClosedResourceError, trio.BrokenResourceError, ssl.SSLError) as error:
                    _free_frames(error)
                    break
                if not data:
                    await self._serve_half_closed()
                    break
                if self._closing:
                    lingered += len(data)
                    if lingered > self.limits.linger_bytes:
                        break
                    continue
                if self._idle and not self._header_begun:
                    self._header_begun = True
                    self._reading.deadline = min(self._reading.deadline, trio.current_time() + self.limits.header_s)
                try:
                    await self.http.handle(RawData(bytes(data)))
                except trio.BrokenResourceError:
                    break
        too_slow = self._reading.cancelled_caught and self._idle and self._header_begun and not self._torn
        if too_slow and not self._closing:
            with trio.move_on_after(self.limits.linger_s):
                await self.http.refuse(Problem(408, "header-timeout", "the request's headers took too long"))
        if self.tls is not None and self._idle:
            # Without a notice the client can't tell this end from one that somebody on the way has made up.
            await self._end()
        await self.http.handle(Closed())

    async def _receive(self) -> bytes:
        """Returns the client's input, without TLS; empty at the end."""
        while True:
            if self.tls is None or self._closing:
                return bytes(await self.stream.receive_some(SLICE))
            data = self.tls.read()
            if self.tls.has_output:
                await self._write(b"")
            if data or self.tls.ended:
                return data
            encrypted = await self.stream.receive_some(SLICE)
            if not encrypted:
                return b""
            self.tls.feed(bytes(encrypted))

    async def _secure(self, tls: Session) -> None:
        """Runs the handshake, or ends the server's direction. A client in the middle of its handshake counts as idle,
        so it is the first to make room for others."""
        self._rest(self.limits.handshake_s)
        try:
            with self._server.shaking_hands(self):
                await self._shake_hands(tls)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.abort()
        except ssl.SSLError as error:
            self._server.handshake_failed(self.http.client, error)
            # An alert says why.
            await self._end()
        else:
            if not self._closing:
                self._rest(self.limits.keep_alive_s)

    async def _shake_hands(self, tls: Session) -> None:
        heard = False
        while True:
            # A step takes about a millisecond. With one step in each turn of the event loop, other connections go on.
            async with self._server.handshake_lock:
                done = tls.handshake()
            if tls.has_output:
                await self._write(b"")
            if done:
                break
            data = bytes(await self.stream.receive_some(SLICE))
            if not data:
                self.abort()
                return
            if not heard and looks_like_http(data):
                self.tls = None
                await self._write(PLAIN_HTTP)
                await self._end()
                return
            heard = True
            tls.feed(data)
        self.http.connection_state["certificate"] = tls.certificate
        if self._server.tls is not None:
            self._server.tls.keep(tls, self.tear)

    async def _serve_half_closed(self) -> None:
        """Waits while the current request is served, after the client has closed its direction, until the client
        disconnects.

        The end of the answer cancels the reading, including this wait. A TCP client that has closed both directions
        looks the same until it answers a packet with a reset: a write, or a probe of the kernel. On loopback,
        `is_abandoned` detects it.
        """
        if self._idle or self._closing or self.http.is_websocket:
            return
        self._input_ended = True
        if not self.is_unix:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _HALF_CLOSED_KEEPALIVE_S)
        try:
            # A body that is cut off is an error to the parser.
            await self.http.handle(RawData(b""))
        except trio.BrokenResourceError:
            return
        backoff = Backoff(0.02, _LEFT_POLL_S)
        while not self.peer_left() and (self.is_unix or not is_abandoned(self._socket)):
            await backoff.pause()


def _free_frames(error: BaseException) -> None:
    """Breaks the reference cycle of the cause of an error in Trio's streams: it refers to a frame that has it as a
    variable, and thereby to the whole connection."""
    if error.__cause__ is not None:
        error.__cause__.__traceback__ = None


def _peer_uid(sock: trio.socket.SocketType) -> int:
    _, uid, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def _address_of(sock: trio.socket.SocketType) -> str:
    """Returns the client's address; for IPv6 the network of 64 bits, as one machine may have all addresses in it."""
    try:
        address = str(sock.getpeername()[0])
        if sock.family == socket.AF_INET6 and not address.startswith("::ffff:"):
            return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])[:8].hex()
    except OSError:
        return ""  # It left already.
    return address.removeprefix("::ffff:")


class Http11(H11Protocol):
    """HTTP/1.1 on one connection. It is the task group of the apps that it starts."""

    def __init__(
        self,
        connection: Connection,
        nursery: trio.Nursery,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
    ) -> None:
        self.owner = connection
        tasks = Tasks(connection, nursery)
        super().__init__(
            connection.app,
            connection.config,
            connection.context,
            tasks,  # type: ignore[arg-type]  # used by Hypercorn for spawn_app() and spawn() alone
            # A Unix socket's permissions are its access control, so the checks must know for sure that it is one.
            ConnectionState(
                {
                    **connection.state,
                    "unix": connection.is_unix,
                    "peer": connection.peer,
                    "standing": connection.standing,
                }
            ),
            connection.tls is not None,
            client,
            server,
            connection.protocol_send,
        )
        self.tasks = tasks
        self.waits_to_be_asked = False
        """Whether the client waits for `100 Continue` (h11 forgets that when the answer begins)."""
        self._empty_line_dropped = False
        self._closes_after = False
        """Whether the current request is the last one of the connection, because its framing can't be trusted."""
        self._keeps_alive = False
        """Whether an HTTP/1.0 client has requested to keep the connection."""

    @property
    def is_websocket(self) -> bool:
        """Whether the connection is or will become a WebSocket."""
        return isinstance(self.connection, H11WSConnection)

    async def stream_send(self, event: StreamEvent) -> None:
        if isinstance(event, Response) and event.status_code >= 200:
            # Hypercorn can't continue a connection after a refused upgrade.
            last = self.context.terminated.is_set() or self.is_websocket or self._closes_after
            names = {name.lower() for name, _ in event.headers}
            if last and b"connection" not in names:
                event.headers.append((b"connection", b"close"))
            elif self._keeps_alive and b"connection" not in names and b"content-length" in names:
                event.headers.append((b"connection", b"keep-alive"))
        await super().stream_send(event)

    async def ask_for_body(self) -> None:
        """Answers `Expect: 100-continue` once the app wants the body."""
        self.waits_to_be_asked = False
        if self.connection.they_are_waiting_for_100_continue:
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))

    async def refuse(self, problem: Problem) -> None:
        """Answers with `problem` without the app, as far as the protocol still allows, and closes."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            request_id = new_request_id()
            body = problem_body(problem, request_id)
            headers = [*problem_headers(body, request_id), (b"connection", b"close")]
            await self._send_h11_event(h11.Response(status_code=problem.status, headers=headers))
            await self._send_h11_event(h11.Data(data=body))
            await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())

    def _drop_empty_line(self) -> bool:
        """Drops one empty line before a request (RFC 9112, 2.2). Returns False if more bytes are needed to decide."""
        connection = self.connection
        if not isinstance(connection, h11.Connection) or connection.their_state is not h11.IDLE:
            return True
        begin = bytes(connection._receive_buffer)[:2]
        if self._empty_line_dropped or begin[:1] not in (b"\r", b"\n"):
            return True
        if begin == b"\r":
            return False
        size = 1 if begin.startswith(b"\n") else 2 if begin == b"\r\n" else 0
        if size:
            self._empty_line_dropped = True
            connection._receive_buffer.maybe_extract_at_most(size)
            if not connection._receive_buffer:
                self.owner.rest_again()
        return True

    async def _handle_events(self) -> None:
        if not self._drop_empty_line():
            return
        while True:
            if not await self._take_head():
                await self.refuse(_headers_too_large())
                return
            try:
                event = self.connection.next_event()
            except h11.RemoteProtocolError as error:
                await self.refuse(_malformed(error))
                return
            if isinstance(event, h11.Request):
                await self.send(Updated(idle=False))
                # Each pass over h11's own collection costs a call for each field.
                fields = list(event.headers)
                problem = _unacceptable(event, fields, self.owner.limits.header_bytes)
                if problem is not None:
                    await self.refuse(problem)
                    return
                self.waits_to_be_asked = bool(self.connection.they_are_waiting_for_100_continue)
                self._set_persistence(event, fields)
                await self._open_stream(event, fields)
            elif event is h11.PAUSED:
                await self._wait_for_turn()
                if not self._drop_empty_line():
                    return
            elif isinstance(event, h11.ConnectionClosed) or event is h11.NEED_DATA or self.stream is None:
                return
            elif isinstance(event, h11.Data):
                self.waits_to_be_asked = False
                await self.stream.handle(Body(stream_id=STREAM_ID, data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            elif isinstance(event, Data):
                await self.stream.handle(event)

    async def _take_head(self) -> bool:
        """Waits for the connection's turn to have the head of a request parsed, if one has arrived. Returns False if
        the head has too many fields: they are counted before h11 parses them, as each takes it some microseconds."""
        connection = self.connection
        if not isinstance(connection, h11.Connection) or connection.their_state is not h11.IDLE:
            return True
        fields, size = head_of(connection._receive_buffer._data)
        if fields > MAX_FIELDS:
            return False
        if size is not None:
            await self.owner.heads.take(id(self.owner), size)
        return True

    def _set_persistence(self, request: h11.Request, fields: Sequence[Field]) -> None:
        """Decides whether the connection may be kept after `request`."""
        self._empty_line_dropped = False
        names = {name for name, _ in fields}
        old = request.http_version == b"1.0"
        # RFC 9112, 6.1: such a request may be an attempt to smuggle another one past a proxy that reads it otherwise.
        self._closes_after = b"transfer-encoding" in names and (old or b"content-length" in names)
        self._keeps_alive = old and not self._closes_after and b"keep-alive" in _connection_tokens(fields)
        if self._keeps_alive:
            # h11 ends every connection of HTTP/1.0, and has no public way to change that.
            assert isinstance(self.connection, h11.Connection)
            self.connection._cstate.keep_alive = True

    async def _wait_for_turn(self) -> None:
        """Waits until the request before a pipelined one is answered."""
        await self.can_read.clear()
        while not self.can_read.is_set():
            with trio.move_on_after(self.owner.limits.header_s):
                await self.can_read.wait()
                return
            if self.owner.peer_left():
                raise trio.BrokenResourceError("the client left")

    async def _open_stream(self, request: h11.Request, fields: list[Field]) -> None:
        wanted = [value.lower() for name, value in fields if name == b"upgrade"]
        upgrade = wanted == [b"websocket"] and request.method == b"GET" and b"upgrade" in _connection_tokens(fields)
        target, headers = _origin_form(request.target, fields)
        if self._closes_after:
            # The encoding counts, and no later reader may see the length (RFC 9112, 6.3).
            headers = [field for field in headers if field[0] != b"content-length"]
        kind = WebSocketStream if upgrade else RequestStream
        stream = kind(
            self.app,
            self.config,
            self.context,
            self.tasks,  # type: ignore[arg-type]  # as above
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        stream.tasks = self.tasks
        self.stream = stream
        if upgrade:
            assert isinstance(self.connection, h11.Connection)
            self.connection = H11WSConnection(self.connection)
        self.keep_alive_requests += 1
        await stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii").upper(),
                raw_path=target,
                state=self.connection_state,
            )
        )


class Tasks:
    """Runs the app for each request of one connection."""

    def __init__(self, connection: Connection, nursery: trio.Nursery) -> None:
        self.connection = connection
        self._nursery = nursery

    def spawn(self, func: Callable[..., Awaitable[object]], *args: object) -> None:
        self._nursery.start_soon(func, *args)

    async def spawn_app(self, app: Any, config: object, scope: Any, send: Send) -> Callable[[Message], Awaitable[None]]:
        limits = self.connection.limits
        inbox = Inbox(
            limit=limits.inbox_bytes,
            drop_limit=limits.drop_bytes,
            on_first_receive=self.connection.http.ask_for_body,
            left=self.connection.peer_left,
            poll_s=limits.header_s,
        )
        self.connection.inbox = inbox
        self._nursery.start_soon(self._run, app, scope, inbox, send)
        return inbox.put

    async def drop_rest(self) -> None:
        """Reads and drops the rest of the request's body, within limits."""
        inbox = self.connection.inbox
        if inbox is None or inbox.settled.is_set() or self.connection.http.waits_to_be_asked:
            return
        inbox.drop()
        self.connection.drop_rest()
        limits = self.connection.limits
        with trio.move_on_after(limits.linger_s if self.connection.standing.let_in is False else limits.drop_s):
            await inbox.settled.wait()

    async def _run(self, app: Any, scope: Any, inbox: Inbox, send: Send) -> None:
        finish_s = self.connection.limits.finish_s
        finished = False

        async def app_send(message: Message) -> None:
            nonlocal finished
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # After this the app gets a disconnect, and quart-trio cancels us (see above).
                with trio.move_on_after(finish_s) as scope:
                    scope.shield = True
                    await send(message)
                    finished = True
            elif message["type"] == "http.response.start":
                self.connection.hold_next = not message.get("volant.at_once", False)
                await send(message)
                self.connection.hold_next = False
            else:
                before = self.connection.writes
                await send(message)
                if self.connection.writes == before:
                    # The client has left, and a handler that only sends would block all other tasks (see above).
                    await trio.lowlevel.checkpoint()

        try:
            await app(scope, inbox.receive, app_send, trio.to_thread.run_sync, trio.from_thread.run)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            _log.exception("the app failed outside of its own error handling")
        finally:
            if not finished:
                with trio.move_on_after(finish_s) as closing:
                    closing.shield = True
                    await send(None)


class RequestStream(HTTPStream):
    """One request and its answer.

    A piece of the body may be in `volant.chunk`, with its chunk framing. Data for many clients is framed once this way,
    without Hypercorn and h11.
    """

    tasks: Tasks

    async def app_send(self, message: Any) -> None:
        chunk = None if message is None else message.get("volant.chunk")
        # HTTP/1.0 has no chunks.
        if chunk is not None and self.state is ASGIHTTPState.RESPONSE and self.scope["http_version"] != "1.0":
            await self.tasks.connection.protocol_send(RawData(chunk))
        else:
            await super().app_send(message)

    async def _send_closed(self) -> None:
        await self.send(EndBody(stream_id=self.stream_id))
        self.state = ASGIHTTPState.CLOSED
        await self.tasks.drop_rest()
        await self.send(StreamClosed(stream_id=self.stream_id))

    async def _send_error_response(self, status_code: int) -> None:
        await _send_problem(self, status_code)
        self.state = ASGIHTTPState.CLOSED


class WebSocketStream(WSStream):
    """One WebSocket, without compression, and with two messages that ASGI lacks.

    Deflating on the event loop would delay all clients for one client's traffic, and inflating has no limit on its
    output (wsproto 1.3).

    An app may answer with `volant.websocket.switch` instead of `websocket.accept`: from then on it receives and sends
    raw bytes (`volant.websocket.bytes`), and does the handshake itself. Relays use this, so that the bytes between a
    client and a guest are unchanged and need no unmasking here. `volant.websocket.texts` sends many text messages with
    one write.
    """

    tasks: Tasks
    _answering = False
    _raw = False

    async def handle(self, event: StreamEvent) -> None:
        if isinstance(event, Request):
            headers = [field for field in event.headers if field[0] != b"sec-websocket-extensions"]
            offered = [value for name, value in event.headers if name == b"sec-websocket-extensions"]
            event = Request(
                stream_id=event.stream_id,
                headers=headers,
                http_version=event.http_version,
                method=event.method,
                raw_path=event.raw_path,
                state=ConnectionState({**event.state, "websocket_extensions": offered}),
            )
        elif isinstance(event, (Body, Data)) and not self.closed:
            if self._raw:
                assert self.app_put is not None
                await self.app_put({"type": "volant.websocket.bytes", "bytes": event.data})
                return
            if not self.handshake.accepted:
                # hypercorn#225. RFC 6455, 4.1: the client waits for our answer before it sends anything.
                if not self._answering:
                    await self._send_error_response(400)
                return
        await super().handle(event)

    async def app_send(self, message: Any) -> None:
        kind = None if message is None else message["type"]
        if kind in ("websocket.http.response.start", "websocket.close"):
            self._answering = True
        if self.closed:
            return
        if kind == "volant.websocket.switch" and self.state is ASGIWebsocketState.HANDSHAKE:
            self._raw = self._answering = True
            self.state = ASGIWebsocketState.CONNECTED
            await self.send(Response(stream_id=self.stream_id, status_code=101, headers=list(message["headers"])))
        elif kind == "volant.websocket.bytes" and self._raw:
            await self.send(Data(stream_id=self.stream_id, data=message["bytes"]))
        elif kind == "volant.websocket.texts" and self.state is ASGIWebsocketState.CONNECTED:
            await self.send(Data(stream_id=self.stream_id, data=b"".join(map(text_frame, message["texts"]))))
        elif kind is None and self._raw:
            await self.send(StreamClosed(stream_id=self.stream_id))
        else:
            await super().app_send(message)

    async def _send_error_response(self, status_code: int) -> None:
        # Closed first: the app may be about to accept, and all that it sends from here on is dropped.
        self.closed = True
        await _send_problem(self, status_code)
        if self.app_put is not None:
            await self.app_put({"type": "websocket.disconnect", "code": 1006})
        await self.send(StreamClosed(stream_id=self.stream_id))


def text_frame(text: bytes) -> bytes:
    """Returns a server's WebSocket frame with one whole text message (RFC 6455, 5.2)."""
    size = len(text)
    if size < 126:
        return b"\x81%c" % size + text
    if size < 65536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + text
    return b"\x81\x7f" + size.to_bytes(8, "big") + text


_STATUS_DETAIL = {
    400: ("malformed-upgrade", "the WebSocket upgrade is malformed, or bytes followed it before it was answered"),
    403: ("forbidden", "the WebSocket was refused"),
    500: ("internal-error", "the request failed inside the daemon"),
}


async def _send_problem(stream: HTTPStream | WSStream, status: int) -> None:
    code, detail = _STATUS_DETAIL.get(status, ("refused", "the request was refused"))
    request_id = new_request_id()
    body = problem_body(Problem(status, code, detail), request_id)
    headers = [*problem_headers(body, request_id), (b"connection", b"close")]
    await stream.send(Response(stream_id=stream.stream_id, headers=headers, status_code=status))
    await stream.send(Body(stream_id=stream.stream_id, data=body))
    await stream.send(EndBody(stream_id=stream.stream_id))


def _malformed(error: h11.RemoteProtocolError) -> Problem:
    if error.error_status_hint == 431:
        return _headers_too_large()
    # h11 quotes the line after the colon, which may contain a key.
    return Problem(400, "malformed-request", f"this is not HTTP/1.1: {str(error).partition(':')[0]}")


def _headers_too_large() -> Problem:
    return Problem(431, "headers-too-large", "the request's line and headers are too large")


def _unacceptable(request: h11.Request, fields: Sequence[Field], header_bytes: int) -> Problem | None:
    if request.http_version not in (b"1.1", b"1.0"):
        version = request.http_version.decode("ascii")
        return Problem(505, "http-version", f"HTTP/{version} is not supported", hint="use HTTP/1.1")
    # h11 limits only incomplete heads; it accepts any that arrives in one piece.
    if len(request.target) + sum(len(name) + len(value) + 4 for name, value in fields) > header_bytes:
        return _headers_too_large()
    if request.method == b"CONNECT" or not (request.target.startswith(b"/") or _ABSOLUTE.match(request.target)):
        return Problem(400, "malformed-request", "the request's target must be a path", hint="this is no proxy")
    return None


def _connection_tokens(fields: Sequence[Field]) -> set[bytes]:
    lists = [value for name, value in fields if name == b"connection"]
    return {token.strip().lower() for token in b",".join(lists).split(b",")}


_ABSOLUTE = re.compile(rb"https?://([^/?#]+)(.*)\Z", re.IGNORECASE | re.DOTALL)


def _origin_form(target: bytes, fields: list[Field]) -> tuple[bytes, list[Field]]:
    """Returns the target as a path, and the headers. The host of an absolute target replaces `Host` (RFC 9112, 3.2.2),
    and is checked like it."""
    absolute = None if target.startswith(b"/") else _ABSOLUTE.match(target)
    if absolute is None:
        return target, fields
    headers = [(name, value) for name, value in fields if name != b"host"]
    path = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
    return path, [(b"host", absolute[1]), *headers]
