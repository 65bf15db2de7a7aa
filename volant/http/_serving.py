"""The server: accepts connections on bound listeners, and stops within about a second.

Hypercorn's own `serve()` stops in the wrong order: the app can shut down only after all streams have ended, which wait
for the app to notify them. So this module accepts connections and ends them:

1. `stopping` is set: every stream can see it in `scope["state"]["stopping"]` and ends in its own way (an event stream
   with its last block, a WebSocket with 1001); nothing more is accepted; idle connections are closed.
2. Connections that have not ended after `Limits.grace_s` are cut, sockets first, so that no shield can delay the stop.
3. Then the app's own shutdown runs.

`trio.serve_listeners` closes its listeners, but a supervisor may restart the server: each incarnation works on
duplicates of the sockets, and connections that arrive in between wait in the kernel's queue.
"""

from __future__ import annotations

import errno
import logging
import math
import resource
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import EventWrapper, WorkerContext

from volant.concurrency import Backoff, FairShare
from volant.model import Problem

from ._connection import Connection
from ._problems import new_request_id, problem_body, problem_headers
from ._settings import Limits
from ._tls import Tls

_log = logging.getLogger("volant.api.serving")

_NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_OF_UNIX_SOCKETS = 64
"""Maximum connections of Unix sockets, in addition to those of TCP."""
_FULL_S, _FULL_MAX_S = 0.05, 1.0
"""The delays between two attempts to accept a connection while there is no free descriptor."""
_FULL_SILENCE_S = 60.0
_FAILED_SILENCE_S = 1.0
"""The interval of log lines about failed handshakes, as any client can cause them."""

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


async def serve(
    app: AsgiApp,
    sockets: Sequence[socket.socket],
    *,
    stopping: trio.Event,
    limits: Limits | None = None,
    tls: Tls | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `app` on listening `sockets` until `stopping` is set, then ends everything and returns.

    With `tls`, TCP is served only with TLS; Unix sockets are always served without. The sockets stay open and belong to
    the caller. The task counts as started once connections are accepted. Cancelling cuts every connection at once.

    :raises hypercorn.utils.LifespanFailureError: the app could not start, or took too long.
    """
    limits = limits or Limits()
    config = _config(limits)
    wrapped = ASGIWrapper(app)
    server = Server(wrapped, config, limits, stopping, tls)
    lifespan = Lifespan(wrapped, config, server.state)
    async with trio.open_nursery() as nursery:
        await nursery.start(lifespan.handle_lifespan)
        await lifespan.wait_for_startup()
        await server.run(_duplicates(sockets), task_status)
        try:
            await lifespan.wait_for_shutdown()
        finally:
            nursery.cancel_scope.cancel()


class Server:
    """The connections of one incarnation."""

    def __init__(
        self, app: ASGIWrapper, config: Config, limits: Limits, stopping: trio.Event, tls: Tls | None = None
    ) -> None:
        self.app = app
        self.config = config
        self.limits = limits
        self.tls = tls
        self.heads = FairShare(limits.heads_per_pass)
        self.handshake_lock = trio.Lock()
        """Held during one step of one handshake."""
        self.context = WorkerContext(None)
        self.context.terminated = _Terminated(stopping)
        self.state: dict[str, Any] = {"stopping": stopping}
        self._stopping = stopping
        self._connections: set[Connection] = set()
        self._of_address: dict[str, set[Connection]] = {}
        """The connections of each TCP address."""
        self._unread: dict[Connection, int] = {}
        """The bytes of answers that wait for their clients, the longest wait first."""
        self._shaking: dict[Connection, None] = {}
        """The connections in the middle of their handshake, oldest first."""
        self._gone = trio.Event()
        self._refused = 0
        self._silent_until = -math.inf
        self._failed = 0
        self._failures_silent_until = -math.inf

    @contextmanager
    def shaking_hands(self, connection: Connection) -> Iterator[None]:
        """Counts a handshake while the block runs. If there are too many, the oldest is cut."""
        if len(self._shaking) >= self.limits.handshakes:
            oldest = next(iter(self._shaking))
            del self._shaking[oldest]
            oldest.tear()
        self._shaking[connection] = None
        try:
            yield
        finally:
            self._shaking.pop(connection, None)

    def handshake_failed(self, client: tuple[str, int] | None, error: ssl.SSLError) -> None:
        """Logs why a handshake failed, at most one line per `_FAILED_SILENCE_S`."""
        self._failed += 1
        now = trio.current_time()
        if now < self._failures_silent_until:
            return
        self._failures_silent_until = now + _FAILED_SILENCE_S
        others = f"; {self._failed - 1} more since the last such line" if self._failed > 1 else ""
        self._failed = 0
        reason = getattr(error, "verify_message", None) or (error.reason or str(error)).replace("_", " ").lower()
        _log.info("no TLS with %s: %s%s", client[0] if client else "a client", reason, others)

    async def run(self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None]) -> None:
        """Accepts connections until `stopping` is set, then ends all of them."""
        async with trio.open_nursery() as connections:
            try:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._accept, listener, connections)
                    task_status.started()
                    await self._stopping.wait()
                    accepting.cancel_scope.cancel()
                await self._drain()
            finally:
                for connection in self._connections:
                    connection.tear()
                connections.cancel_scope.cancel()

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Accepts connections until cancelled. If the process or the host has no file descriptor left, new connections
        wait in the kernel's queue, and the one that was idle longest is closed."""
        backoff = Backoff(_FULL_S, _FULL_MAX_S)
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in _NO_DESCRIPTOR:
                        raise
                    self._warn_of_no_descriptor(error)
                    self._make_room(self._connections)
                    await backoff.pause()
                    continue
                backoff.reset()
                connections.start_soon(self._handle, stream)

    def _warn_of_no_descriptor(self, error: OSError) -> None:
        """Logs a warning, at most one per `_FULL_SILENCE_S`, as a line for each attempt would fill the log."""
        now = trio.current_time()
        if now < self._silent_until:
            return
        self._silent_until = now + _FULL_SILENCE_S
        _log.warning(
            "clients wait to be accepted: %s (%d connections are open; the limit is %d descriptors, see ulimit -n and "
            "LimitNOFILE=)",
            error.strerror,
            len(self._connections),
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        )

    async def _handle(self, stream: trio.SocketStream) -> None:
        try:
            await self._serve(stream)
        finally:
            await trio.aclose_forcefully(stream)

    async def _drain(self) -> None:
        for connection in list(self._connections):
            connection.end_when_idle()
        with trio.move_on_after(self.limits.grace_s):
            while self._connections:
                self._gone = trio.Event()
                await self._gone.wait()
            return
        _log.info("%d connections did not end by themselves and are cut", len(self._connections))

    async def _serve(self, stream: trio.SocketStream) -> None:
        most = self.limits.connections
        if stream.socket.family == socket.AF_UNIX:
            # Whoever fills TCP must not keep the administrator of this host from ending that.
            most += _OF_UNIX_SOCKETS
        connection = Connection(self, stream)
        own = self._of_address.setdefault(connection.address, set())
        has_place = len(own) < self.limits.connections_of_one or self._make_room(own)
        if not has_place or (len(self._connections) >= most and not self._make_room(self._connections)):
            self._forget(connection)
            await self._refuse(stream)
            return
        _watch_peer(stream, self.limits.send_s)
        self._connections.add(connection)
        if connection.address:
            own.add(connection)
        try:
            await connection.run()
        finally:
            self._forget(connection)
            self._gone.set()

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if (own := self._of_address.get(connection.address)) is not None:
            own.discard(connection)
            if not own:
                del self._of_address[connection.address]

    @contextmanager
    def unread(self, connection: Connection, size: int) -> Iterator[None]:
        """Counts an answer that a client has not read while the block runs."""
        self._unread[connection] = size
        while len(self._unread) > 1 and sum(self._unread.values()) > self.limits.unread:
            waiting = sorted(self._unread, key=lambda one: one.standing.let_in is True)
            del self._unread[waiting[0]]
            waiting[0].tear()
        try:
            yield
        finally:
            self._unread.pop(connection, None)

    def _make_room(self, among: Collection[Connection]) -> bool:
        """Closes the connection that was idle longest, so that a client with many idle ones can't block others. If none
        is idle, closes the longest busy one of a client without access, which may be reading its answers very
        slowly."""
        idle = min((one for one in among if one.idle), key=lambda one: one.rests_until, default=None)
        strangers = (one for one in among if one.standing.let_in is False)
        closed = idle or min(strangers, key=lambda one: one.busy_since, default=None)
        if closed is None:
            return False
        self._forget(closed)
        closed.tear()
        return True

    async def _refuse(self, stream: trio.SocketStream) -> None:
        self._refused += 1
        if self._refused & (self._refused - 1) == 0:
            _log.warning("the limit of %d connections is reached; %d refused", self.limits.connections, self._refused)
        if self.tls is not None and stream.socket.family != socket.AF_UNIX:
            return
        request_id = new_request_id()
        body = problem_body(
            Problem(503, "too-many-connections", "the daemon serves as many connections as it can", hint="try again"),
            request_id,
        )
        fields = [*problem_headers(body, request_id), (b"connection", b"close"), (b"retry-after", b"1")]
        head = b"".join(b"%s: %s\r\n" % field for field in fields)
        with trio.move_on_after(0.5):
            try:
                await stream.send_all(b"HTTP/1.1 503 Service Unavailable\r\n" + head + b"\r\n" + body)
                await stream.send_eof()
                await stream.receive_some(4096)
            except trio.BrokenResourceError:
                pass


class _Terminated(EventWrapper):
    """Hypercorn's `terminated`, which is the same as `stopping`. So an answer after it closes its connection, whichever
    task runs first."""

    def __init__(self, stopping: trio.Event) -> None:
        self._event = stopping


def _duplicates(sockets: Sequence[socket.socket]) -> list[trio.SocketListener]:
    listeners = []
    for sock in sockets:
        own = sock.dup()
        own.setblocking(False)
        listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(own)))
    return listeners


def _watch_peer(stream: trio.SocketStream, silence_s: float) -> None:
    """Makes the kernel detect dead peers. An idle WebSocket has no other deadline, and the data of an event stream fits
    into the kernel's buffer for hours."""
    if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        # Without it the kernel retransmits for a quarter of an hour. It also ends a live peer that reads nothing, so it
        # is no shorter than our own deadline.
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))


def _config(limits: Limits) -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = _log
    config.include_server_header = False
    config.h11_max_incomplete_size = limits.header_bytes
    config.keep_alive_max_requests = limits.requests
    config.websocket_max_message_size = limits.websocket_message
    # Hypercorn annotates whole seconds and takes any number.
    config.startup_timeout = limits.lifespan_s
    config.shutdown_timeout = limits.lifespan_s
    return config
