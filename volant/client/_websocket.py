"""One WebSocket connection to the daemon, read to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, HandshakeError, WebSocketConnection, wrap_client_stream

from ._errors import ConnectionLost, UnexpectedAnswer
from ._http import CONNECT_S, Http, Query, problem

_HANDSHAKE_S = 10.0
_SILENCE_S = 30.0
_PONG_S = 20.0
_MAX_MESSAGE = 4 * 1024 * 1024


async def read_websocket(
    http: Http, path: str, query: Query, opened: Callable[[], None], handle: Callable[[str | bytes], Awaitable[None]]
) -> int:
    """Connect and give each message to `handle` until the daemon closes; return the code of the close.

    :raises ClientProblem: it answered with an error instead of the upgrade.
    :raises ClientError: nobody is there, or the connection broke.
    """
    stream: Any = await http.address.connect(CONNECT_S, http.tls)
    text = urlencode({key: value for key, value in query.items() if value is not None}, doseq=True)
    resource = f"{http.address.prefix}{path}" + (f"?{text}" if text else "")
    headers = [(name.encode(), value.encode()) for name, value in http.headers.items()]
    try:
        async with trio.open_nursery() as nursery:
            try:
                with trio.fail_after(_HANDSHAKE_S):
                    socket = await wrap_client_stream(
                        nursery,
                        stream,
                        http.address.host_header,
                        resource,
                        extra_headers=headers,
                        max_message_size=_MAX_MESSAGE,
                    )
                opened()
                return await _read(socket, handle)
            finally:
                # A close handshake would wait for a peer that may be busy sending; the daemon copes with this one.
                await trio.aclose_forcefully(stream)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = _the_one(group)
        if error is None:
            raise
        if isinstance(error, ConnectionRejected):
            fields = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in error.headers}
            raise problem(error.status_code, fields, error.body or b"") from None
        if isinstance(error, HandshakeError):
            raise UnexpectedAnswer(f"{http.address.text} does not speak WebSocket: {error}") from error
        if isinstance(error, ConnectionClosed | trio.BrokenResourceError | trio.TooSlowError):
            raise ConnectionLost(f"the connection to {http.address.text} broke") from error
        raise error from None


async def _read(socket: WebSocketConnection, handle: Callable[[str | bytes], Awaitable[None]]) -> int:
    while True:
        try:
            message = await _next(socket)
        except ConnectionClosed as closed:
            code = closed.reason.code if closed.reason is not None else 1006
            if code == 1006:
                raise
            return int(code)
        await handle(message)


async def _next(socket: WebSocketConnection) -> str | bytes:
    with trio.move_on_after(_SILENCE_S):
        return await socket.get_message()
    # Silence is fine in a log, a dead peer is not. The pong may stand behind messages, so both are waited for.
    message: str | bytes | None = None
    while message is None:
        async with trio.open_nursery() as nursery:

            async def ping(scope: trio.CancelScope) -> None:
                with trio.fail_after(_PONG_S):
                    await socket.ping()
                await trio.sleep(_SILENCE_S)
                scope.cancel()

            nursery.start_soon(ping, nursery.cancel_scope)
            message = await socket.get_message()
            nursery.cancel_scope.cancel()
    return message


def _the_one(group: BaseExceptionGroup[BaseException]) -> Exception | None:
    """The one cause in nested groups; None when there are several, or when it is no plain exception."""
    rest = group.split(trio.Cancelled)[1]
    error: BaseException | None = rest
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error if isinstance(error, Exception) and not isinstance(error, BaseExceptionGroup) else None
