"""An interactive command in a guest: input, a terminal, signals; it can be detached and attached again."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from volant.model import LogRange
from volant.model.agent_types import ExecStart, WorkloadStart

from ._errors import ClientProblem, ConnectionLost, UnexpectedAnswer
from ._exec import ExecEnd, ExecOutput, reported_end
from ._http import Http
from ._transport import Query, decode_json
from ._websocket import Closed, Socket, open_websocket

_MAX_MESSAGE = 64 * 1024
_HELLO_S = 60.0
_DETACH_S = 30.0
_NORMAL = 1000
_GOING_AWAY = 1001
_TAKEN_OVER = 4000


class ExecGap(msgspec.Struct, frozen=True):
    """Expired output, as positions, both included."""

    gap: LogRange


class _Control(ExecEnd, frozen=True):
    id: str | None = None
    tty: bool = False
    position: int = 0
    gap: LogRange | None = None


class ExecSession:
    """A command: `async for output in session`, then `session.end`. One task may read while others send.

    Leaving its block kills the command, unless it is detached.
    """

    def __init__(self, socket: Socket, vm: str, *, tty: bool) -> None:
        self._socket = socket
        self._vm = vm
        self.id: str | None = None
        """The id of a detached command, for `attach`."""
        self.tty = tty
        """Whether it has a terminal. All of its output is then `stdout`."""
        self.position = 0
        """The number of bytes of output read so far, including earlier connections; for `attach`."""
        self.end: ExecEnd | None = None
        """The end of the command; None while it runs."""

    def __aiter__(self) -> ExecSession:
        return self

    async def __anext__(self) -> ExecOutput | ExecGap:
        """Returns the next output. May be cancelled without losing any.

        :raises StopAsyncIteration: the command has ended, see `end`.
        :raises ClientProblem: another client has attached to it (409).
        :raises ConnectionLost: the connection is lost; a detached command continues.
        """
        while self.end is None:
            message = await self._receive()
            if isinstance(message, bytes):
                if message[:1] not in (b"\x01", b"\x02"):
                    raise UnexpectedAnswer("the output of the command has an unknown channel")
                if len(message) == 1:
                    continue  # The end of one channel; the end of the command follows.
                self.position += len(message) - 1
                return ExecOutput("stdout" if message[0] == 1 else "stderr", message[1:])
            control = decode_json(message, _Control, "a control message about the command")
            if control.gap is not None:
                return ExecGap(control.gap)
            self.end = reported_end(control)
        raise StopAsyncIteration

    async def send(self, data: bytes) -> None:
        """Writes to the command's input; waits while it does not read.

        :raises ConnectionLost: the command has ended, or the connection is lost.
        """
        for start in range(0, len(data), _MAX_MESSAGE):
            await self._socket.send(b"\0" + data[start : start + _MAX_MESSAGE])

    async def send_eof(self) -> None:
        """Ends the command's input. In a terminal this is like Ctrl-D."""
        await self._socket.send(b"\0")

    async def resize(self, rows: int, cols: int) -> None:
        """Sends the terminal's new size."""
        await self._socket.send(json.dumps({"resize": [rows, cols]}))

    async def signal(self, number: int) -> None:
        """Sends a signal to the command's process group."""
        await self._socket.send(json.dumps({"signal": number}))

    async def settle(self) -> None:
        """Waits until the guest has received everything that was sent, so that you can leave a detached command.

        Output that arrives in the meantime is dropped; `attach` with `position` returns it again.

        :raises ConnectionLost: there is no answer in time, for example because the command does not read.
        """
        async with trio.open_nursery() as nursery:

            async def drop() -> None:
                try:
                    while True:
                        await self._socket.receive()
                except (Closed, ConnectionLost):
                    pass

            nursery.start_soon(drop)
            with trio.move_on_after(_DETACH_S) as scope:
                await self._socket.ping()
            nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise ConnectionLost(f"the command in {self._vm} does not read its input", hint="unread input is lost")

    async def begin(self) -> None:
        """Waits for the first message of a command that continues without its client."""
        with trio.move_on_after(_HELLO_S) as scope:
            message = await self._receive()
            if isinstance(message, bytes):
                raise UnexpectedAnswer("a detached command began without its id")
            control = decode_json(message, _Control, "a control message about the command")
            if control.id is None:
                self.end = reported_end(control)
                return
            self.id, self.tty, self.position = control.id, control.tty, control.position
        if scope.cancelled_caught:
            raise ConnectionLost(f"the agent of {self._vm} did not answer within {_HELLO_S:g} s")

    async def _receive(self) -> str | bytes:
        try:
            return await self._socket.receive()
        except Closed as closed:
            if closed.code == _TAKEN_OVER:
                raise ClientProblem(409, "taken-over", f"the command in {self._vm}: {closed.reason}") from None
            if closed.code in (_NORMAL, _GOING_AWAY):
                raise ConnectionLost(
                    f"the connection to the command in {self._vm} was closed before it ended",
                    hint=f"`volar vms get {self._vm}` shows whether the VM still runs",
                ) from None
            raise UnexpectedAnswer(f"the agent closed with {closed.code}: {closed.reason}") from None
        except ConnectionLost:
            raise ConnectionLost(
                f"the connection to the command in {self._vm} broke before it ended",
                hint=f"`volar vms get {self._vm}` shows whether the VM still runs",
            ) from None


@asynccontextmanager
async def open_session(http: Http, path: str, vm: str, start: ExecStart, *, detach: bool) -> AsyncIterator[ExecSession]:
    """Starts a command, for the block."""
    query: Query = {"detach": "true" if detach else None}
    async with open_websocket(http, path, query, pings=False) as socket:
        session = ExecSession(socket, vm, tty=bool(start.get("tty")))
        await socket.send(json.dumps(start))
        if detach:
            await session.begin()
        yield session


@asynccontextmanager
async def open_workload(http: Http, path: str, vm: str, start: WorkloadStart) -> AsyncIterator[ExecSession]:
    """Starts a workload that waits for its first client, for the block."""
    async with open_websocket(http, path, {"workload": "true"}, pings=False) as socket:
        session = ExecSession(socket, vm, tty=bool(start.get("tty")))
        await socket.send(json.dumps(start))
        await session.begin()
        yield session


@asynccontextmanager
async def attach_session(
    http: Http, path: str, vm: str, identifier: str, position: int | None
) -> AsyncIterator[ExecSession]:
    """Attaches to a detached command, for the block."""
    query: Query = {"attach": identifier, "from": position}
    async with open_websocket(http, path, query, pings=False) as socket:
        session = ExecSession(socket, vm, tty=False)
        await session.begin()
        yield session
