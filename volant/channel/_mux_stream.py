"""One stream of a multiplexed link."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio
from h2.errors import ErrorCodes

from ._stream import Bytes, ChannelStream, Slot

if TYPE_CHECKING:
    from ._link import Link


class MuxStream(ChannelStream):
    """A stream of a link. The link updates its state, and wakes the tasks that wait for it."""

    def __init__(self, slot: Slot, link: Link, stream_id: int) -> None:
        self.stream_id = stream_id
        self.held = bytearray()  #: received and not yet taken; bounded by the stream's window
        self.input_over = False
        self.output_over = False
        self._slot = slot
        self._link = link
        self._failure: str | None = None
        self._refuses_input = False
        self._closed = False
        self._busy_sending = False
        self._busy_receiving = False
        self._received = trio.Event()
        self._window = trio.Event()

    # For callers

    async def send_all(self, data: Bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.check_sendable()
        if self._busy_sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._busy_sending = True
        try:
            await self._link.send(self, data)
        finally:
            self._busy_sending = False

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()
        self.check_sendable()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.output_over and not self._closed and self._failure is None:
            return
        if self._busy_sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.check_sendable()
        self._link.send_eof(self)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._busy_receiving:
            raise trio.BusyResourceError("another task is receiving on this stream")
        await trio.lowlevel.checkpoint()
        self._busy_receiving = True
        try:
            while not self.held and not self.input_over and self._failure is None and not self._closed:
                self._received = trio.Event()
                await self._received.wait()
        finally:
            self._busy_receiving = False
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self.held:
            count = len(self.held) if max_bytes is None else min(max_bytes, len(self.held))
            data = bytes(self.held[:count])
            del self.held[:count]
            self._link.acknowledge(self, count)
            return data
        if self.input_over:
            return b""
        raise trio.BrokenResourceError(self._failure)

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._link.abandon(self)
            if self.held:
                self._link.acknowledge(self, len(self.held))
                self.held.clear()
            self._slot.release()
            self.wake_receiver()
            self.wake_sender()
        await trio.lowlevel.checkpoint()

    # For the link

    def check_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._failure is not None:
            raise trio.BrokenResourceError(self._failure)
        if self._refuses_input:
            raise trio.BrokenResourceError("the guest has closed its end of the stream")
        if self.output_over:
            raise trio.ClosedResourceError("send_eof was called on this stream")

    async def wait_window(self) -> None:
        self._window = trio.Event()
        await self._window.wait()

    def wake_receiver(self) -> None:
        self._received.set()

    def wake_sender(self) -> None:
        self._window.set()

    def end_input(self) -> None:
        """Records that the guest sends no more. After a refusal this is not the end of the data."""
        if self._failure is None:
            self.input_over = True
            self.wake_receiver()

    def reset(self, code: int) -> None:
        if self.input_over:
            # The guest has sent everything, and reads no more.
            self._refuses_input = True
            self.finish()
        elif code == ErrorCodes.REFUSED_STREAM:
            self.fail("the guest refused the stream, as it has too many")
        else:
            self.fail(f"the guest reset the stream (code {code})")

    def fail(self, why: str) -> None:
        """Breaks the stream. Received data can still be read; the first reason stays."""
        self._failure = self._failure or why
        self.finish()

    def finish(self) -> None:
        """Frees the slot and wakes both sides, as no more data will be transferred."""
        self._slot.release()
        self.wake_receiver()
        self.wake_sender()
