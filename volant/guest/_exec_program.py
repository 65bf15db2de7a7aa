"""A command and its process, with pipes or a terminal. Only `reap` blocks here."""

from __future__ import annotations

import os
import select
import signal
from collections import deque

from ._checks import (
    check_base64,
    check_directory,
    check_environment,
    check_flag,
    check_integer,
    check_number,
    check_strings,
    check_user,
)
from ._http import Problem
from ._process import Setting, has_exited, how_it_ended, kill_group, kill_session, signal_group, spawn
from ._watch import poll

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable
    from typing import Any

STDIN, STDOUT, STDERR = 0, 1, 2
MAX_INPUT = 1024 * 1024
"""Maximum input stored for a command that does not read it. Also the maximum length of a client's message."""
REAP_S = 5.0
"""How long a killed process may take to end."""
_READ = 64 * 1024
_MAX_PIPE = 1024 * 1024
"""Maximum content of a pipe."""
_HANG_UP_S = 1.0
_MAX_TIMEOUT_S = 7 * 86400.0
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


class Command:
    """A checked request to run something. Over HTTP there is no terminal."""

    def __init__(self, value: dict[str, Any], defaults: Setting) -> None:
        """
        :param defaults: the defaults for missing members of the request
        :raises Problem: 400, a field is wrong
        """
        if "command" not in value:
            raise Problem(400, "command is missing", field="command")
        self.command = check_strings(value["command"], "command")
        if not self.command[0]:
            raise Problem(400, "command has an empty program", field="command")
        env = defaults.env | defaults.secrets() | check_environment(value.get("env", {}), "env")
        cwd, user = value.get("cwd"), value.get("user")
        self.user = defaults.user if user is None else check_user(user, "user")
        self.setting = Setting(
            env,
            self.user,
            defaults.workdir if cwd is None else check_directory(cwd, "cwd"),
            makes_workdir=cwd is None and defaults.makes_workdir,
        )
        timeout = value.get("timeout_s")
        self.timeout_s = None if timeout is None else check_number(timeout, "timeout_s", 0.001, _MAX_TIMEOUT_S)
        stdin = value.get("stdin")
        self.stdin = b"" if stdin is None else check_base64(stdin, "stdin")
        self.tty = check_flag(value.get("tty", False), "tty")
        self.rows = check_integer(value.get("rows", 24), "rows", 1, 65535)
        self.cols = check_integer(value.get("cols", 80), "cols", 1, 65535)
        if self.tty:
            env.setdefault("TERM", "xterm")

    def timed_out(self) -> dict[str, str]:
        """Returns the end of a command whose time is over."""
        text = f"the command was killed, as it had not ended after {self.timeout_s:g} s"
        return {"error": text, "code": "timeout"}


class Program:
    """A running command. Its output goes into a history, its input comes from a buffer."""

    def __init__(self, command: Command, output: OutputHistory) -> None:
        """Starts the command. :raises SpawnError: the command does not start."""
        import subprocess

        self._output = output
        self.process: subprocess.Popen[bytes]
        """The process, which leads its own session."""
        self._input = bytearray(command.stdin)
        self._input_ends = False
        self._in_a_line = False
        self._channels: dict[int, int] = {}
        self._terminal = -1
        if command.tty:
            from ._tty import open_terminal

            self._terminal, theirs = open_terminal(command.rows, command.cols)
            try:
                self.process = spawn(command.command, command.setting, theirs, theirs, theirs, terminal=True)
            except BaseException:
                os.close(self._terminal)
                raise
            finally:
                os.close(theirs)
            self._input_fd = self._terminal
            self._channels[self._terminal] = STDOUT
        else:
            self.process = spawn(command.command, command.setting, *[subprocess.PIPE] * 3)
            pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
            self._input_fd, stdout, stderr = (pipe.fileno() for pipe in pipes if pipe is not None)
            self._channels |= {stdout: STDOUT, stderr: STDERR}
            for fd in (self._input_fd, *self._channels):
                os.set_blocking(fd, False)
        self.pidfd = os.pidfd_open(self.pid)
        """Readable once the process has ended."""

    @property
    def pid(self) -> int:
        """The process id. It is valid until the process is reaped."""
        return self.process.pid

    @property
    def takes_input(self) -> bool:
        """Whether the buffer of its input has room."""
        return len(self._input) < MAX_INPUT

    def masks(self, *, read: bool) -> dict[int, int]:
        """Returns the descriptors and events to poll for; with `read` also those of its output."""
        masks = {self.pidfd: select.POLLIN}
        if read:
            masks.update(dict.fromkeys(self._channels, select.POLLIN))
        if self._input and self._input_fd >= 0:
            masks[self._input_fd] = masks.get(self._input_fd, 0) | select.POLLOUT
        return masks

    def move(self, found: dict[int, int]) -> None:
        """Writes input and reads output, as far as the polled events allow."""
        self._feed(found)
        for fd in list(self._channels):
            if fd in found:
                self._read(fd)

    def drain(self) -> None:
        """Reads the rest of the output, at most the content of a pipe, and ends the channels."""
        for fd in list(self._channels):
            for _ in range(_MAX_PIPE // _READ):
                if not self._read(fd):
                    break
        for channel in self._channels.values():
            self._output.ends.setdefault(channel, self._output.position)
        self._channels.clear()

    def _read(self, fd: int) -> bool:
        """Reads once; returns whether there was any data."""
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return False
        except OSError:
            data = b""  # a terminal that no process has open any more
        if data:
            self._output.add(self._channels[fd], data)
            return True
        self._output.ends[self._channels.pop(fd)] = self._output.position
        return False

    def add_input(self, data: bytes) -> None:
        """Appends to the input; empty data ends it. :raises ValueError: the input has already ended."""
        if self._input_ends:
            raise ValueError("the channel 0 has been ended")
        if self._input_fd < 0:
            return
        if not data and self._terminal >= 0:
            from ._tty import end_of_input

            self._input += end_of_input(self._terminal, in_a_line=self._in_a_line)
        elif not data:
            self._input_ends = True
            if not self._input:
                self._close_input()
        else:
            self._input += data
            self._in_a_line = data[-1:] not in (b"\n", b"\r")

    def _feed(self, found: dict[int, int]) -> None:
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
        if self.process.stdin is not None and self._input_fd >= 0:
            self.process.stdin.close()
            self._input_fd = -1

    def resize(self, rows: int, cols: int) -> None:
        """Changes the size of the terminal. :raises ValueError: there is no terminal."""
        if self._terminal < 0:
            raise ValueError("there is no terminal to resize")
        from ._tty import resize

        resize(self._terminal, rows, cols)

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process group."""
        try:
            signal_group(self.process, number)
        except OSError:
            pass

    def kill(self) -> None:
        """Sends SIGKILL to all processes of the session."""
        kill_session(self.process)

    def hang_up(self) -> None:
        """Sends SIGHUP, like a closing terminal, and SIGKILL a second later."""
        self.send_signal(signal.SIGHUP)
        self.send_signal(signal.SIGCONT)
        poll({self.pidfd: select.POLLIN}, _HANG_UP_S)
        self.kill()
        poll({self.pidfd: select.POLLIN}, REAP_S)

    def kill_group(self) -> None:
        """Sends SIGKILL to the process group only."""
        kill_group(self.process)

    def reap(self) -> dict[str, int] | dict[str, str]:
        """Waits at most 5 s for the process; returns its end."""
        import subprocess

        self._input.clear()
        try:
            return how_it_ended(self.process.wait(REAP_S))
        except subprocess.TimeoutExpired:
            return {"error": "the command was killed, and does not end", "code": "agent_error"}

    @property
    def is_reaped(self) -> bool:
        """Whether the process was reaped."""
        return self.process.returncode is not None

    @property
    def has_exited(self) -> bool:
        """Whether the process has ended."""
        return has_exited(self.process)

    def close(self) -> None:
        """Closes all descriptors."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        if self._terminal >= 0:
            os.close(self._terminal)
        os.close(self.pidfd)
