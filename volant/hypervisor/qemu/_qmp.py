"""Speaks QMP, the protocol of QEMU's control socket: lines of JSON with commands, answers and events.

The library `qemu.qmp` needs asyncio, and the daemon only needs this small part of the protocol.
"""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from volant.host import Host, Random
from volant.hypervisor._interface import HypervisorError

_RETRY_S = 0.005


async def connect_control(host: Host, path: Path, timeout_s: float) -> trio.SocketStream:
    """Connects as soon as QEMU listens at `path`. `timeout_s` limits each attempt, not the time until QEMU listens.

    :raises OSError: the connection fails. :raises trio.TooSlowError: an attempt takes too long.
    """
    if not host.files.exists(path):
        # The end of the last watch keeps the event loop waiting for the kernel, often for ten milliseconds.
        with host.watches.open(path.parent) as names:
            while not host.files.exists(path):
                await names.wait()
    while True:
        try:
            return await host.sockets.connect_unix(path, timeout_s)
        except ConnectionRefusedError:
            # QEMU has bound the socket and does not listen yet, which takes microseconds.
            await trio.sleep(_RETRY_S)


LINE_LIMIT = 1024 * 1024
_READ = 64 * 1024

EventHandler = Callable[[str, dict[str, Any]], None]


class QmpLost(HypervisorError):
    """The control socket is closed, does not answer or does not speak QMP."""


class QmpRefused(HypervisorError):
    """QEMU answered a command with an error."""


class QmpClient:
    """One session. `start` runs in a nursery and does not fail there: callers of `execute` get the error."""

    def __init__(self, stream: trio.abc.Stream, on_event: EventHandler, random: Random) -> None:
        self.lost = trio.Event()
        self.why = ""
        self.is_parked = False
        """Whether the session survives the end of `start`."""
        self._stream = stream
        self._lines = _Lines(stream)
        self._on_event = on_event
        self._is_negotiated = False
        self._sending = trio.Lock()
        self._waiting: dict[int, _Answer] = {}
        # QEMU sends the answer to a command of the previous session, whose client has gone, to this one.
        self._numbers = itertools.count(int.from_bytes(random.token_bytes(6)))

    async def start(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Negotiates, reports `started` and reads until the end. Continues to read a parked session. Raises QmpLost
        before `started`. The caller must set a deadline, as QEMU never answers a second client."""
        self.is_parked = False
        if not self._is_negotiated:
            await self._negotiate()
        task_status.started()
        try:
            while True:
                self._dispatch(_decode(await self._lines.next()))
        except QmpLost as error:
            self._lose(str(error))
        finally:
            if not self.is_parked:
                self._lose("the control socket was closed")

    async def _negotiate(self) -> None:
        # Messages for the previous session may come before the greeting.
        while "QMP" not in (greeting := _decode(await self._lines.next())):
            if not greeting.keys() & {"return", "error", "event"}:
                raise QmpLost("the control socket does not greet as QMP does")
        number = next(self._numbers)
        await self._stream.send_all(b'{"execute":"qmp_capabilities","id":%d}\n' % number)
        while True:
            message = _decode(await self._lines.next())
            if message.get("id") == number:
                if "error" in message:
                    raise QmpLost(f"the control socket refuses to negotiate: {message['error']}")
                break
            self._dispatch(message)
        self._is_negotiated = True

    def park(self) -> bool:
        """Keeps the session for a later `start`; the task of this one is cancelled before anything is awaited. Returns
        False if the session can't be kept, because it is lost or a command is being written."""
        # An answer that comes to nobody later is ignored.
        self.is_parked = not self.lost.is_set() and not self._sending.locked()
        return self.is_parked

    def set_handler(self, on_event: EventHandler) -> None:
        """Replaces the handler of events."""
        self._on_event = on_event

    async def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        timeout_s: float = 5.0,
        descriptor: int | None = None,
    ) -> Any:
        """Runs a command and returns its result. `descriptor` is passed with it. Raises QmpRefused, and QmpLost, also
        if there is no answer in time."""
        number = next(self._numbers)
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = arguments
        answer = self._waiting[number] = _Answer()
        try:
            with trio.fail_after(timeout_s):
                async with self._sending:
                    if not self.lost.is_set():
                        await self._send(msgspec.json.encode(message) + b"\n", descriptor)
                if not self.lost.is_set():
                    await answer.came.wait()
        except trio.TooSlowError:
            raise QmpLost(f"QEMU does not answer {command} within {timeout_s:g} s") from None
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise QmpLost("the control socket broke") from error
        finally:
            del self._waiting[number]
        if answer.message is None:
            raise QmpLost(self.why)
        if "error" in answer.message:
            refusal = answer.message["error"]
            text = refusal.get("desc") if isinstance(refusal, dict) else refusal
            raise QmpRefused(f"QEMU refused {command}: {text}")
        return answer.message.get("return")

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        # A simulated stream can't pass descriptors.
        if descriptor is not None and isinstance(self._stream, trio.SocketStream):
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))
            try:
                sent = await self._stream.socket.sendmsg([data], [rights])
            except OSError as error:
                raise trio.BrokenResourceError from error
            data = data[sent:]
        await self._stream.send_all(data)

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "event" in message:
            data = message.get("data")
            self._on_event(str(message["event"]), data if isinstance(data, dict) else {})
            return
        number = message.get("id")
        # The caller of the command may have given up.
        answer = self._waiting.get(number) if isinstance(number, int) else None
        if answer is not None:
            answer.message = message
            answer.came.set()

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.why = why
            self.lost.set()
        for answer in self._waiting.values():
            answer.came.set()


class _Answer:
    __slots__ = ("came", "message")

    def __init__(self) -> None:
        self.came = trio.Event()
        self.message: dict[str, Any] | None = None


class _Lines:
    """Reads bounded lines from a stream."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._searched = 0

    async def next(self) -> bytes:
        """Returns the next line. Raises QmpLost at the end, and for a line over `LINE_LIMIT`."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._searched = 0
                return line
            self._searched = len(self._buffer)
            if self._searched > LINE_LIMIT:
                raise QmpLost("a line on the control socket is too long")
            try:
                data = await self._stream.receive_some(_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise QmpLost("the control socket broke") from error
            if not data:
                raise QmpLost("QEMU closed the control socket")
            self._buffer += data


def _decode(line: bytes) -> dict[str, Any]:
    try:
        message = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise QmpLost(f"the control socket does not speak JSON: {error}") from error
    if not isinstance(message, dict):
        raise QmpLost("the control socket does not speak QMP")
    return message
