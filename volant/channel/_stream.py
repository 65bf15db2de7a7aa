"""Byte streams into a guest."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress

import trio

from ._slots import Slot

Bytes = bytes | bytearray | memoryview


class ChannelStream(trio.abc.HalfCloseableStream):
    """One connection to a port of the guest, whatever carries it.

    As with a socket, one task may send while another receives. `send_eof` ends one direction, `aclose` both, which
    cancels the request in the guest. trio.BrokenResourceError means that the guest or its link is gone. Operations
    have no deadline: an open stream may be silent for days.
    """

    is_persistent = False
    """Whether it may carry one request after the other, and so none asks for its end."""
    is_free = False
    """Whether the last request and its answer ended, so that the next one may follow on a persistent stream."""

    @abstractmethod
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Returns the next bytes, empty at the end."""


class Sockets:
    """The streams of a channel that have a socket each, and the bytes that they have carried."""

    def __init__(self) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self.open = set[SocketChannelStream]()

    def fail(self, why: str) -> None:
        """Breaks all open streams, as the channel is closed."""
        for stream in self.open.copy():
            stream.fail(why)


class SocketChannelStream(ChannelStream):
    """A stream that has a socket to itself."""

    def __init__(self, slot: Slot, stream: trio.SocketStream, sockets: Sockets) -> None:
        self._slot = slot
        self._stream = stream
        self._sockets = sockets
        self._failure: str | None = None
        sockets.open.add(self)

    async def send_all(self, data: Bytes) -> None:
        self._check()
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise trio.BrokenResourceError(self._failure or "the guest has closed its end of the stream") from error
        self._sockets.bytes_out += len(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        self._check()
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        except trio.BrokenResourceError as error:
            raise trio.BrokenResourceError(self._failure or "the guest reset the stream") from error
        if not data:
            self._check()  # perhaps `fail` has ended it
        self._sockets.bytes_in += len(data)
        return data

    async def aclose(self) -> None:
        self._failure = None
        self._over()
        await self._stream.aclose()

    def fail(self, why: str) -> None:
        """Breaks the stream. Received data can still be taken."""
        self._failure = why
        self._over()
        with suppress(OSError):
            self._stream.socket.shutdown(trio.socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._failure is not None:
            raise trio.BrokenResourceError(self._failure)

    def _over(self) -> None:
        self._slot.release()
        self._sockets.open.discard(self)


class PrefixedStream(ChannelStream):
    """A stream with bytes in front that were read from it already."""

    def __init__(self, prefix: bytes, stream: ChannelStream) -> None:
        self._prefix = prefix
        self._stream = stream

    async def send_all(self, data: Bytes) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._prefix:
            await trio.lowlevel.checkpoint()
            count = len(self._prefix) if max_bytes is None else max_bytes
            data, self._prefix = self._prefix[:count], self._prefix[count:]
            return data
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()
