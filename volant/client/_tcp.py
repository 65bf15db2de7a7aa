"""A TCP connection to a port in a guest."""

from __future__ import annotations

import trio

from ._errors import ConnectionLost
from ._websocket import Closed, Socket

_MAX_MESSAGE = 64 * 1024


class TcpStream(trio.abc.HalfCloseableStream):
    """A Trio stream to a port of the guest's loopback.

    `send_eof` only ends the client's direction. `aclose` drops the connection. If the connection breaks anywhere
    between the client and the guest's server, methods raise trio.BrokenResourceError with the cause in its text.
    """

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._buffer = b""
        self._ended = False
        self._eof_sent = False
        self._closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed or self._eof_sent:
            raise trio.ClosedResourceError
        await trio.lowlevel.checkpoint_if_cancelled()
        view = memoryview(data)
        for start in range(0, len(view), _MAX_MESSAGE):
            await self._send(bytes(view[start : start + _MAX_MESSAGE]))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError
        if not self._eof_sent:
            self._eof_sent = True
            # An empty message ends a direction, so `send_all` sends no empty one.
            await self._send(b"")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._closed:
            raise trio.ClosedResourceError
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._buffer and not self._ended:
            try:
                message = await self._socket.receive()
            except Closed as closed:
                raise trio.BrokenResourceError(f"the daemon closed the connection: {closed.reason}") from closed
            except ConnectionLost as lost:
                raise trio.BrokenResourceError(str(lost)) from lost
            if isinstance(message, str):
                raise trio.BrokenResourceError("the daemon sent text")
            self._buffer = message
            self._ended = not message
        count = len(self._buffer) if max_bytes is None else max_bytes
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    async def aclose(self) -> None:
        self._closed = True
        await trio.lowlevel.checkpoint()

    async def _send(self, message: bytes) -> None:
        try:
            await self._socket.send(message)
        except ConnectionLost as lost:
            raise trio.BrokenResourceError(str(lost)) from lost
