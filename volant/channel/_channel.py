"""The way into one guest, over as many connections as it takes."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from volant.concurrency import open_helpers
from volant.host import Host
from volant.model.agent import AGENT_PORT

from ._address import Address, HybridVsock, VirtioSerial, Vsock
from ._errors import AgentUnreachable, LinkLost
from ._link import Link
from ._slots import Slot, Slots
from ._still import Port, Stillness
from ._stream import ChannelStream, SocketChannelStream, Sockets

CONNECT_S = 5.0
TAKE_S = 0.1
"""How long a guest that moves is given to take what was sent to it already."""
RETRY_MIN_S = 0.02
RETRY_MAX_S = 5.0
RETRY_CONNECT_MAX_S = 0.5
"""Between two tries of somebody who waits for a connection of their own."""
HONEST_LIFE_S = 10.0
"""A link that lived so long was one; what comes next is tried at once."""

_HYBRID_ANSWER = 64
_LOOK_AGAIN_S = 0.001


class ChannelStatistics(msgspec.Struct, frozen=True):
    """What a channel is doing, for `inspect`."""

    transport: str
    connected: bool
    """Whether the guest's agent is on the other end. Without a link to keep (vsock) always true."""
    links: int
    """How often the agent was found."""
    streams: int
    bytes_in: int
    bytes_out: int
    last_loss: str | None
    """Why the last link ended; without a link to keep, why nobody was reached last, until somebody is."""


class Channel:
    """Byte streams into one guest. `run_channel` or `open_channel` makes it."""

    def __init__(self, host: Host, address: Address, nursery: trio.Nursery) -> None:
        self.address = address
        self._host = host
        self._nursery = nursery
        self._slots = Slots()
        self._link: Link | None = None
        self._changed = trio.Event()
        self._closed = trio.Event()
        self._stands_still = False
        self._stillness = Stillness()
        self._socket: trio.SocketStream | None = None
        self._sockets = Sockets()
        self._links = 0
        self._bytes_in = 0
        self._bytes_out = 0
        self._last_loss: str | None = None

    async def open_stream(self, port: int = AGENT_PORT, *, timeout_s: float, reserved: bool = False) -> ChannelStream:
        """A new stream to a port of the guest.

        Waits for the guest's agent, and for one of `MAX_STREAMS` slots, `timeout_s` in all. `reserved` takes one of
        the slots that are kept for the daemon's own requests. Whether anybody listens on the port may show only in
        the first receive. Raises AgentUnreachable.
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
        """Return once the guest's agent is on the other end, and the guest does not stand still; where no link is kept
        for the second alone. Has no deadline.

        Raises AgentUnreachable when the channel is closed.
        """
        while not self.connected or self._stands_still:
            if self._closed.is_set():
                raise AgentUnreachable("the channel to the guest is closed")
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    def stand_still(self, yes: bool) -> None:
        """Say whether the guest is paused. While it is, nobody begins anything with it, and what is under way waits,
        with the link and all its streams open, however long it takes."""
        self._stands_still = yes
        self._let_stall(yes)
        self._wake()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Callable[[], tuple[int, int]]]:
        """A block in which nothing happens at the host's end of the agent's port: nobody reads, writes, connects or
        leaves there. Streams stay open, and who uses them waits; the caller bounds how long.

        What it gives tells how many bytes the hypervisor has not read yet, and how many it has sent that were not read
        here. Without a port (vsock) there is nothing to hold: the kernel stops that with its machine.

        Raises trio.BrokenResourceError in the end, when the channel was closed meanwhile.
        """
        with trio.move_on_after(TAKE_S):
            # It saves time later, when the guest stands still; nothing depends on it.
            while self._on_the_way()[0]:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(_LOOK_AGAIN_S)
        async with self._stillness.keep():
            self._let_stall(True)
            try:
                yield self._on_the_way
            finally:
                self._let_stall(self._stands_still)
        if self._closed.is_set():
            raise trio.BrokenResourceError("the channel to the guest was closed while it was held")

    def _on_the_way(self) -> tuple[int, int]:
        if self._socket is None or self._closed.is_set():
            return 0, 0
        return self._host.sockets.unread(self._socket)

    def _let_stall(self, yes: bool) -> None:
        if self._link is not None:
            self._link.be_patient(yes)

    async def closed(self) -> None:
        """Return once the channel is over, and all its streams with it."""
        await self._closed.wait()

    @property
    def connected(self) -> bool:
        return not self._closed.is_set() and (self._link is not None or not isinstance(self.address, VirtioSerial))

    @property
    def link(self) -> int | None:
        """Which of its links this one is: as long as that is the same, so is the agent. None: there is none now, or, as
        with vsock, none is kept."""
        return None if self._link is None else self._links

    def statistics(self) -> ChannelStatistics:
        link = self._link
        return ChannelStatistics(
            transport={VirtioSerial: "virtio-serial", Vsock: "vsock", HybridVsock: "hybrid-vsock"}[type(self.address)],
            connected=self.connected,
            links=self._links,
            streams=self._slots.taken,
            bytes_in=self._bytes_in + self._sockets.bytes_in + (link.bytes_in if link else 0),
            bytes_out=self._bytes_out + self._sockets.bytes_out + (link.bytes_out if link else 0),
            last_loss=self._last_loss,
        )

    def start_soon(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that must not fail for as long as the channel lives. Raises AgentUnreachable when it is closed."""
        if self._closed.is_set():
            raise AgentUnreachable("the channel to the guest is closed")
        self._nursery.start_soon(task)

    def _because(self) -> str:
        return f": {self._last_loss}" if self._last_loss else ""

    async def _open(self, slot: Slot, port: int, timeout_s: float) -> ChannelStream:
        await self.ready()
        match self.address:
            case Vsock(cid):
                return await self._connect(slot, partial(self._host.sockets.connect_vsock, cid, port, timeout_s))
            case HybridVsock(path):
                return await self._connect(slot, partial(connect_hybrid, self._host, path, port, timeout_s))
        while True:
            await self.ready()
            if self._link is not None:
                try:
                    return self._link.open(slot, port)
                except LinkLost:
                    # It is over, and about to be replaced.
                    await self._changed.wait()

    async def _connect(self, slot: Slot, connect: Callable[[], Awaitable[trio.SocketStream]]) -> ChannelStream:
        """Again and again until there is somebody: the agent may be about to begin. The caller sets the deadline."""
        delay = RETRY_MIN_S
        while True:
            await self.ready()
            try:
                stream = await connect()
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
                self._last_loss = f"no connection: {str(error) or type(error).__name__}"
                await trio.sleep(delay)
                delay = min(2 * delay, RETRY_CONNECT_MAX_S)
                continue
            if self._closed.is_set():
                await trio.aclose_forcefully(stream)
                continue
            self._last_loss = None
            return SocketChannelStream(slot, stream, self._sockets)

    async def _keep(self, path: Path) -> None:
        """Make one link after the other."""
        delay = RETRY_MIN_S
        while True:
            began = trio.current_time()
            try:
                stream = await self._stillness.move(partial(self._host.sockets.connect_unix, path, CONNECT_S))
            except (OSError, trio.TooSlowError) as error:
                self._last_loss = f"the hypervisor's agent socket: {str(error) or 'no answer'}"
            else:
                async with stream:
                    self._socket = stream
                    link = Link(Port(stream, self._stillness), bytes.fromhex(self._host.random.new_id()))
                    try:
                        await link.run(partial(self._set_link, link))
                    except LinkLost as error:
                        self._last_loss = str(error)
                    finally:
                        self._bytes_in += link.bytes_in
                        self._bytes_out += link.bytes_out
                        self._set_link(None)
                    await self._stillness.end()
                    self._socket = None
            if trio.current_time() - began >= HONEST_LIFE_S:
                delay = RETRY_MIN_S
            await trio.sleep(delay)
            delay = min(2 * delay, RETRY_MAX_S)

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        if link is not None:
            link.be_patient(self._stands_still)
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
    host: Host, address: Address, *, task_status: trio.TaskStatus[Channel] = trio.TASK_STATUS_IGNORED
) -> None:
    """Keep a channel for as long as this task lives: `channel = await nursery.start(run_channel, host, address)`.

    It starts at once, also while the guest boots or the hypervisor is not there yet. A link that is lost is made
    again, at once at first and at most every `RETRY_MAX_S` when that keeps failing; its streams break.
    """
    async with trio.open_nursery() as nursery:
        channel = Channel(host, address, nursery)
        try:
            task_status.started(channel)
            if isinstance(address, VirtioSerial):
                await channel._keep(address.path)
            else:
                await trio.sleep_forever()
        finally:
            channel._close()


@asynccontextmanager
async def open_channel(host: Host, address: Address) -> AsyncIterator[Channel]:
    """`run_channel` for the length of a block."""
    async with open_helpers() as helpers:
        channel: Channel = await helpers.start(run_channel, host, address)
        yield channel


async def connect_hybrid(host: Host, path: Path, port: int, timeout_s: float) -> trio.SocketStream:
    """Connect to a guest's vsock port through the hypervisor's Unix socket, as Firecracker and Cloud Hypervisor do it:
    `CONNECT <port>`, answered by a line `OK <number>`, or by the end of the stream where nobody listens.

    Raises OSError, trio.TooSlowError, trio.BrokenResourceError.
    """
    with trio.fail_after(timeout_s):
        stream = await host.sockets.connect_unix(path, timeout_s)
        try:
            await stream.send_all(f"CONNECT {port}\n".encode())
            line = b""
            # Byte by byte, as what follows the line belongs to the caller.
            while not line.endswith(b"\n") and len(line) < _HYBRID_ANSWER:
                byte = await stream.receive_some(1)
                if not byte:
                    break
                line += byte
            if not (line.startswith(b"OK ") and line.endswith(b"\n")):
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"the guest refused port {port}")
            return stream
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
