"""`POST /v1/exec`: runs a command, streams its output, and reports how it ended.

One thread and one poll loop for each command. It reads no more output than the client accepts, so a slow client slows
down the command instead of filling memory. When the client disconnects or the time is over, the whole process group
receives SIGKILL before its leader is reaped, as its number could belong to another process afterwards.

The answer ends with the command itself. Processes that it left in the background keep its pipes open, but the agent
does not wait for them: it only reads the present content of the pipes.
"""

from __future__ import annotations

import time

from ._checks import decode_json
from ._exec_program import MAX_UNSENT, REAP_S, STALL_S, STDOUT, Command, OutputHistory, Program
from ._http import Gone
from ._process import SpawnError
from ._stream import LAST_CHUNK, chunk
from ._watch import Client

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._http import Request
    from ._process import Setting
    from ._stream import Stream

_FIELDS = {"command", "env", "cwd", "user", "timeout_s", "stdin"}
_TOGETHER_S = 0.02
"""A command that ends within this time is answered by one write."""
_LITTLE = 16 * 1024
"""Maximum output that is delayed for that."""


def handle(stream: Stream, request: Request, defaults: Setting) -> None:
    """Answers `POST /v1/exec`.

    :param defaults: the defaults for missing members of the request
    :raises Problem: 400, before anything was started
    :raises Gone: the client disconnected
    """
    command = Command(decode_json(stream.read_body(request), _FIELDS), defaults)
    deadline = None if command.timeout_s is None else time.monotonic() + command.timeout_s
    head = stream.head(200, [("Content-Type", "application/x-ndjson")], chunked=True)
    try:
        run = _Run(command, stream, deadline, head)
    except SpawnError as error:
        end: object = {"error": str(error), "code": error.code}
        unsent = bytearray(head)
    else:
        try:
            end = run.loop()
        finally:
            run.close()
        unsent = run.unsent
    stream.send(unsent + chunk(_line(end)) + LAST_CHUNK)


def _line(value: object) -> bytes:
    import json

    return json.dumps(value).encode() + b"\n"


class _Run:
    """A running command, and the client that receives its output."""

    def __init__(self, command: Command, stream: Stream, deadline: float | None, head: bytes) -> None:
        """Creates it. `head` is the head of the answer. :raises SpawnError: the command does not start."""
        self._command = command
        self._deadline = deadline
        self._output = OutputHistory(0)
        self.unsent = bytearray(head)
        """Output that was not sent yet."""
        self._program = Program(command, self._output)
        self._program.add_input(b"")
        self._client = Client(stream.sock)

    def loop(self) -> dict[str, int] | dict[str, str]:
        """Streams until the command has ended, and returns its end. The remaining `unsent` is small, and sent with the
        end.

        :raises Gone: the client disconnected.
        """
        program = self._program
        together_until = time.monotonic() + _TOGETHER_S
        while True:
            now = time.monotonic()
            left_s = None if self._deadline is None else self._deadline - now
            if left_s is not None and left_s <= 0:
                program.kill_group()
                program.drain()
                self._flush_within(REAP_S)
                return self._command.timed_out()
            together_s = together_until - now
            is_early = together_s > 0 and len(self.unsent) < _LITTLE
            wait_s = together_s if is_early and (left_s is None or together_s < left_s) else left_s
            masks = program.masks(read=len(self.unsent) < MAX_UNSENT)
            found = self._client.wait(masks, wait_s, writable=bool(self.unsent) and not is_early)
            if self._client.sock.fileno() in found:
                self._flush()
            program.move(found)
            if program.pidfd in found:
                # All of its output is in the pipes now.
                program.drain()
                self._flush_within(STALL_S)
                return program.reap()
            self._encode()

    def _encode(self) -> None:
        """Moves the output into the client's buffer, as lines of JSON."""
        import binascii

        for channel, data in self._output.take_all():
            text = binascii.b2a_base64(data, newline=False)
            name = b"stdout" if channel == STDOUT else b"stderr"
            self.unsent += chunk(b'{"stream":"%b","data":"%b"}\n' % (name, text))

    def _flush(self) -> None:
        sent = self._client.send_some(memoryview(self.unsent))
        del self.unsent[:sent]

    def _flush_within(self, stall_s: float) -> None:
        """Writes the rest of the output except a small part. :raises Gone: the client disconnected, or accepted nothing
        for `stall_s`."""
        self._encode()
        while len(self.unsent) >= _LITTLE:
            if not self._client.wait({}, stall_s, writable=True):
                raise Gone
            self._flush()

    def close(self) -> None:
        """Kills the process group if the command still runs, and closes all descriptors."""
        if not self._program.is_reaped:
            if not self._program.has_exited:
                self._program.kill_group()
            self._program.reap()
        self._program.close()
        self._client.sock.setblocking(True)
