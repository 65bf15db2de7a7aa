"""Many byte streams over one: HTTP/2 on the host's end of a virtio-serial port.

`volant/guest/_mux.py` is the other side, and explains how the two synchronize at any byte. On this side:

- **A guest is not trusted.** h2 checks every header. Frames are measured and counted before h2 sees them. Answers to
  the guest are bounded, as nothing is read while the output is full. Invalid data ends the link, never the daemon.
- **A stuck stream blocks no other.** The window of the connection is as large as those of all streams together, so a
  reader that sleeps only uses up its own window. (HTTP/2's default for the connection is 65,535 bytes.) Bytes are
  acknowledged when a reader takes them. Output is queued frame by frame while little is queued, so a bulk sender delays
  the others by milliseconds.
- **Opening a stream waits for nothing.** If the guest refuses it, the stream breaks. That saves a round trip of 4 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NoReturn

import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    WindowUpdated,
)
from h2.exceptions import NoAvailableStreamIDError, ProtocolError
from h2.settings import SettingCodes, Settings
from hyperframe.frame import Frame

from volant.model.agent import MAX_STREAMS, RESERVED_STREAMS, RESYNC_MAGIC, RESYNC_NONCE_BYTES

from ._budget import FRAME_LIMIT, FrameCounter, frame_budget
from ._stream import WHY_CHARACTERS, Bytes, ChannelStream, LinkLost, Slot

STREAM_WINDOW = 128 * 1024
CONNECTION_WINDOW = STREAM_WINDOW * (MAX_STREAMS + RESERVED_STREAMS)
OUTPUT_HIGH = 64 * 1024
OUTPUT_LIMIT = 512 * 1024
RESYNC_ZEROS = FRAME_LIMIT + 2 * 9
MAX_SETTINGS = 64
"""Maximum settings that a guest may send. HTTP/2 and its extensions have about ten."""
STALL_S = 60.0
"""How long a guest may read none of its input before the link is lost."""

_READ = 64 * 1024
_FRAMES_PER_TURN = 64
_NO_NONCE = bytes(RESYNC_NONCE_BYTES)

# h2 writes out each frame that it receives, with its data in hexadecimal digits, for a log that it does not write.
Frame.__repr__ = object.__repr__  # type: ignore[method-assign]


class Link:
    """One multiplexed connection: from `run` until that raises LinkLost."""

    def __init__(self, stream: trio.abc.Stream, nonce: bytes) -> None:
        if len(nonce) != RESYNC_NONCE_BYTES or nonce == _NO_NONCE:
            raise ValueError("a nonce is 16 bytes that are not all zero")
        self.bytes_in = 0
        self.bytes_out = 0
        self._stream = stream
        self._nonce = nonce
        self._conn = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._conn.local_settings = Settings(
            client=True,
            initial_values={
                SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                SettingCodes.ENABLE_PUSH: 0,
                SettingCodes.MAX_HEADER_LIST_SIZE: 4096,
            },
        )
        self._streams: dict[int, MuxStream] = {}
        self._out = bytearray()
        self._out_filled = trio.Event()
        self._out_room = trio.lowlevel.ParkingLot()
        self._lost: str | None = None
        self._scope = trio.CancelScope()
        self._stall = trio.CancelScope()
        self._paused = False
        self._is_up = False
        self._is_feeding = self._is_sending = False
        self.is_parked = False
        """Whether the connection stays open at the end of `run`."""

    async def run(self, on_ready: Callable[[], None]) -> NoReturn:
        """Finds the guest's agent, calls `on_ready`, and carries streams. :raises LinkLost: at its end."""
        self.is_parked = False
        try:
            rest = b"" if self._is_up else await self._begin()
            on_ready()
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(rest)
        except* LinkLost as group:
            self._lose(str(group.exceptions[0]))
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self._lose("the connection to the hypervisor broke")
        except* trio.TooSlowError:
            self._lose(f"the guest has taken no input for {STALL_S:.0f} s")
        finally:
            self._lose("the channel was closed")
        raise LinkLost(self._lost)

    async def _begin(self) -> bytes:
        """Finds the guest's agent and begins HTTP/2; returns the first bytes after that."""
        rest = await self._resync()
        self._conn.initiate_connection()
        self._conn.increment_flow_control_window(CONNECTION_WINDOW - self._conn.inbound_flow_control_window)
        self._flush()
        self._is_up = True
        return rest

    def park(self) -> bool:
        """Makes a cancelled `run` keep the connection open, for another `run`. Returns False if the link is in use, and
        data would be lost."""
        moves = self._streams or self._out or self._is_feeding or self._is_sending
        self.is_parked = self._is_up and self._lost is None and not moves
        return self.is_parked

    def go_on(self, stream: trio.abc.Stream) -> None:
        """Prepares a parked link for its next `run`, on another wrapper of its connection."""
        self._stream = stream
        self._scope = trio.CancelScope()
        self.bytes_in = self.bytes_out = 0

    def open(self, slot: Slot, port: int) -> MuxStream:
        """Opens a stream to a port of the guest; never waits. :raises LinkLost: the link is over."""
        if self._lost is not None:
            raise LinkLost(self._lost)
        try:
            stream_id = self._conn.get_next_available_stream_id()
            self._conn.send_headers(stream_id, [(":method", "CONNECT"), (":authority", str(port))])
        except NoAvailableStreamIDError as error:
            # After 2**30 streams. The next link begins with 1.
            self._lose("all stream ids of this link are used up")
            self._scope.cancel()
            raise LinkLost(self._lost) from error
        except ProtocolError as error:
            raise LinkLost(f"no further stream: {error}") from error
        stream = MuxStream(slot, self, stream_id)
        self._streams[stream_id] = stream
        self._flush()
        return stream

    def set_paused(self, paused: bool) -> None:
        """Sets whether the guest is paused; it may then read no input for any time."""
        self._paused = paused
        self._stall.deadline = math.inf if paused else trio.current_time() + STALL_S

    # Finding each other

    async def _resync(self) -> bytes:
        """Requests a new start of HTTP/2 from the guest, until it answers; returns the bytes after the answer."""
        request = bytes(RESYNC_ZEROS) + RESYNC_MAGIC + self._nonce
        hello = RESYNC_MAGIC + _NO_NONCE
        await self._stream.send_all(request)
        seen = b""
        while True:
            data = await self._stream.receive_some(_READ)
            if not data:
                raise LinkLost("the hypervisor closed the connection")
            self.bytes_in += len(data)
            seen += data
            before, found, rest = seen.partition(self._nonce)
            if found:
                return rest
            _, found, rest = before.rpartition(hello)
            if found:
                # An agent that has just started may not have seen the request.
                seen = rest
                await self._stream.send_all(request)
            seen = seen[-len(hello) + 1 :]

    # The two directions

    async def _read(self, data: bytes) -> None:
        counter = FrameCounter()
        budget = frame_budget()
        while True:
            self._is_feeding = bool(data)
            while data:
                size, _, price = counter.take(data, _FRAMES_PER_TURN)
                self._feed(data[:size])
                data = data[size:]
                while len(self._out) > OUTPUT_LIMIT:
                    await self._out_room.park()
                wait = budget.spend(price, trio.current_time())
                if wait or data:
                    await trio.sleep(wait)
            self._is_feeding = False
            data = bytes(await self._stream.receive_some(_READ))
            if not data:
                raise LinkLost("the hypervisor closed the connection")
            self.bytes_in += len(data)

    def _feed(self, data: bytes) -> None:
        try:
            for event in self._conn.receive_data(data):
                self._on_event(event)
        except ProtocolError as error:
            raise LinkLost(f"the guest broke HTTP/2: {str(error)[:WHY_CHARACTERS]}") from error
        except LinkLost:
            raise
        except Exception as error:
            # h2 and hpack raise more than their own errors. They must end this link only.
            why = f"{type(error).__name__}: {error}"
            raise LinkLost(f"the guest broke HTTP/2: {why[:WHY_CHARACTERS]}") from error
        self._flush()

    async def _write(self) -> None:
        while True:
            if not self._out:
                self._out_filled = trio.Event()
                await self._out_filled.wait()
            chunk, self._out = self._out, bytearray()
            self._is_sending = True
            # In pieces, each with a deadline, so that a slow guest does not count as one that takes nothing.
            for start in range(0, len(chunk), FRAME_LIMIT):
                piece = chunk[start : start + FRAME_LIMIT]
                with trio.CancelScope() as self._stall:
                    self.set_paused(self._paused)
                    await self._stream.send_all(piece)
                if self._stall.cancelled_caught:
                    raise trio.TooSlowError
                self.bytes_out += len(piece)
            self._is_sending = False
            self._out_room.unpark_all()

    def _flush(self) -> None:
        data = self._conn.data_to_send()
        if data:
            self._out += data
            self._out_filled.set()

    # Input from the guest

    def _on_event(self, event: Event) -> None:
        match event:
            case DataReceived():
                stream = self._streams.get(event.stream_id)
                size, data = event.flow_controlled_length, event.data
                if stream is None:
                    self._conn.acknowledge_received_data(size, event.stream_id)
                    return
                if size > len(data):
                    self._conn.acknowledge_received_data(size - len(data), event.stream_id)
                stream.held += data
                stream.wake_receiver()
            case WindowUpdated() if event.stream_id:
                if (stream := self._streams.get(event.stream_id)) is not None:
                    stream.wake_sender()
            case WindowUpdated() | RemoteSettingsChanged():
                if len(self._conn.remote_settings) > MAX_SETTINGS:
                    # h2 keeps unknown settings, and walks through all of them for every frame of settings.
                    raise LinkLost(f"the guest sent {len(self._conn.remote_settings)} different settings")
                for stream in self._streams.values():
                    stream.wake_sender()
            case ResponseReceived():
                stream = self._streams.get(event.stream_id)
                status = dict(event.headers).get(b":status", b"")
                if stream is not None and status != b"200":
                    stream.fail(f"the guest refused the stream with {status.decode('ascii', 'replace')[:3]}")
            case StreamEnded():
                if (stream := self._streams.get(event.stream_id)) is not None:
                    stream.end_input()
                    self._forget_if_over(stream)
            case StreamReset():
                stream = self._streams.pop(event.stream_id, None)
                if stream is not None:
                    stream.reset(event.error_code)
            case ConnectionTerminated():
                raise LinkLost(f"the guest ended the link with code {event.error_code}")
            case _:
                pass

    def _forget_if_over(self, stream: MuxStream) -> None:
        if stream.input_over and stream.output_over:
            self._streams.pop(stream.stream_id, None)
            stream.finish()

    def _lose(self, why: str) -> None:
        if self._lost is not None or self.is_parked:
            return
        self._lost = why
        for stream in self._streams.values():
            stream.fail(why)
        self._streams.clear()
        self._out.clear()
        self._out_room.unpark_all()

    # For the streams

    async def send(self, stream: MuxStream, data: Bytes) -> None:
        """Queues all of `data`, as the guest's windows and the link's output allow."""
        view = memoryview(data).cast("B")
        while view:
            stream.check_sendable()
            room = self._conn.local_flow_control_window(stream.stream_id)
            if room <= 0:
                await stream.wait_window()
                continue
            if len(self._out) >= OUTPUT_HIGH:
                await self._out_room.park()
                continue
            count = min(room, FRAME_LIMIT, len(view))
            self._conn.send_data(stream.stream_id, bytes(view[:count]))
            self._flush()
            view = view[count:]

    def send_eof(self, stream: MuxStream) -> None:
        self._conn.end_stream(stream.stream_id)
        self._flush()
        stream.output_over = True
        self._forget_if_over(stream)

    def acknowledge(self, stream: MuxStream, count: int) -> None:
        """Lets the guest send `count` more bytes, as this number has left the stream's buffer."""
        if self._lost is None:
            self._conn.acknowledge_received_data(count, stream.stream_id)
            self._flush()

    def abandon(self, stream: MuxStream) -> None:
        """Resets a stream that its user has closed, unless it is over."""
        if self._streams.pop(stream.stream_id, None) is not None:
            self._conn.reset_stream(stream.stream_id, ErrorCodes.CANCEL)
            self._flush()


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
