"""A command over WebSockets. Clients attach one after the other; a detached command continues without any.

One thread and one poll loop per command own its process, its output and the connection of the attached client. The
client's own thread only hands over its connection and waits until it is released. So no two threads use the same
descriptor, and attaching, taking over and ending are each one step of one loop. Rejected: a thread for each direction,
where closing depends on which one notices first.

**Positions.** The last output of a detached command is stored (`OutputHistory`). A client that sends its position
continues exactly there. Expired output is reported as a gap.

**Back-pressure.** While a client is attached, the command's output is read only as fast as the client accepts it, and
the client's input only as fast as the command reads it. Without a client, a detached command continues and loses its
oldest output.

**A second client takes over** (close code 4000 to the first). Usually the first connection is dead and undetected; a
refusal would lock out its owner until the kernel detects that.
"""

from __future__ import annotations

import select
import threading
import time

from . import _websocket
from ._exec_program import MAX_UNSENT, STALL_S, STDIN, Command, OutputHistory, Program
from ._http import Gone
from ._watch import POLLRDHUP, Wakeup, poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

    from ._output import Output
    from ._websocket import WebSocket

KEPT_BYTES = 512 * 1024
"""Maximum stored output of a detached command."""


class Session:
    """A command and its attached client. `run` is its loop."""

    def __init__(
        self,
        command: Command,
        identifier: str | None,
        *,
        log: Output | None = None,
        reap: Callable[[Program], dict[str, Any]] = Program.reap,
    ) -> None:
        """Starts the command.

        :param identifier: the id of a detached command; None for one that ends with its client
        :param log: also receives the output; the session then continues until its client has read the command's end
        :param reap: waits for the process, which has ended or was killed, and returns its end
        :raises SpawnError: the command does not start
        """
        self.identifier = identifier
        self.command = command
        self.started = time.monotonic()
        self.ended: float | None = None
        self.end: dict[str, Any] | None = None
        """The end of the command."""
        self.output = OutputHistory(KEPT_BYTES if identifier is not None else 0, None if log is None else log.write)
        self._lingers = log is not None
        self._reap = reap
        self._deadline = None if command.timeout_s is None else self.started + command.timeout_s
        self._timed_out = False
        self._peer: Peer | None = None
        # The lock guards these three, which other threads use.
        self._lock = threading.Lock()
        self._next: Peer | None = None
        self._over = False
        self._killed = False
        self._ended = threading.Event()
        self._program = Program(command, self.output)
        self._wakeup = Wakeup()

    @property
    def pid(self) -> int:
        """The process id, which is valid while the command runs."""
        return self._program.pid

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process."""
        return self._program.process

    # For other threads

    @property
    def attached(self) -> bool:
        """Whether a client is attached."""
        return self._peer is not None

    def attach(self, peer: Peer) -> None:
        """Hands over a client's connection, and returns when the session has released it."""
        with self._lock:
            over = self._over
            before = None
            if not over:
                before, self._next = self._next, peer
                self._wakeup.wake()
        if before is not None:
            before.socket.close(_websocket.REPLACED, "another client has attached")
            before.released.set()
        if over:
            peer.replay(self.output, self._hello(), self.end)
        else:
            peer.released.wait()

    def ended_within(self, timeout_s: float) -> bool:
        """Waits for the end of the command; returns whether it has ended."""
        return self._ended.wait(timeout_s)

    def kill(self) -> None:
        """Makes the loop kill the command and all of its session."""
        with self._lock:
            if self._over:
                return
            self._killed = True
            self._wakeup.wake()

    # The loop

    def run(self, peer: Peer | None = None) -> None:
        """Runs until the command has ended and the attached client has been notified. A command that is not detached is
        ended when its client disconnects.

        :param peer: the client of a command that is not detached
        """
        # A detached command's client may have attached before its thread got here.
        if peer is not None:
            self._next = peer
        try:
            while self.end is None:
                self._take_over()
                if self._peer is None and self.identifier is None:
                    self._program.hang_up()
                    self._conclude()
                else:
                    self._step()
            while not self._is_over():
                self._report_end()
        finally:
            self._close()

    def _is_over(self) -> bool:
        with self._lock:
            self._over = self._peer is None and self._next is None
            return self._over

    def _step(self) -> None:
        """Waits once, and moves input and output."""
        now = time.monotonic()
        if self._killed or (self._deadline is not None and now >= self._deadline and not self._timed_out):
            self._timed_out = not self._killed
            self._program.kill()
            self._killed = False
        found = self._poll(None if self._deadline is None or self._timed_out else self._deadline - now)
        if self._wakeup.fd in found:
            self._wakeup.clear()
        self._serve_peer(found)
        self._program.move(found)
        if self._program.pidfd in found:
            # All of its output is in the pipes now.
            self._program.drain()
            self._conclude()
        self._send_output()

    def _poll(self, wait_s: float | None) -> dict[int, int]:
        peer = self._peer
        masks = {self._wakeup.fd: select.POLLIN}
        if self.end is None:
            masks |= self._program.masks(read=peer is None or self.output.position - peer.cursor < MAX_UNSENT)
        if peer is not None:
            reads = self._reads_peer(peer)
            if reads and peer.socket.has_early:
                wait_s = 0.0
            mask = select.POLLIN if reads else POLLRDHUP
            masks[peer.socket.sock.fileno()] = mask | (select.POLLOUT if peer.socket.out else 0)
        return poll(masks, wait_s)

    def _reads_peer(self, peer: Peer) -> bool:
        return self._program.takes_input and len(peer.socket.out) < MAX_UNSENT

    # The attached client

    def _take_over(self) -> None:
        with self._lock:
            peer, self._next = self._next, None
        if peer is None:
            return
        if self._peer is not None:
            self._peer.socket.close(_websocket.REPLACED, "another client has attached")
            try:
                self._peer.socket.flush()
            except Gone:
                pass
            self._release_peer()
        self._peer = peer
        self._send_output()

    def _release_peer(self) -> None:
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.released.set()

    def _serve_peer(self, found: dict[int, int]) -> None:
        peer = self._peer
        if peer is None:
            return
        events = found.get(peer.socket.sock.fileno(), 0)
        reads = self._reads_peer(peer)
        try:
            peer.flush()
            if reads and (events & ~select.POLLOUT or peer.socket.has_early):
                for message in peer.socket.receive():
                    self._handle_message(peer, message)
            elif events & ~(select.POLLOUT | select.POLLIN):
                raise Gone
            if peer.socket.closing:
                # Sends our closing frame, if the client still reads.
                peer.socket.flush()
                self._release_peer()
        except Gone:
            self._release_peer()

    def _handle_message(self, peer: Peer, message: str | bytes) -> None:
        """Handles a client's message; a malformed one closes the connection."""
        if peer.socket.closing or self.end is not None:
            return
        try:
            if isinstance(message, str):
                self._handle_control(message)
            elif message[:1] == bytes((STDIN,)):
                self._program.add_input(message[1:])
            else:
                raise ValueError("a client's binary message begins with the channel 0")
        except ValueError as error:
            peer.socket.close(_websocket.POLICY, str(error))

    def _handle_control(self, text: str) -> None:
        """Handles a control message. :raises ValueError: the text is neither a resize nor a signal."""
        import json

        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("a text message is not JSON") from None
        match value:
            case {"resize": [int(rows), int(cols)]} if len(value) == 1 and _is_size(rows) and _is_size(cols):
                self._program.resize(rows, cols)
            case {"signal": int(number)} if len(value) == 1 and 0 < number <= 64 and number is not True:
                self._program.send_signal(number)
            case _:
                raise ValueError('a text message is {"resize":[rows,cols]} or {"signal":n}')

    def _hello(self) -> dict[str, Any] | None:
        return None if self.identifier is None else {"id": self.identifier, "tty": self.command.tty}

    def _send_output(self) -> None:
        """Puts output into the attached client's buffer, and drops output that is no longer needed."""
        peer = self._peer
        if peer is not None:
            peer.send_output(self.output, self._hello())
        self.output.release(self.output.position if peer is None else peer.cursor)

    def _report_end(self) -> None:
        """Sends the rest and the command's end to the attached client, and releases the client when it has received
        that, or stalls."""
        self._take_over()
        peer = self._peer
        if peer is None:
            return
        peer.send_output(self.output, self._hello())
        peer.send_end(self.output, self.end)
        if peer.sent_end and not peer.socket.out and (peer.socket.closed or not self._lingers):
            self._release_peer()
            return
        left_s = peer.stalls_in_s
        found = self._poll(left_s)
        if self._wakeup.fd in found:
            self._wakeup.clear()
        elif not found and left_s <= 0:
            self._release_peer()
            return
        try:
            peer.flush()
            if found.get(peer.socket.sock.fileno(), 0) & ~select.POLLOUT or peer.socket.has_early:
                peer.socket.receive()  # and drop it
            if peer.socket.closing and not peer.sent_end:
                peer.socket.flush()
                self._release_peer()
        except Gone:
            self._release_peer()

    # The end

    def _conclude(self) -> None:
        """Reaps the process and records its end."""
        end = self._reap(self._program)
        self._record_end(self.command.timed_out() if self._timed_out else end)

    def _record_end(self, end: dict[str, Any]) -> None:
        self.ended = time.monotonic()
        self.end = end
        self._ended.set()

    def _close(self) -> None:
        """Releases everything, also after an exception in the loop."""
        with self._lock:
            self._over = True
            late, self._next = self._next, None
        try:
            if not self._program.is_reaped:
                if not self._program.has_exited:
                    self._program.kill()
                self._conclude()
        finally:
            if self.end is None:
                self._record_end({"error": "the agent has a bug", "code": "agent_error"})
            self._program.close()
            self._wakeup.close()
            self._release_peer()
            if late is not None:
                late.released.set()


def _is_size(number: int) -> bool:
    return number is not True and 0 < number < 65536


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
