"""A VM's serial console, across reconnects."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from volant.model import ConsoleGap, Problem

from ._errors import ClientProblem, ConnectionLost, Reconnected, UnexpectedAnswer
from ._feed import Feed, Patience, is_passing, keep_connected
from ._http import Http
from ._transport import Query, decode_json
from ._websocket import Closed, Socket, open_websocket

_MAX_MESSAGE = 64 * 1024
_ENDED = 1000
_GOES_ON = frozenset({1001, 1012})
_REFUSALS = {
    1008: (403, "console-read-only"),
    1013: (502, "console-not-read"),
    4000: (409, "keyboard-lost"),
}


class _Notice(msgspec.Struct):
    missed: int | None = None


class ConsoleState:
    """The current connection, and how the console ended."""

    def __init__(self) -> None:
        self.socket: Socket | None = None
        self.end = ""


class Console:
    """The guest's output, and a method to send input: `async for piece in console`, `await console.send(data)`."""

    def __init__(self, feed: Feed[bytes | ConsoleGap | Reconnected], state: ConsoleState) -> None:
        self._feed = feed
        self._state = state

    @property
    def end(self) -> str:
        """Why the console has ended, as reported by the daemon; empty before the end."""
        return self._state.end

    async def receive(self) -> bytes | ConsoleGap | Reconnected:
        """Returns the next piece of the guest's output, or a gap. May be cancelled without losing one.

        :raises trio.EndOfChannel: the VM is down or deleted, see `end`.
        :raises ClientProblem: the daemon ended the session: another client took over the input (409), the guest does
            not read its input (502), the VM is not running any more (409).
        :raises ClientError: the daemon could not be reached again in time.
        """
        return await self._feed.receive()

    def __aiter__(self) -> Console:
        return self

    async def __anext__(self) -> bytes | ConsoleGap | Reconnected:
        return await self._feed.__anext__()

    async def send(self, data: bytes) -> None:
        """Types `data`.

        :raises ConnectionLost: there is no connection at present, or it broke and possibly only a part has arrived.
        """
        socket = self._state.socket
        if socket is None:
            raise ConnectionLost("there is no connection to the console at present")
        for start in range(0, len(data), _MAX_MESSAGE):
            await socket.send(data[start : start + _MAX_MESSAGE])


async def pump_console(
    http: Http,
    name: str,
    query: Query,
    backoff: Patience,
    state: ConsoleState,
    channel: trio.MemorySendChannel[bytes | ConsoleGap | Reconnected],
    started: Callable[[], None],
) -> None:
    """Sends the guest's output to `channel` until the console ends."""
    path = f"/ws/v1/vms/{name}/console"
    first = True

    async def connect(opened: Callable[[], None]) -> ConnectionLost | None:
        nonlocal first
        # No history after a reconnect: it would repeat output, as the last position is not known.
        async with open_websocket(http, path, query if first else {**query, "tail": 0}) as socket:
            opened()
            # Set before `Reconnected` is sent: its reader may type at once.
            state.socket = socket
            try:
                if not first:
                    await channel.send(Reconnected())
                first = False
                while True:
                    message = await socket.receive()
                    backoff.received()
                    await channel.send(message if isinstance(message, bytes) else _gap(message))
            except Closed as closed:
                return _lost(closed)
            finally:
                state.socket = None

    def _lost(closed: Closed) -> ConnectionLost | None:
        if closed.code == _ENDED:
            state.end = closed.reason
            return None
        if closed.code in _GOES_ON:
            return ConnectionLost(f"{http.address.text} ended the console: {closed.reason}")
        if closed.code in _REFUSALS:
            status, code = _REFUSALS[closed.code]
            raise ClientProblem(status, code, closed.reason, vm=name) from None
        raise UnexpectedAnswer(f"{http.address.text} closed the console with code {closed.code}: {closed.reason}")

    await keep_connected(connect, backoff, started, again=_again)


def _again(problem: Problem) -> bool:
    """Returns whether to retry. The client's own lost connection may still hold the input, if the daemon has not
    noticed the loss."""
    return is_passing(problem) or problem.code == "keyboard-taken"


def _gap(message: str) -> ConsoleGap:
    notice = decode_json(message, _Notice, "a notice about the console")
    return ConsoleGap(notice.missed or 0)
