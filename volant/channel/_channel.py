"""The way into one guest, over as many connections as it takes."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import trio

from volant.host import Host
from volant.model.agent import AGENT_PORT

from ._address import Address, HybridVsock, VirtioSerial, Vsock
from ._errors import AgentUnreachable, LinkLost
from ._link import Link
from ._slots import Slot, Slots
from ._stream import ChannelStream, SocketChannelStream

CONNECT_S = 5.0
RETRY_MIN_S = 0.02
RETRY_MAX_S = 5.0
HONEST_LIFE_S = 10.0
"""A link that lived so long was one; what comes next is tried at once."""

_HYBRID_ANSWER = 64


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
    """Why the last link ended."""


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
        with trio.move_on_after(timeout_s):
            slot = await self._slots.acquire(reserved=reserved)
            try:
                return await self._open(slot, port, timeout_s)
            except BaseException:
                slot.release()
                raise
        if self.connected:
            raise AgentUnreachable(f"no stream into the guest was free within {timeout_s:g} s")
        raise AgentUnreachable(f"the guest's agent could not be reached within {timeout_s:g} s{self._because()}")

    async def ready(self) -> None:
        """Return once the guest's agent is on the other end; at once where no link is kept. Has no deadline.

        Raises AgentUnreachable when the channel is closed.
        """
        while not self.connected:
            if self._closed.is_set():
                raise AgentUnreachable("the channel to the guest is closed")
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    async def closed(self) -> None:
        """Return once the channel is over, and all its streams with it."""
        await self._closed.wait()

    @property
    def connected(self) -> bool:
        return not self._closed.is_set() and (self._link is not None or not isinstance(self.address, VirtioSerial))

    def statistics(self) -> ChannelStatistics:
        link = self._link
        return ChannelStatistics(
            transport={VirtioSerial: "virtio-serial", Vsock: "vsock", HybridVsock: "hybrid-vsock"}[type(self.address)],
            connected=self.connected,
            links=self._links,
            streams=self._slots.taken,
            bytes_in=self._bytes_in + (link.bytes_in if link else 0),
            bytes_out=self._bytes_out + (link.bytes_out if link else 0),
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
        match self.address:
            case Vsock(cid):
                return await self._open_socket(slot, self._host.connect_vsock(cid, port, timeout_s))
            case HybridVsock(path):
                return await self._open_socket(slot, connect_hybrid(self._host, path, port, timeout_s))
        while True:
            await self.ready()
            if self._link is not None:
                try:
                    return self._link.open(slot, port)
                except LinkLost:
                    # It is over, and about to be replaced.
                    await self._changed.wait()

    async def _open_socket(self, slot: Slot, connecting: Awaitable[trio.SocketStream]) -> ChannelStream:
        try:
            return SocketChannelStream(slot, await connecting)
        except (OSError, trio.BrokenResourceError, trio.TooSlowError) as error:
            raise AgentUnreachable(f"the guest does not answer: {str(error) or type(error).__name__}") from error

    async def _keep(self, path: Path) -> None:
        """Make one link after the other."""
        delay = RETRY_MIN_S
        while True:
            began = trio.current_time()
            try:
                stream = await self._host.connect_unix(path, CONNECT_S)
            except (OSError, trio.TooSlowError) as error:
                self._last_loss = f"the hypervisor's agent socket: {str(error) or 'no answer'}"
            else:
                async with stream:
                    link = Link(stream, bytes.fromhex(self._host.new_id()))
                    try:
                        await link.run(partial(self._set_link, link))
                    except LinkLost as error:
                        self._last_loss = str(error)
                    finally:
                        self._bytes_in += link.bytes_in
                        self._bytes_out += link.bytes_out
                        self._set_link(None)
            if trio.current_time() - began >= HONEST_LIFE_S:
                delay = RETRY_MIN_S
            await trio.sleep(delay)
            delay = min(2 * delay, RETRY_MAX_S)

    def _set_link(self, link: Link | None) -> None:
        self._link = link
        if link is not None:
            self._links += 1
        self._changed.set()
        self._changed = trio.Event()

    def _close(self) -> None:
        self._closed.set()
        self._changed.set()


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
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        channel: Channel = await nursery.start(run_channel, host, address)
        # What goes wrong in the caller's block is the caller's, not a group of this nursery's.
        try:
            yield channel
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def connect_hybrid(host: Host, path: Path, port: int, timeout_s: float) -> trio.SocketStream:
    """Connect to a guest's vsock port through the hypervisor's Unix socket, as Firecracker and Cloud Hypervisor do it:
    `CONNECT <port>`, answered by a line `OK <number>`, or by the end of the stream where nobody listens.

    Raises OSError, trio.TooSlowError, trio.BrokenResourceError.
    """
    with trio.fail_after(timeout_s):
        stream = await host.connect_unix(path, timeout_s)
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
