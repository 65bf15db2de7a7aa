"""The serial console of one boot: many readers, one keyboard.

The hypervisor appends the console to a file (`_console.py` says why), which the pump reads once. The pump hands each
piece to `feed`, which puts it into a ring that exists while there are readers. So readers cost the disk nothing, a slow
one delays nobody, and it learns how many bytes it has missed. A reader first gets the last lines of the VM's log and
the unfinished line, such as a prompt.

Input goes into the hypervisor's named pipe, up to 64 KiB ahead of the guest. There is one keyboard at a time, as two
people who type at once would each get half a line of the other's. A guest that does not read its console fills the
pipe, and then only the keyboard waits, with a deadline.

The same bytes are served at a Unix socket, for `socat`, `minicom` and scripts that know serial ports and no
WebSockets. It carries nothing but the bytes: where a WebSocket gets a reason, a connection here just ends.

Rejected: a socket of the hypervisor's own. It loses lines without a reader, stops the guest when a reader is slow, and
takes one client.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import msgspec
import trio

from actors import Cursor, Gap, Log
from volant.host import Host

from ._console import ConsolePump

TYPE_S = 10.0
"""The deadline for a guest to read its input, once the pipe is full."""
_RING_BYTES = 256 * 1024
_RING_FRAMES = 4096
_TAKE_BYTES = 64 * 1024
_CONNECTIONS = 8
_SOCKET_LINES = 25
_SOCKET_PIECE = 4096
_SOCKET_SEND_S = 60.0
_SOCKET_LINGER_S = 5.0

_logger = logging.getLogger("volant.vm")


class KeyboardTaken(Exception):
    """Another client has the keyboard."""


class NotTyped(Exception):
    """The guest, or its hypervisor, does not accept the input. The text is for people."""


class Missed(msgspec.Struct, frozen=True):
    """A reader was too slow, and missed this number of bytes."""

    bytes: int


class SerialConsole(msgspec.Struct, eq=False):
    """The console of one boot in one incarnation of its VM's actor."""

    _host: Host
    _input_path: Path
    _socket_path: Path
    _pump: ConsolePump | None = None
    _ring: Log | None = None
    _readers: int = 0
    _fed: int = 0
    _keyboard: Keyboard | None = None
    _connections: int = 0

    @property
    def is_open(self) -> bool:
        """Whether a pump feeds it."""
        return self._pump is not None

    def inspect(self) -> dict[str, object]:
        """Returns figures, ready for JSON."""
        return {
            "readers": self._readers,
            "keyboard": self._keyboard is not None,
            "socket": str(self._socket_path),
            "socket_connections": self._connections,
        }

    # From the guest

    def feed(self, data: bytes) -> None:
        """Takes a piece of the guest's output from the pump."""
        self._fed += len(data)
        if self._ring is not None:
            self._ring.append(data)

    @contextmanager
    def fed_by(self, pump: ConsolePump) -> Iterator[None]:
        """Opens the console for a block. The end of the block is the end for all readers."""
        self._pump = pump
        try:
            yield
        finally:
            self._pump = None
            if self._ring is not None:
                self._ring.close()

    @asynccontextmanager
    async def reader(self, lines: int) -> AsyncIterator[Reader]:
        """Returns a reader of the guest's output, from the last `lines` on."""
        if self._ring is None:
            self._ring = Log(max_frames=_RING_FRAMES, max_bytes=_RING_BYTES)
            if self._pump is None:
                self._ring.close()
        ring = self._ring
        recent = self._pump.recent(lines) if self._pump is not None else b""
        self._readers += 1
        try:
            async with ring.cursor(after=ring.newest) as cursor:
                yield Reader(self, ring, cursor, recent, self._fed)
        finally:
            self._readers -= 1
            if not self._readers:
                self._ring = None

    # To the guest

    @contextmanager
    def keyboard(self, *, take: bool = False) -> Iterator[Keyboard]:
        """Gives the keyboard to the caller for a block. With `take`, another client with the keyboard loses it. :raises
        KeyboardTaken: another client has it."""
        if self._keyboard is not None:
            if not take:
                raise KeyboardTaken
            self._keyboard.lost.set()
        mine = self._keyboard = Keyboard(self._host, self._input_path)
        try:
            yield mine
        finally:
            mine.release()
            if self._keyboard is mine:
                self._keyboard = None

    # The Unix socket

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves the Unix socket until cancelled. If that fails, the VM runs without it."""
        try:
            listener = self._host.sockets.listen_unix(self._socket_path)
        except OSError as error:
            _logger.warning("the serial console can't be served at %s: %s", self._socket_path, error)
            return
        finally:
            task_status.started()
        try:
            await trio.serve_listeners(self._connection, [listener])
        finally:
            listener.socket.close()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _SOCKET_LINGER_S):
                await self._host.files.remove(self._socket_path)

    async def _connection(self, stream: trio.SocketStream) -> None:
        try:
            async with stream:
                if self._connections < _CONNECTIONS:
                    self._connections += 1
                    try:
                        await self._converse(stream)
                    finally:
                        self._connections -= 1
        except* (trio.BrokenResourceError, trio.ClosedResourceError, KeyboardTaken, NotTyped):
            pass

    async def _converse(self, stream: trio.SocketStream) -> None:
        async with self.reader(_SOCKET_LINES) as reader, trio.open_nursery() as nursery:
            nursery.start_soon(self._type, stream, nursery.cancel_scope)
            while isinstance(data := await reader.take(), bytes):
                with trio.move_on_after(_SOCKET_SEND_S) as sending:
                    await stream.send_all(data)
                if sending.cancelled_caught:
                    break
            nursery.cancel_scope.cancel()

    async def _type(self, stream: trio.SocketStream, connection: trio.CancelScope) -> None:
        """Types the client's input; the first byte takes the keyboard.

        After the client's end, the connection stays open briefly, as the client may have closed only its direction.
        """
        data = await stream.receive_some(_SOCKET_PIECE)
        if data:
            with self.keyboard() as keyboard:
                while data:
                    await keyboard.type(data)
                    data = await stream.receive_some(_SOCKET_PIECE)
        connection.deadline = trio.current_time() + _SOCKET_LINGER_S


class Reader:
    """A reader of a console; see `SerialConsole.reader`."""

    def __init__(self, console: SerialConsole, ring: Log, cursor: Cursor, recent: bytes, position: int) -> None:
        self._console = console
        self._ring = ring
        self._cursor = cursor
        self._recent = recent
        self._position = position

    async def take(self) -> bytes | Missed | None:
        """Returns the output since the last call, or the size of the lost part; None at the end. A cancelled call takes
        nothing."""
        if self._recent:
            await trio.lowlevel.checkpoint()
            recent, self._recent = self._recent, b""
            return recent
        taken = await self._cursor.take(_TAKE_BYTES)
        if isinstance(taken, Gap):
            oldest = self._console._fed - self._ring.statistics().bytes
            missed, self._position = oldest - self._position, oldest
            return Missed(missed)
        data = b"".join(frame for _, frame in taken)
        self._position += len(data)
        return data or None


class Keyboard:
    """The right to type; see `SerialConsole.keyboard`."""

    def __init__(self, host: Host, path: Path) -> None:
        self.lost = trio.Event()
        """Set when another client has taken it."""
        self._host = host
        self._path = path
        self._pipe: trio.lowlevel.FdStream | None = None

    async def type(self, data: bytes) -> None:
        """Sends `data` to the guest. One task at a time.

        :raises KeyboardTaken: another client has the keyboard by now.
        :raises NotTyped: the guest does not read, and may have taken a part; or the hypervisor is gone.
        """
        if self.lost.is_set():
            raise KeyboardTaken
        try:
            if self._pipe is None:
                self._pipe = self._host.files.open_fifo(self._path)
            with trio.fail_after(TYPE_S):
                await self._pipe.send_all(data)
        except trio.TooSlowError:
            raise NotTyped("the guest does not read its console") from None
        except (OSError, trio.BrokenResourceError) as error:
            raise NotTyped("the console takes no input any more") from error

    def release(self) -> None:
        """Closes the pipe."""
        if self._pipe is not None:
            self._pipe.close()
