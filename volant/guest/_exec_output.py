"""The output of a command: the stored part, and the progress of each WebSocket client."""

from __future__ import annotations

import select
import threading
import time
from collections import deque

from . import _websocket
from ._http import Gone
from ._watch import poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ._websocket import WebSocket

MAX_UNSENT = 256 * 1024
"""Maximum output in a client's buffer. While it is full, the command's output is not read."""
STALL_S = 600.0
"""How long a client may accept no output."""
_PIECE_COST = 64
"""The cost of a piece besides its bytes."""
_PIECE = 16 * 1024


class OutputHistory:
    """The output of a command in order: everything after `release`, and at least the last `keep` bytes.

    A position counts the bytes of both channels since the start.
    """

    def __init__(self, keep: int, also: Callable[[int, bytes], None] | None = None) -> None:
        """Creates it. `also` is called with all output too, channel by channel."""
        self._also = also
        self.position = 0
        """The total number of bytes so far."""
        self.ends: dict[int, int] = {}
        """The end position of each ended channel."""
        self._keep = keep
        self._held = 0
        self._pieces: deque[tuple[int, int, bytearray]] = deque()

    @property
    def oldest(self) -> int:
        """The position of the first stored byte."""
        return self._pieces[0][0] if self._pieces else self.position

    def add(self, channel: int, data: bytes) -> None:
        """Appends output of a channel."""
        if self._also is not None:
            self._also(channel, data)
        self.position += len(data)
        self._held += len(data)
        if self._pieces:
            _, last_channel, last = self._pieces[-1]
            if last_channel == channel and len(last) + len(data) <= _PIECE:
                last += data
                return
        self._pieces.append((self.position - len(data), channel, bytearray(data)))
        self._held += _PIECE_COST

    def release(self, position: int) -> None:
        """Drops output before `position`, except the last `keep` bytes."""
        while self._held > self._keep and self._pieces:
            begin, _, data = self._pieces[0]
            if begin + len(data) > position:
                break
            self._held -= len(data) + _PIECE_COST
            self._pieces.popleft()

    def take_all(self) -> list[tuple[int, bytes]]:
        """Returns channels and bytes of all stored output, and drops it."""
        pieces = [(channel, bytes(data)) for _, channel, data in self._pieces]
        self._pieces.clear()
        self._held = 0
        return pieces

    def after(self, position: int, limit: int) -> list[tuple[int, bytes]]:
        """Returns channels and bytes from `position` on, about `limit` bytes of them."""
        found: deque[tuple[int, int, bytearray]] = deque()
        for piece in reversed(self._pieces):
            if piece[0] + len(piece[2]) <= position:
                break
            found.appendleft(piece)
        out = []
        for begin, channel, data in found:
            if limit <= 0:
                break
            part = bytes(data[max(0, position - begin) :])
            limit -= len(part)
            out.append((channel, part))
        return out


class Peer:
    """A client that is or will be attached to a command."""

    def __init__(self, socket: WebSocket, position: int | None) -> None:
        """Creates it. `position` is the number of bytes of output that the client has; None to send all stored
        output."""
        self.socket = socket
        self.cursor = -1 if position is None else position
        self.sent_end = False
        self.released = threading.Event()
        """Set when the session has released the connection."""
        self._sent_hello = False
        self._sent_ends: set[int] = set()
        self._progress_at = time.monotonic()

    @property
    def stalls_in_s(self) -> float:
        """Returns the seconds until it has accepted nothing for too long."""
        return self._progress_at + STALL_S - time.monotonic()

    def flush(self) -> None:
        """Writes as much as the socket accepts. :raises Gone: the client has disconnected."""
        if self.socket.flush():
            self._progress_at = time.monotonic()

    def send_output(self, output: OutputHistory, hello: dict[str, Any] | None) -> None:
        """Puts output into the client's buffer, until that is full, preceded by `hello` the first time."""
        import json

        if not self._sent_hello:
            self._sent_hello = True
            wanted = max(self.cursor, 0)
            self.cursor = min(max(wanted, output.oldest), output.position)
            if hello is not None:
                self.socket.send(json.dumps(hello | {"position": self.cursor}))
                if self.cursor > wanted:
                    self.socket.send(json.dumps({"gap": {"from": wanted, "to": self.cursor - 1}}))
        if len(self.socket.out) < MAX_UNSENT:
            for channel, data in output.after(self.cursor, MAX_UNSENT - len(self.socket.out)):
                self.socket.send(bytes((channel,)) + data)
                self.cursor += len(data)
        for channel, position in output.ends.items():
            if self.cursor >= position and channel not in self._sent_ends:
                self._sent_ends.add(channel)
                self.socket.send(bytes((channel,)))

    def send_end(self, output: OutputHistory, end: dict[str, Any] | None) -> None:
        """Sends the command's end, once all of its output was sent, and closes the WebSocket."""
        import json

        if self.cursor >= output.position and not self.sent_end:
            self.sent_end = True
            self.socket.send(json.dumps(end))
            self.socket.close(_websocket.NORMAL)

    def replay(self, output: OutputHistory, hello: dict[str, Any] | None, end: dict[str, Any] | None) -> None:
        """Sends all stored output of an ended command, in the client's own thread."""
        self._progress_at = time.monotonic()
        try:
            while not self.sent_end or self.socket.out:
                self.send_output(output, hello)
                self.send_end(output, end)
                if not poll({self.socket.sock.fileno(): select.POLLIN | select.POLLOUT}, self.stalls_in_s):
                    return
                self.flush()
                self.socket.receive()
                if self.socket.closing and not self.sent_end:
                    return
        except Gone:
            return
