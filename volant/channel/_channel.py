"""The channel into one guest: opens streams, and keeps the link of a virtio-serial port connected."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from volant.concurrency import Backoff, open_helpers
from volant.host import Host
from volant.model.agent import AGENT_PORT

from ._hold import HoldablePort, PortHold
from ._link import Link
from ._stream import (
    Address,
    AgentUnreachable,
    ChannelStream,
    LinkLost,
    Slot,
    Slots,
    SocketChannelStream,
    Sockets,
    VirtioSerial,
    Vsock,
)

CONNECT_S = 5.0
TAKE_S = 0.1
"""How long a running guest may take to read sent data, before a hold."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 5.0
"""Maximum delay before the link is opened again."""
RETRY_CONNECT_MAX_S = 0.5
"""Maximum delay before the connection of a stream is retried."""
STEADY_S = 10.0
"""The age of a link after which the next one is opened at once."""
_CHECK_S = 0.001


class ParkedLink:
    """A link that is not in use: `Channel.park` creates it, and `open_channel` takes it."""

    def __init__(self, stream: trio.SocketStream, link: Link) -> None:
        self.stream = stream
        self.link = link

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self.stream)


class ChannelStatistics(msgspec.Struct, frozen=True):
    """The state of a channel, for `inspect`."""

    transport: str
    connected: bool
    """Whether the link to the agent is up; always true without a link (vsock)."""
    links: int
    """How often the link came up."""
    streams: int
    bytes_in: int
    bytes_out: int
    last_loss: str | None
    """Why the last link ended. Without a link: why the last connection failed, until one succeeds."""


class Channel:
    """Byte streams into one guest. `run_channel` or `open_channel` creates it."""

    def __init__(self, host: Host, address: Address, nursery: trio.Nursery) -> None:
        self.address = address
        self._host = host
        self._nursery = nursery
        self._slots = Slots()
        self._link: Link | None = None
        self._changed = trio.Event()
        self._closed = trio.Event()
        self._paused = False
        self._hold = PortHold()
        self._socket: trio.SocketStream | None = None
        self._sockets = Sockets()
        self._links = 0
        self._bytes_in = 0
        self._bytes_out = 0
        self._last_loss: str | None = None

    async def open_stream(self, port: int = AGENT_PORT, *, timeout_s: float, reserved: bool = False) -> ChannelStream:
        """Opens a stream to a port of the guest. If nothing listens there, possibly only the first receive fails.

        :param timeout_s: how long to wait for the guest's agent and for one of `MAX_STREAMS` slots
        :param reserved: whether to use a slot for the daemon's own requests
        :raises AgentUnreachable: there is no stream
        """
        slot = None
        with trio.move_on_after(timeout_s):
            slot = await self._slots.acquire(reserved=reserved)
            try:
                return await self._open(slot, port, timeout_s)
            except BaseException:
                slot.release()
                raise
        if slot is None:
            raise AgentUnreachable(f"no stream into the guest was free within {timeout_s:g} s")
        raise AgentUnreachable(f"the guest's agent could not be reached within {timeout_s:g} s{self._because()}")

    async def ready(self) -> None:
        """Waits until the link is up and the guest is not paused. Has no deadline.

        :raises AgentUnreachable: the channel is closed
        """
        while not self.connected or self._paused:
            if self._closed.is_set():
                raise AgentUnreachable("the channel to the guest is closed")
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    def set_paused(self, paused: bool) -> None:
        """Sets whether the guest is paused. While it is, no stream is opened, and open ones wait without a deadline."""
        self._paused = paused
        self._let_stall(paused)
        self._wake()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Callable[[], tuple[int, int]]]:
        """Keeps the host's end of the agent's port unused during the block, see `PortHold`. Streams stay open and their
        users wait; the caller sets the deadline. A vsock is not held: the kernel stops it with its machine.

        Yields a function that returns the number of bytes that the hypervisor has not read yet, and the number of its
        bytes that were not read here.

        :raises trio.BrokenResourceError: the channel was closed in the meantime
        """
        with trio.move_on_after(TAKE_S):
            # Optional: bytes that the guest reads now need not be saved while it is paused.
            while self._unread()[0]:  # noqa: ASYNC110 - there is no event for that
                await trio.sleep(_CHECK_S)
        async with self._hold.hold():
            self._let_stall(True)
            try:
                yield self._unread
            finally:
                self._let_stall(self._paused)
        if self._closed.is_set():
            raise trio.BrokenResourceError("the channel to the guest was closed while it was held")

    def park(self) -> ParkedLink | None:
        """Keeps the link for another channel to the same port, which saves the guest the work for a new one. The guest
        must be paused, and this channel is closed before anything is awaited. Returns None if the link can't be kept,
        because it is in use.
        """
        if self._link is None or self._socket is None or not self._link.park():
            return None
        return ParkedLink(self._socket, self._link)

    def _unread(self) -> tuple[int, int]:
        if self._socket is None or self._closed.is_set():
            return 0, 0
        return self._host.sockets.unread(self._socket)

    def _let_stall(self, paused: bool) -> None:
        if self._link is not None:
            self._link.set_paused(paused)

    async def closed(self) -> None:
        """Waits until the channel and all its streams are closed."""
        await self._closed.wait()

    @property
    def connected(self) -> bool:
        return not self._closed.is_set() and (self._link is not None or not isinstance(self.address, VirtioSerial))

    @property
    def link(self) -> int | None:
        """The number of the present link: while it stays the same, so does the agent. None if the link is down, or
        there is none (vsock)."""
        return None if self._link is None else self._links

    def statistics(self) -> ChannelStatistics:
        link = self._link
        return ChannelStatistics(
            transport="vsock" if isinstance(self.address, Vsock) else "virtio-serial",
            connected=self.connected,
            links=self._links,
            streams=self._slots.taken,
            bytes_in=self._bytes_in + self._sockets.bytes_in + (link.bytes_in if link else 0),
            bytes_out=self._bytes_out + self._sockets.bytes_out + (link.bytes_out if link else 0),
            last_loss=self._last_loss,
        )

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Starts a task in the channel's nursery. It must not fail. :raises AgentUnreachable: the channel is closed."""
        if self._closed.is_set():
            raise AgentUnreachable("the channel to the guest is closed")
        self._nursery.start_soon(task)

    def _because(self) -> str:
        return f": {self._last_loss}" if self._last_loss else ""

    async def _open(self, slot: Slot, port: int, timeout_s: float) -> ChannelStream:
        await self.ready()
        if isinstance(self.address, Vsock):
            connect = partial(self._host.sockets.connect_vsock, self.address.cid, port, timeout_s)
            return await self._connect(slot, connect)
        while True:
            await self.ready()
            if self._link is not None:
                try:
                    return self._link.open(slot, port)
                except LinkLost:
                    # About to be replaced.
                    await self._changed.wait()

    async def _connect(self, slot: Slot, connect: Callable[[], Awaitable[trio.SocketStream]]) -> ChannelStream:
        """Retries until the agent listens, as it may be about to start. The caller sets the deadline."""
        backoff = Backoff(RETRY_MIN_S, RETRY_CONNECT_MAX_S)
        while True:
            await self.ready()
            try:
                stream = await connect()
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                self._last_loss = f"no connection: {str(error) or type(error).__name__}"
                await backoff.pause()
                continue
            if self._closed.is_set():
                await trio.aclose_forcefully(stream)
                continue
            self._last_loss = None
            return SocketChannelStream(slot, stream, self._sockets)

    async def _keep(self, path: Path, parked: ParkedLink | None) -> None:
        """Opens one link after the other; `parked` is the first."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S, steady_s=STEADY_S)
        if parked is not None:
            parked.link.go_on(HoldablePort(parked.stream, self._hold))
            await self._use(parked.stream, parked.link)
        while True:
            try:
                stream = await self._hold.run(partial(self._host.sockets.connect_unix, path, CONNECT_S))
            except (OSError, trio.TooSlowError) as error:
                self._last_loss = f"the hypervisor's agent socket: {str(error) or 'no answer'}"
            else:
                link = Link(HoldablePort(stream, self._hold), bytes.fromhex(self._host.random.new_id()))
                await self._use(stream, link)
            await backoff.pause()

    async def _use(self, stream: trio.SocketStream, link: Link) -> None:
        """Carries streams over a link until it is lost, and closes its connection, unless it is parked."""
        self._socket = stream
        try:
            try:
                await link.run(partial(self._set_link, link))
            except LinkLost as error:
                self._last_loss = str(error)
            finally:
                self._bytes_in += link.bytes_in
                self._bytes_out += link.bytes_out
                self._set_link(None)
            await self._hold.wait_released()
            self._socket = None
        finally:
            if not link.is_parked:
                await trio.aclose_forcefully(stream)

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        if link is not None:
            link.set_paused(self._paused)
            self._links += 1
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _close(self) -> None:
        self._closed.set()
        self._changed.set()
        self._sockets.fail("the channel was closed")


async def run_channel(
    host: Host,
    address: Address,
    parked: ParkedLink | None = None,
    *,
    task_status: trio.TaskStatus[Channel] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keeps a channel open while this task lives: `channel = await nursery.start(run_channel, host, address)`.

    It starts at once, even if the guest is booting or the hypervisor does not exist yet. A lost link breaks its streams
    and is opened again, at first at once, later after up to `RETRY_MAX_S`. `parked` is its first link.
    """
    async with trio.open_nursery() as nursery:
        channel = Channel(host, address, nursery)
        try:
            task_status.started(channel)
            if isinstance(address, VirtioSerial):
                await channel._keep(address.path, parked)
            else:
                await trio.sleep_forever()
        finally:
            channel._close()


@asynccontextmanager
async def open_channel(host: Host, address: Address, parked: ParkedLink | None = None) -> AsyncIterator[Channel]:
    """Keeps a channel open for the block. `parked` is its first link, which it closes in any case."""
    async with open_helpers() as helpers:
        channel: Channel = await helpers.start(run_channel, host, address, parked)
        yield channel
