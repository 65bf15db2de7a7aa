"""WebSocket connections to the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import cast
from urllib.parse import urlencode

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

from ._address import Address
from ._connection import connect
from ._errors import ConnectionLost, UnexpectedAnswer
from ._http import Http
from ._transport import CONNECT_S, Query, encoding, problem

ABNORMAL = 1006
"""The code of a connection that broke without a close frame."""

_HANDSHAKE_S = 60.0
"""Longer than the daemon takes to open the stream before it answers: 10 s for a port in a guest. For commands the guest
answers itself, possibly next to many others on a busy host."""
_SILENCE_S = 30.0
_PONG_S = 20.0
_MAX_MESSAGE = 4 * 1024 * 1024


class Closed(Exception):
    """The daemon has closed the WebSocket."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code}: {reason}")
        self.code = code
        self.reason = reason


class Socket:
    """An open WebSocket: one task may receive while others send. `open_websocket` creates it."""

    def __init__(self, connection: WebSocketConnection, address: Address, pings: bool) -> None:
        self._connection = connection
        self._address = address
        self._pings = pings

    async def receive(self) -> str | bytes:
        """Returns the next message. May be cancelled without losing one.

        :raises Closed: the daemon closed.
        :raises ConnectionLost: the connection broke.
        """
        try:
            return await (_next(self._connection) if self._pings else self._connection.get_message())
        except ConnectionClosed as closed:
            if closed.reason is None or closed.reason.code == ABNORMAL:
                raise self._lost() from closed
            raise Closed(int(closed.reason.code), closed.reason.reason or "") from None
        except trio.TooSlowError:
            raise self._lost() from None

    async def send(self, message: str | bytes) -> None:
        """Sends a message, and waits while the daemon does not read. :raises ConnectionLost: it is closed or broken."""
        try:
            await self._connection.send_message(message)
        except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._lost() from error

    async def ping(self) -> None:
        """Waits until the other end has read everything that was sent before. Another task must receive at the same
        time.

        :raises ConnectionLost: it is closed or broken.
        """
        try:
            await self._connection.ping()
        except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._lost() from error

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the connection to {self._address.text} broke")


@asynccontextmanager
async def open_websocket(http: Http, path: str, query: Query, *, pings: bool = True) -> AsyncIterator[Socket]:
    """Connects for the block. Leaving it drops the connection at once, without a closing handshake.

    :param pings: whether to ping a silent daemon. Not for streams to a guest: a daemon that waits for a guest to read
        answers no pings, and the kernel's keep-alive must detect dead peers
    :raises ClientProblem: the daemon answered with an error instead of the upgrade.
    :raises ClientError: the daemon can't be reached, or its answer is not a WebSocket.
    """
    with encoding():
        text = urlencode({key: value for key, value in query.items() if value is not None}, doseq=True)
    stream = await connect(http, CONNECT_S)
    resource = f"{http.address.prefix}{path}" + (f"?{text}" if text else "")
    headers = [(name.encode(), value.encode()) for name, value in http.headers.items()]
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                with trio.move_on_after(_HANDSHAKE_S) as handshake:
                    opening = _Opening(stream, handshake)
                    connection = await wrap_client_stream(
                        nursery,
                        cast(trio.SocketStream, opening),  # any stream will do
                        http.address.host_header,
                        resource,
                        extra_headers=headers,
                        max_message_size=_MAX_MESSAGE,
                    )
                if handshake.cancelled_caught:
                    raise _unanswered(http.address, opening.broke)
                try:
                    yield Socket(connection, http.address, pings)
                except Exception as error:
                    # Raised at the end, outside of the nursery, so that it is in no group.
                    failure = error
            except Exception as error:
                failure = _explained(error, http.address)
            finally:
                # A closing handshake would wait for a peer that may be busy sending; the daemon does not need one.
                with trio.CancelScope() as closing:
                    closing.cancel()
                    await stream.aclose()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # trio-websocket 0.12 raises a refusal in a task of its own.
        cause = _the_one(group)
        if cause is None:
            raise
        failure = _explained(cause, http.address)
    if failure is not None:
        raise failure


class _Opening(trio.abc.Stream):
    """A stream that aborts the handshake when it breaks.

    trio-websocket 0.12 would wait forever for an answer that can't arrive.
    """

    def __init__(self, stream: trio.abc.Stream, wait: trio.CancelScope) -> None:
        self.broke = False
        self._stream = stream
        self._wait = wait

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._watched():
            await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        with self._watched():
            data = await self._stream.receive_some(max_bytes)
        if not data:
            self._end()
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except trio.BrokenResourceError:
            self._end()
            raise

    def _end(self) -> None:
        self.broke = True
        # This does nothing once the handshake is over.
        self._wait.cancel()


def _unanswered(address: Address, broke: bool) -> ConnectionLost:
    if broke:
        return ConnectionLost(f"the connection to {address.text} broke before the request for a WebSocket was answered")
    return ConnectionLost(f"{address.text} did not answer the request for a WebSocket within {_HANDSHAKE_S:g} s")


def _explained(error: Exception, address: Address) -> Exception:
    if isinstance(error, ConnectionRejected):
        fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in error.headers}
        return problem(error.status_code, fields, error.body or b"")
    if isinstance(error, HandshakeError):
        return UnexpectedAnswer(f"{address.text} did not accept the WebSocket: {error}")
    if isinstance(error, ConnectionClosed | trio.BrokenResourceError):
        return ConnectionLost(f"the connection to {address.text} broke")
    return error


def _the_one(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """Returns the only cause in nested groups; None if there are several, or if it is not a plain exception."""
    error: BaseException | None = group.split(trio.Cancelled)[1]
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, Exception) and not isinstance(error, BaseExceptionGroup) else None


async def read_websocket(
    http: Http, path: str, query: Query, opened: Callable[[], None], handle: Callable[[str | bytes], Awaitable[None]]
) -> int:
    """Connects and passes each message to `handle` until the daemon closes. Returns the close code.

    :raises ClientProblem: the daemon answered with an error instead of the upgrade.
    :raises ClientError: the daemon can't be reached, or the connection broke.
    """
    async with open_websocket(http, path, query) as socket:
        opened()
        while True:
            try:
                message = await socket.receive()
            except Closed as closed:
                return closed.code
            await handle(message)


async def _next(connection: WebSocketConnection) -> str | bytes:
    with trio.move_on_after(_SILENCE_S):
        return await connection.get_message()
    # A silent peer is pinged, to find out whether it is dead. Messages may come before the pong, so wait for both.
    message: str | bytes | None = None
    failure: Exception | None = None
    while message is None and failure is None:
        async with trio.open_nursery() as nursery:

            async def ping(scope: trio.CancelScope) -> None:
                nonlocal failure
                try:
                    with trio.fail_after(_PONG_S):
                        await connection.ping()
                    await trio.sleep(_SILENCE_S)
                except (ConnectionClosed, trio.TooSlowError) as error:
                    failure = error
                scope.cancel()

            nursery.start_soon(ping, nursery.cancel_scope)
            try:
                message = await connection.get_message()
            except ConnectionClosed as closed:
                failure = closed
            nursery.cancel_scope.cancel()
    if message is None:
        assert failure is not None
        raise failure
    return message
