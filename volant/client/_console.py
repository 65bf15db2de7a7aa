"""A VM's serial console, over as many connections as it takes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from volant.model import ConsoleGap, Problem

from ._errors import ClientProblem, ConnectionLost, UnexpectedAnswer
from ._feed import Backoff, Feed, is_passing, keep_connected
from ._http import Http
from ._transport import Query, decode_json
from ._types import Reconnected
from ._websocket import Closed, Socket, open_websocket

_MAX_MESSAGE = 64 * 1024
_ENDED = 1000
_GOES_ON = frozenset({1001, 1012})
_REFUSALS = {
    1008: (403, "console-read-only"),
    1013: (502, "console-not-read"),
    4000: (409, "keyboard-lost"),
}


class _Word(msgspec.Struct):
    missed: int | None = None


class Line:
    """The present connection, and what becomes of the console."""

    def __init__(self) -> None:
        self.socket: Socket | None = None
        self.end = ""


class Console:
    """What the guest says, and a way to type: `async for piece in console`, `await console.send(data)`."""

    def __init__(self, feed: Feed[bytes | ConsoleGap | Reconnected], line: Line) -> None:
        self._feed = feed
        self._line = line

    @property
    def end(self) -> str:
        """Why the console is at its end, in the daemon's words; empty while it is not."""
        return self._line.end

    async def receive(self) -> bytes | ConsoleGap | Reconnected:
        """The next piece of what the guest says, or what is lost of it. May be cancelled without losing one.

        :raises trio.EndOfChannel: the VM is down or deleted, see `end`.
        :raises ClientProblem: the daemon refuses to go on: somebody else has the keyboard (409), the guest does not
            read what is typed (502), the VM is not running any more (409).
        :raises ClientError: the daemon could not be reached again in time.
        """
        return await self._feed.receive()

    def __aiter__(self) -> Console:
        return self

    async def __anext__(self) -> bytes | ConsoleGap | Reconnected:
        return await self._feed.__anext__()

    async def send(self, data: bytes) -> None:
        """Type.

        :raises ConnectionLost: there is no connection at present, or perhaps only a part has arrived.
        """
        socket = self._line.socket
        if socket is None:
            raise ConnectionLost("there is no connection to the console at present")
        for start in range(0, len(data), _MAX_MESSAGE):
            await socket.send(data[start : start + _MAX_MESSAGE])


async def pump_console(
    http: Http,
    name: str,
    query: Query,
    backoff: Backoff,
    line: Line,
    channel: trio.MemorySendChannel[bytes | ConsoleGap | Reconnected],
    started: Callable[[], None],
) -> None:
    """Send what the guest says to `channel` until the console is at its end."""
    path = f"/ws/v1/vms/{name}/console"
    first = True

    async def connect(opened: Callable[[], None]) -> ConnectionLost | None:
        nonlocal first
        # What was seen must not come again, and where it ended is not known.
        async with open_websocket(http, path, query if first else {**query, "tail": 0}) as socket:
            opened()
            # Who is told that the connection is back may type at once.
            line.socket = socket
            try:
                if not first:
                    await channel.send(Reconnected())
                first = False
                while True:
                    message = await socket.receive()
                    backoff.heard()
                    await channel.send(message if isinstance(message, bytes) else _gap(message))
            except Closed as closed:
                return _lost(closed)
            finally:
                line.socket = None

    def _lost(closed: Closed) -> ConnectionLost | None:
        if closed.code == _ENDED:
            line.end = closed.reason
            return None
        if closed.code in _GOES_ON:
            return ConnectionLost(f"{http.address.text} ended the console: {closed.reason}")
        if closed.code in _REFUSALS:
            status, code = _REFUSALS[closed.code]
            raise ClientProblem(status, code, closed.reason, vm=name) from None
        raise UnexpectedAnswer(f"{http.address.text} closed the console with code {closed.code}: {closed.reason}")

    await keep_connected(connect, backoff, started, again=_again)


def _again(problem: Problem) -> bool:
    """The keyboard may be our own: the daemon has not heard yet that the connection before is gone."""
    return is_passing(problem) or problem.code == "keyboard-taken"


def _gap(message: str) -> ConsoleGap:
    word = decode_json(message, _Word, "a word about the console")
    return ConsoleGap(word.missed or 0)
