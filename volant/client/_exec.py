"""A command in a guest: its output as it arrives, then its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Literal

import msgspec

from ._errors import ConnectionLost, UnexpectedAnswer
from ._transport import decode_json

if TYPE_CHECKING:
    from volant.model import agent_types

# The agent sends pieces of at most 64 KiB, in base64.
_MAX_LINE = 1024 * 1024


class ExecOutput(msgspec.Struct, frozen=True):
    """Bytes that the command wrote."""

    stream: Literal["stdout", "stderr"]
    data: bytes


class ExecEnd(msgspec.Struct, frozen=True, omit_defaults=True):
    """The end of a command: exactly one of the first three members is set."""

    exit_code: int | None = None
    signal: int | None = None
    error: str | None = None
    """Why it did not run, or was killed."""
    code: str | None = None
    """With `error`: `timeout`, `not_found`, `not_executable`, … (`agent_types.ExecEnd`)."""


def reported_end(message: ExecEnd) -> ExecEnd:
    """Returns the end of a command from a message that may have more. :raises UnexpectedAnswer: it has no end."""
    end = ExecEnd(message.exit_code, message.signal, message.error, message.code)
    if end == ExecEnd():
        raise UnexpectedAnswer("the command ended, and the agent did not report how")
    return end


class RemoteSession(msgspec.Struct, frozen=True):
    """A detached command; the fields are those of `volant.model.agent_types.ExecSession`."""

    id: str
    command: list[str]
    tty: bool
    user: str | None
    attached: bool
    age_s: float
    position: int
    pid: int | None
    end: ExecEnd | None
    ended_s: float | None = None


class RemoteSessions(msgspec.Struct, frozen=True):
    """The detached commands of a VM."""

    sessions: list[RemoteSession]


class _Line(ExecEnd, frozen=True):
    stream: Literal["stdout", "stderr"] | None = None
    data: bytes = b""


class Process:
    """A running command: `async for output in process`, then `process.end`. Leaving its block kills the command."""

    def __init__(self, chunks: AsyncIterator[bytes], vm: str) -> None:
        self._chunks = chunks
        self._buffer = bytearray()
        self._searched = 0
        self._vm = vm
        self.end: ExecEnd | None = None
        """The end of the command; None while it runs."""

    def __aiter__(self) -> Process:
        return self

    async def __anext__(self) -> ExecOutput:
        """Returns the next output.

        :raises StopAsyncIteration: the command has ended, see `end`.
        :raises ConnectionLost: the stream broke before the command ended.
        """
        if self.end is not None:
            raise StopAsyncIteration
        line = decode_json(await self._next_line(), _Line, "the output of the command")
        if line.stream is not None:
            return ExecOutput(line.stream, line.data)
        self.end = reported_end(line)
        raise StopAsyncIteration

    async def _next_line(self) -> bytes:
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if self._searched > _MAX_LINE:
                raise UnexpectedAnswer("a line of the command's output stream is longer than 1 MiB")
            try:
                self._buffer += await anext(self._chunks)
            except StopAsyncIteration:
                raise ConnectionLost(
                    f"the stream from {self._vm} ended before the command did",
                    hint=f"`volar vms get {self._vm}` shows whether the VM still runs",
                ) from None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def wait(self) -> ExecEnd:
        """Drops the remaining output, and returns the end of the command."""
        async for _ in self:
            pass
        assert self.end is not None
        return self.end


def request_body(
    command: list[str], env: dict[str, str], cwd: str | None, user: str | None, timeout_s: float | None
) -> agent_types.ExecRequest:
    """Returns the body of the request, without missing arguments: the agent has defaults."""
    body: agent_types.ExecRequest = {"command": command}
    if env:
        body["env"] = env
    if cwd is not None:
        body["cwd"] = cwd
    if user is not None:
        body["user"] = user
    if timeout_s is not None:
        body["timeout_s"] = timeout_s
    return body
