"""A command that is talked to over WebSockets: one after the other, and perhaps nobody for a while.

One thread and one poll loop for each command, which own its process, its pipes or its terminal, what it has written,
and the connection of whoever is attached. A client's own thread only hands its connection over and waits until it is
given back. So no two threads ever touch the same descriptor, and attaching, taking over and ending are each one step
of one loop. A thread for each direction was rejected: who closes what, and when, is then a matter of luck.

**Output has positions.** A position counts the bytes of both channels since the start. What a detached command wrote
last is kept (`Output`), so a client that knows how many bytes it has got goes on exactly there, whatever was on its way
when its connection died; what is no longer kept is told as a gap, never left out in silence.

**Back-pressure.** While somebody is attached, the command is read only as far as they take it, and they are read only
as far as the command takes its input. With nobody attached a detached command runs on and the oldest output goes.

**Who attaches takes over.** Mostly the connection before is dead and nobody has noticed yet, and refusing would lock
its owner out until the kernel does. The one before is told (close code 4000).
"""

# ruff: noqa: PTH123, PTH208 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque

from . import _websocket
from ._exec import has_exited, how_it_ended, kill_group, spawn
from ._http import Gone
from ._watch import Bell

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from ._exec import Command
    from ._websocket import WebSocket

STDIN, STDOUT, STDERR = 0, 1, 2
KEPT_BYTES = 512 * 1024
"""How much output of a detached command is kept, each piece counted with `_PIECE_COST` besides."""
MAX_MESSAGE = 1024 * 1024
"""The longest message of a client, and how much input that the command does not take is read ahead."""

_PIECE_COST = 64
_PIECE = 16 * 1024
_READ = 64 * 1024
_UNSENT = 256 * 1024
_MAX_PIPE = 1024 * 1024
_STALL_S = 600.0
_HANG_UP_MS = 1000
_REAP_S = 5.0
_POLLRDHUP = 0x2000


class Output:
    """What a command has written, in order: at least what `release` was not told of, and the last `keep` bytes."""

    def __init__(self, keep: int) -> None:
        self.position = 0
        """How many bytes were written in all."""
        self.ends: dict[int, int] = {}
        """At which position a channel has ended."""
        self._keep = keep
        self._held = 0
        self._pieces: deque[tuple[int, int, bytearray]] = deque()

    @property
    def oldest(self) -> int:
        """The position of the first byte that is kept."""
        return self._pieces[0][0] if self._pieces else self.position

    def add(self, channel: int, data: bytes) -> None:
        """Take what was read from a channel."""
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
        """Forget what lies before `position`, as far as it needn't be kept."""
        while self._held > self._keep and self._pieces:
            begin, _, data = self._pieces[0]
            if begin + len(data) > position:
                break
            self._held -= len(data) + _PIECE_COST
            self._pieces.popleft()

    def after(self, position: int, limit: int) -> list[tuple[int, bytes]]:
        """Return channels and bytes from `position` on, about `limit` bytes of them."""
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
    """A client that is attached, or wants to be."""

    def __init__(self, socket: WebSocket, position: int | None) -> None:
        """`position`: how many bytes of output it has; None: it wants all that there is."""
        self.socket = socket
        self.cursor = -1 if position is None else position
        self.ends: set[int] = set()
        self.said_hello = False
        self.said_end = False
        self.took = time.monotonic()
        self.released = threading.Event()
        """Set when nobody touches its connection any more."""


class Session:
    """A command. `run` is its loop."""

    def __init__(self, command: Command, identifier: str | None) -> None:
        """Start it. With an `identifier` it is a detached one.

        :raises SpawnError: it does not start (`_exec`)
        """
        self.identifier = identifier
        self.command = command
        self.started = time.monotonic()
        self.ended: float | None = None
        self.end: dict[str, Any] | None = None
        """How it ended."""
        self._ended = threading.Event()
        self._keep = KEPT_BYTES if identifier is not None else 0
        self.output = Output(self._keep)
        self._deadline = None if command.timeout_s is None else self.started + command.timeout_s
        # Guards the three that other threads write or ask for.
        self._lock = threading.Lock()
        self._next: Peer | None = None
        self._over = False
        self._killed = False
        self._peer: Peer | None = None
        self._input = bytearray(command.stdin)
        self._input_ends = False
        self._in_a_line = False
        self._outputs: dict[int, int] = {}
        self._timed_out = False
        self._start()
        self._pidfd = os.pidfd_open(self.pid)
        self._bell = Bell()

    def _start(self) -> None:
        import subprocess

        command = self.command
        arguments = (command.command, command.env, command.cwd, command.user)
        if command.tty:
            from ._tty import open_terminal

            self._terminal, theirs = open_terminal(command.rows, command.cols)
            try:
                self._process = spawn(*arguments, theirs, theirs, theirs, terminal=True)
            except BaseException:
                os.close(self._terminal)
                raise
            finally:
                os.close(theirs)
            self._input_fd = self._terminal
            self._outputs[self._terminal] = STDOUT
        else:
            self._terminal = -1
            self._process = spawn(*arguments, subprocess.PIPE, subprocess.PIPE, subprocess.PIPE)
            pipes = (self._process.stdin, self._process.stdout, self._process.stderr)
            self._input_fd, stdout, stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
            self._outputs |= {stdout: STDOUT, stderr: STDERR}
            for fd in (self._input_fd, *self._outputs):
                os.set_blocking(fd, False)

    @property
    def pid(self) -> int:
        """The process; its number counts only while the command runs."""
        return self._process.pid

    # For other threads

    @property
    def attached(self) -> bool:
        """Whether somebody is."""
        return self._peer is not None

    def attach(self, peer: Peer) -> None:
        """Hand over a connection, and return when it is given back."""
        with self._lock:
            over = self._over
            before = None
            if not over:
                before, self._next = self._next, peer
                self._bell.ring()
        if before is not None:
            before.socket.close(_websocket.REPLACED, "somebody else has attached")
            before.released.set()
        if over:
            self._replay(peer)
        else:
            peer.released.wait()

    def ended_within(self, timeout_s: float) -> bool:
        """Wait for the command's end, whoever is attached; return whether it came."""
        return self._ended.wait(timeout_s)

    def kill(self) -> None:
        """Begin to kill the command and all of its session."""
        with self._lock:
            if self._over:
                return
            self._killed = True
            self._bell.ring()

    # The loop

    def run(self, peer: Peer | None = None) -> None:
        """Until the command has ended and whoever is attached has been told. Once nobody is, a command that is not
        detached is ended."""
        self._next = peer
        try:
            while self.end is None:
                self._take_over()
                if self._peer is None and self.identifier is None:
                    self._hang_up()
                else:
                    self._turn()
            while not self._is_over():
                self._tell_end()
        finally:
            self._give_back()

    def _is_over(self) -> bool:
        with self._lock:
            self._over = self._peer is None and self._next is None
            return self._over

    def _turn(self) -> None:
        """Wait once, and do what can be done."""
        now = time.monotonic()
        if self._killed or (self._deadline is not None and now >= self._deadline and not self._timed_out):
            self._timed_out = not self._killed
            kill_session(self._process)
            self._killed = False
        wait_s = None if self._deadline is None or self._timed_out else self._deadline - now
        found = self._poll(wait_s)
        if self._bell.fd in found:
            self._bell.quiet()
        self._serve_peer(found)
        self._feed(found)
        for fd in list(self._outputs):
            if fd in found:
                self._read(fd)
        if self._pidfd in found:
            # All that it had written is in the pipes by now.
            for fd in list(self._outputs):
                for _ in range(_MAX_PIPE // _READ):
                    if not self._read(fd):
                        break
            self._end_all_outputs()
            self._conclude()
        self._fill()

    def _poll(self, wait_s: float | None) -> dict[int, int]:
        poll = select.poll()
        poll.register(self._bell.fd, select.POLLIN)
        masks: dict[int, int] = {}
        if self.end is None:
            masks[self._pidfd] = select.POLLIN
            if self._peer is None or self.output.position - self._peer.cursor < _UNSENT:
                masks.update(dict.fromkeys(self._outputs, select.POLLIN))
            if self._input and self._input_fd >= 0:
                masks[self._input_fd] = masks.get(self._input_fd, 0) | select.POLLOUT
        peer = self._peer
        if peer is not None:
            if self._reads_peer(peer) and peer.socket.has_early:
                wait_s = 0.0
            mask = select.POLLIN if self._reads_peer(peer) else _POLLRDHUP
            masks[peer.socket.sock.fileno()] = mask | (select.POLLOUT if peer.socket.out else 0)
        for fd, mask in masks.items():
            poll.register(fd, mask)
        return dict(poll.poll(None if wait_s is None else max(0, int(wait_s * 1000 + 0.999))))

    def _reads_peer(self, peer: Peer) -> bool:
        return len(self._input) < MAX_MESSAGE and len(peer.socket.out) < _UNSENT

    # Whoever is attached

    def _take_over(self) -> None:
        with self._lock:
            peer, self._next = self._next, None
        if peer is None:
            return
        if self._peer is not None:
            self._peer.socket.close(_websocket.REPLACED, "somebody else has attached")
            try:
                self._peer.socket.flush()
            except Gone:
                pass
            self._leave()
        self._peer = peer
        self._fill()

    def _leave(self) -> None:
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
            if peer.socket.flush():
                peer.took = time.monotonic()
            if reads and (events & ~select.POLLOUT or peer.socket.has_early):
                for message in peer.socket.receive():
                    self._hear(peer, message)
            elif events & ~(select.POLLOUT | select.POLLIN):
                raise Gone
            if peer.socket.closing:
                # What answers the client's closing frame, or says why it is closed on; it need not be read.
                peer.socket.flush()
                self._leave()
        except Gone:
            self._leave()

    def _hear(self, peer: Peer, message: str | bytes) -> None:
        """Take a client's message; one that is none closes on it."""
        if peer.socket.closing or self.end is not None:
            return
        try:
            if isinstance(message, str):
                self._obey(message)
                return
            if message[:1] != b"\0":
                raise ValueError("a client's binary message begins with the channel 0")
            if self._input_ends:
                raise ValueError("the channel 0 has been ended")
            if self._input_fd < 0:
                return
            if len(message) == 1 and self._terminal >= 0:
                from ._tty import end_of_input

                self._input += end_of_input(self._terminal, in_a_line=self._in_a_line)
            elif len(message) == 1:
                self._input_ends = True
            else:
                self._input += message[1:]
                self._in_a_line = message[-1:] not in (b"\n", b"\r")
        except ValueError as error:
            peer.socket.close(_websocket.POLICY, str(error))

    def _obey(self, text: str) -> None:
        """:raises ValueError: this is no order."""
        import json

        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("a text message is no JSON") from None
        match value:
            case {"resize": [int(rows), int(cols)]} if len(value) == 1 and _is_size(rows) and _is_size(cols):
                if self._terminal < 0:
                    raise ValueError("there is no terminal to resize")
                from ._tty import resize

                resize(self._terminal, rows, cols)
            case {"signal": int(number)} if len(value) == 1 and 0 < number <= 64 and number is not True:
                # Its leader has not been reaped, so the group is still its own.
                try:
                    os.killpg(self.pid, number)
                except OSError:
                    pass
            case _:
                raise ValueError('a text message is {"resize":[rows,cols]} or {"signal":n}')

    def _fill(self) -> None:
        """Put output into the buffer of whoever is attached, as much as may lie there."""
        peer = self._peer
        if peer is None:
            self.output.release(self.output.position)
            return
        self._fill_for(peer)
        self.output.release(peer.cursor)

    def _fill_for(self, peer: Peer) -> None:
        import json

        socket, output = peer.socket, self.output
        if not peer.said_hello:
            peer.said_hello = True
            wanted = max(peer.cursor, 0)
            peer.cursor = min(max(wanted, output.oldest), output.position)
            if self.identifier is not None:
                hello = {"id": self.identifier, "tty": self.command.tty, "position": peer.cursor}
                socket.send(json.dumps(hello))
                if peer.cursor > wanted:
                    socket.send(json.dumps({"gap": {"from": wanted, "to": peer.cursor - 1}}))
        if len(socket.out) < _UNSENT:
            for channel, data in output.after(peer.cursor, _UNSENT - len(socket.out)):
                socket.send(bytes((channel,)) + data)
                peer.cursor += len(data)
        for channel, position in output.ends.items():
            if peer.cursor >= position and channel not in peer.ends:
                peer.ends.add(channel)
                socket.send(bytes((channel,)))

    def _tell_end(self) -> None:
        """Bring whoever is attached closer to the end, and let them go when they have it, or take nothing."""
        self._take_over()
        peer = self._peer
        if peer is None:
            return
        self._fill_for(peer)
        self._say_end(peer)
        if peer.said_end and not peer.socket.out:
            self._leave()
            return
        left = peer.took + _STALL_S - time.monotonic()
        found = self._poll(max(left, 0.0))
        if self._bell.fd in found:
            self._bell.quiet()
        elif not found and left <= 0:
            self._leave()
            return
        try:
            if peer.socket.flush():
                peer.took = time.monotonic()
            if found.get(peer.socket.sock.fileno(), 0) & ~select.POLLOUT:
                peer.socket.receive()  # and drop it
            if peer.socket.closing and not peer.said_end:
                peer.socket.flush()
                self._leave()
        except Gone:
            self._leave()

    def _say_end(self, peer: Peer) -> None:
        import json

        if peer.cursor >= self.output.position and not peer.said_end:
            peer.said_end = True
            peer.socket.send(json.dumps(self.end))
            peer.socket.close(_websocket.NORMAL)

    def _replay(self, peer: Peer) -> None:
        """What a command that is over has left, in the client's own thread. Nothing changes any more."""
        end = time.monotonic() + _STALL_S
        try:
            while not peer.said_end or peer.socket.out:
                self._fill_for(peer)
                self._say_end(peer)
                poll = select.poll()
                poll.register(peer.socket.sock, select.POLLIN | select.POLLOUT)
                if not poll.poll(max(0, int((end - time.monotonic()) * 1000))):
                    return
                if peer.socket.flush():
                    end = time.monotonic() + _STALL_S
                peer.socket.receive()
                if peer.socket.closing and not peer.said_end:
                    return
        except Gone:
            return

    # The command

    def _read(self, fd: int) -> bool:
        """Take what one read gives; return whether it gave anything."""
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""  # A terminal that nobody has open any more.
        if data:
            self.output.add(self._outputs[fd], data)
            return True
        self.output.ends[self._outputs.pop(fd)] = self.output.position
        return False

    def _end_all_outputs(self) -> None:
        for channel in self._outputs.values():
            self.output.ends.setdefault(channel, self.output.position)
        self._outputs.clear()

    def _feed(self, found: dict[int, int]) -> None:
        """Give the command its input, as much as it takes."""
        fd = self._input_fd
        if fd < 0:
            return
        try:
            if self._input and found.get(fd, 0) & (select.POLLOUT | select.POLLERR):
                del self._input[: os.write(fd, self._input[:_READ])]
        except BlockingIOError:
            return
        except OSError:
            self._input.clear()
            self._close_input()
        if self._input_ends and not self._input:
            self._close_input()

    def _close_input(self) -> None:
        if self._process.stdin is not None and self._input_fd >= 0:
            self._process.stdin.close()
            self._input_fd = -1

    def _hang_up(self) -> None:
        """The client of a command that is not detached has left: end all of it."""
        try:
            os.killpg(self.pid, signal.SIGHUP)
            os.killpg(self.pid, signal.SIGCONT)
        except OSError:
            pass
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll(_HANG_UP_MS)
        kill_session(self._process)
        poll.poll(int(_REAP_S * 1000))
        self._conclude()

    def _conclude(self) -> None:
        import subprocess

        try:
            end: dict[str, Any] = how_it_ended(self._process.wait(_REAP_S))
        except subprocess.TimeoutExpired:
            end = {"error": "the command was killed, and does not end", "code": "agent_error"}
        if self._timed_out:
            text = f"the command was killed, as it had not ended after {self.command.timeout_s:g} s"
            end = {"error": text, "code": "timeout"}
        self.ended = time.monotonic()
        self.end = end
        self._input.clear()
        self._ended.set()

    def _give_back(self) -> None:
        """Give everything back, whatever has happened."""
        with self._lock:
            self._over = True
            late, self._next = self._next, None
        try:
            if self._process.returncode is None:
                if not has_exited(self._process):
                    kill_session(self._process)
                self._conclude()
        finally:
            if self.end is None:
                self.end = {"error": "the agent has a bug", "code": "agent_error"}
                self.ended = time.monotonic()
                self._ended.set()
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                if pipe is not None:
                    pipe.close()
            if self._terminal >= 0:
                os.close(self._terminal)
            os.close(self._pidfd)
            self._bell.close()
            self._leave()
            if late is not None:
                late.released.set()


def _is_size(number: int) -> bool:
    return number is not True and 0 < number < 65536


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to all processes of the session that `process` leads, which has not been reaped.

    A shell with job control gives each job a group of its own. What made a session of its own is let go.
    """
    kill_group(process)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            # Read after the descriptor is open, so that it is this process and no later one with its number.
            with open(f"/proc/{name}/stat", "rb") as handle:
                if int(handle.read(4096).rpartition(b")")[2].split()[3]) == process.pid:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            pass
        finally:
            os.close(pidfd)
