"""`POST /v1/exec`: runs a command, streams its output, and reports how it ended.

One thread and one poll loop for each command. It reads no more output than the client takes, so a slow client slows the
command down instead of filling memory. When the client leaves or the time is over, the whole process group gets
SIGKILL before its leader is reaped, as its number could belong to another process afterwards.

The answer ends with the command itself. Processes that it left in the background keep its pipes open and are not waited
for: the agent only reads what the pipes hold by then.
"""

from __future__ import annotations

import os
import select
import time

from ._checks import (
    check_base64,
    check_directory,
    check_environment,
    check_flag,
    check_integer,
    check_number,
    check_strings,
    decode_json,
)
from ._http import Gone, Problem
from ._process import SpawnError, base_environment, has_exited, how_it_ended, kill_group, spawn
from ._stream import LAST_CHUNK, chunk
from ._watch import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from ._http import Request
    from ._stream import Stream

READ = 64 * 1024
"""Bytes to read from a pipe at once."""
MAX_PIPE = 1024 * 1024
"""The most that a pipe holds."""
REAP_S = 5.0
"""How long a killed process may take to end."""
STALL_S = 600.0
"""How long a client may take nothing of the output."""
_MAX_TIMEOUT_S = 7 * 86400.0
_MAX_PENDING = 256 * 1024
_FIELDS = {"command", "env", "cwd", "user", "timeout_s", "stdin"}


class Command:
    """A checked request to run something. Over HTTP there is no terminal."""

    def __init__(self, value: dict[str, Any]) -> None:
        """:raises Problem: 400, a field is wrong."""
        if "command" not in value:
            raise Problem(400, "command is missing", field="command")
        self.command = check_strings(value["command"], "command")
        if not self.command[0]:
            raise Problem(400, "command has an empty program", field="command")
        self.env = base_environment() | check_environment(value.get("env", {}), "env")
        self.cwd = check_directory(value["cwd"] if value.get("cwd") is not None else "/", "cwd")
        user = value.get("user")
        if user is not None and (not isinstance(user, str) or not user or "\0" in user or len(user) > 256):
            raise Problem(400, "user is not a name or number", field="user")
        self.user: str | None = user
        timeout = value.get("timeout_s")
        self.timeout_s = None if timeout is None else check_number(timeout, "timeout_s", 0.001, _MAX_TIMEOUT_S)
        stdin = value.get("stdin")
        self.stdin = b"" if stdin is None else check_base64(stdin, "stdin")
        self.tty = check_flag(value.get("tty", False), "tty")
        self.rows = check_integer(value.get("rows", 24), "rows", 1, 65535)
        self.cols = check_integer(value.get("cols", 80), "cols", 1, 65535)
        if self.tty:
            self.env.setdefault("TERM", "xterm")

    def timed_out(self) -> dict[str, str]:
        """Returns the end of a command whose time was over."""
        text = f"the command was killed, as it had not ended after {self.timeout_s:g} s"
        return {"error": text, "code": "timeout"}


def handle(stream: Stream, request: Request) -> None:
    """Answers `POST /v1/exec`.

    :raises Problem: 400, before anything was started
    :raises Gone: the client left
    """
    import subprocess

    command = Command(decode_json(stream.read_body(request), _FIELDS))
    started = time.monotonic()
    stream.start(200, [("Content-Type", "application/x-ndjson")], chunked=True)
    try:
        process = spawn(
            command.command,
            command.env,
            command.cwd,
            command.user,
            subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            subprocess.PIPE,
            subprocess.PIPE,
        )
    except SpawnError as error:
        stream.send(chunk(_line({"error": str(error), "code": error.code})) + LAST_CHUNK)
        return
    deadline = None if command.timeout_s is None else started + command.timeout_s
    run = _Run(process, Client(stream.sock), deadline, command.stdin)
    try:
        end = run.loop()
    finally:
        run.close()
    stream.send(chunk(_line(command.timed_out() if end is None else end)) + LAST_CHUNK)


def _line(value: object) -> bytes:
    import json

    return json.dumps(value).encode() + b"\n"


class _Run:
    """A command that runs, and the client that gets its output."""

    def __init__(self, process: subprocess.Popen[bytes], client: Client, deadline: float | None, stdin: bytes) -> None:
        self._process = process
        self._client = client
        self._deadline = deadline
        self._pending = bytearray()
        self._stdin = memoryview(stdin)
        self._pidfd = os.pidfd_open(process.pid)
        self._names: dict[int, bytes] = {}
        for pipe, name in ((process.stdout, b"stdout"), (process.stderr, b"stderr")):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._names[pipe.fileno()] = name
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)

    def loop(self) -> dict[str, int] | None:
        """Streams until the command has ended; returns how, or None if its time was over.

        :raises Gone: the client left
        """
        while True:
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                kill_group(self._process)
                self._drain()
                self._flush_within(REAP_S)
                return None
            found = self._client.wait(
                self._interests(),
                None if self._deadline is None else self._deadline - now,
                writable=bool(self._pending),
            )
            if self._client.sock.fileno() in found:
                self._flush()
            stdin = self._process.stdin
            if stdin is not None and not stdin.closed and stdin.fileno() in found:
                self._feed(found[stdin.fileno()])
            if self._pidfd in found:
                # All of its output is in the pipes now.
                self._drain()
                self._flush_within(STALL_S)
                return how_it_ended(self._process.wait())
            for fd in list(self._names):
                if fd in found:
                    self._read(fd)

    def _interests(self) -> dict[int, int]:
        wanted = {self._pidfd: select.POLLIN}
        if len(self._pending) < _MAX_PENDING:
            wanted.update(dict.fromkeys(self._names, select.POLLIN))
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            wanted[stdin.fileno()] = select.POLLOUT
        return wanted

    def _read(self, fd: int) -> bool:
        """Reads once from a pipe; returns whether there was anything."""
        import binascii

        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return False
        if not data:
            del self._names[fd]
            return False
        text = binascii.b2a_base64(data, newline=False)
        self._pending += chunk(b'{"stream":"%b","data":"%b"}\n' % (self._names[fd], text))
        return True

    def _drain(self) -> None:
        """Reads the rest of the pipes, at most what a pipe can hold, even if the client is slow."""
        for fd in list(self._names):
            for _ in range(MAX_PIPE // READ):
                if not self._read(fd):
                    break

    def _feed(self, events: int) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            if not events & select.POLLERR:
                self._stdin = self._stdin[os.write(stdin.fileno(), self._stdin[:READ]) :]
            if self._stdin and not events & select.POLLERR:
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        stdin.close()

    def _flush(self) -> None:
        sent = self._client.send_some(memoryview(self._pending))
        del self._pending[:sent]

    def _flush_within(self, stall_s: float) -> None:
        """Writes the pending output. :raises Gone: the client left, or took nothing for `stall_s`."""
        while self._pending:
            if not self._client.wait({}, stall_s, writable=True):
                raise Gone
            self._flush()

    def close(self) -> None:
        """Kills the command if it still runs, and closes its pipes."""
        process = self._process
        if process.returncode is None:
            if not has_exited(process):
                kill_group(process)
            import subprocess

            try:
                process.wait(REAP_S)
            except subprocess.TimeoutExpired:
                pass
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        os.close(self._pidfd)
        self._client.sock.setblocking(True)
