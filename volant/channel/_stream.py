"""A byte stream into a guest."""

from __future__ import annotations

from abc import abstractmethod

import trio

from ._slots import Slot

Bytes = bytes | bytearray | memoryview


class ChannelStream(trio.abc.HalfCloseableStream):
    """One connection to a port of the guest, whatever carries it.

    As with a socket: one task may send while another receives; `send_eof` ends this direction alone; `aclose` ends
    both at once, and the guest takes that as the client having left. trio.BrokenResourceError means that the
    guest or the link to it is gone. No operation has a deadline of its own: an open stream may be silent for days.
    """

    @abstractmethod
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes, empty at the end."""


class SocketChannelStream(ChannelStream):
    """A stream that has a socket to itself."""

    def __init__(self, slot: Slot, stream: trio.SocketStream) -> None:
        self._slot = slot
        self._stream = stream

    async def send_all(self, data: Bytes) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        self._slot.release()
        await self._stream.aclose()


class PrefixedStream(ChannelStream):
    """A stream of which somebody has read a little already: that comes first."""

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
