"""Byte streams into a guest: addresses of guests, errors, and a limit for open streams."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from volant.model.agent import MAX_STREAMS, RESERVED_STREAMS


class Slot:
    """The right to one stream. `release` may be called more than once."""

    __slots__ = ("_limiter",)

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter: trio.CapacityLimiter | None = limiter

    def release(self) -> None:
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.release_on_behalf_of(self)


class Slots:
    """Slots for clients' streams, and a few for the daemon's own, so that clients can't lock it out."""

    def __init__(self) -> None:
        self._common = trio.CapacityLimiter(MAX_STREAMS)
        self._reserved = trio.CapacityLimiter(RESERVED_STREAMS)

    @property
    def taken(self) -> int:
        return int(self._common.borrowed_tokens + self._reserved.borrowed_tokens)

    async def acquire(self, *, reserved: bool) -> Slot:
        """Waits for a slot, in the order of the calls."""
        limiter = self._reserved if reserved else self._common
        slot = Slot(limiter)
        await limiter.acquire_on_behalf_of(slot)
        return slot


class VirtioSerial(msgspec.Struct, frozen=True):
    """The Unix socket of a virtio-serial port. It carries one connection, so streams are multiplexed over it."""

    path: Path


class Vsock(msgspec.Struct, frozen=True):
    """A guest with a vhost-vsock device, where each stream is a separate connection."""

    cid: int


Address = VirtioSerial | Vsock


WHY_CHARACTERS = 300
"""Maximum length of a parser's error. It may quote a whole header block of the guest, and is part of rows and
events."""


class AgentUnreachable(Exception):
    """The agent did not answer: no stream into the guest could be opened, or it broke, or the deadline passed.

    The guest may be booting, paused, hung or gone. A request that was sent may have had an effect.
    """


class AgentProtocolError(Exception):
    """The agent's answer is malformed. That is not a bug of the daemon, as a guest is not trusted."""


class LinkLost(Exception):
    """A link has ended, and its streams are broken. The channel opens the next one."""


Bytes = bytes | bytearray | memoryview


class ChannelStream(trio.abc.HalfCloseableStream):
    """One connection to a port of the guest, over any transport.

    As with a socket, one task may send while another receives. `send_eof` ends one direction, `aclose` both, which
    cancels the request in the guest. trio.BrokenResourceError means that the guest or its link is gone. Operations
    have no deadline: an open stream may be silent for days.
    """

    is_persistent = False
    """Whether it stays open after a request, and can carry the next one."""
    is_free = False
    """Whether the last request and its answer ended, so that the next one may follow on a persistent stream."""

    @abstractmethod
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Returns the next bytes, empty at the end."""


class Sockets:
    """The streams of a channel with a socket each, and the number of bytes that they have carried."""

    def __init__(self) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self.open_streams = set[SocketChannelStream]()

    def fail(self, why: str) -> None:
        """Breaks all open streams, as the channel is closed."""
        for stream in self.open_streams.copy():
            stream.fail(why)


class SocketChannelStream(ChannelStream):
    """A stream with its own socket."""

    def __init__(self, slot: Slot, stream: trio.SocketStream, sockets: Sockets) -> None:
        self._slot = slot
        self._stream = stream
        self._sockets = sockets
        self._failure: str | None = None
        sockets.open_streams.add(self)

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
        """Breaks the stream. Received data can still be read."""
        self._failure = why
        self._over()
        with suppress(OSError):
            self._stream.socket.shutdown(trio.socket.SHUT_RDWR)

    def _check(self) -> None:
        if self._failure is not None:
            raise trio.BrokenResourceError(self._failure)

    def _over(self) -> None:
        self._slot.release()
        self._sockets.open_streams.discard(self)


class PrefixedStream(ChannelStream):
    """A stream preceded by bytes that were already read from it."""

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
