"""The serial console: many look on, one types, and neither a slow reader nor a deaf guest holds anybody up.

The console's file and named pipe are real, and so is the pump; the test is the guest.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.api.kit import UPGRADE, Api, api, read_head, request, until, websocket
from tests.names import named
from volant.model import Key, VmRow
from volant.session import SerialConsole, _serial
from volant.session._console import ConsolePump
from volant.vm import GuestAccess

BOOT = "1.1"


@dataclass
class Desk:
    """A VM called `demo`, seen from its console."""

    api: Api
    serial: SerialConsole
    output: Path
    input: int
    socket: Path
    shut: trio.CancelScope

    def say(self, data: bytes) -> None:
        """The guest writes."""
        with self.output.open("ab") as file:
            file.write(data)

    async def heard(self, count: int) -> bytes:
        """The next bytes that the guest reads."""
        data = b""
        with trio.fail_after(20):
            while len(data) < count:
                # A pipe without a writer counts as readable.
                await trio.sleep(0.005)
                try:
                    data += os.read(self.input, count - len(data))
                except BlockingIOError:
                    pass
        return data

    def url(self, query: str = "") -> str:
        return f"ws://127.0.0.1:{self.api.server.port}/ws/v1/vms/demo/console{query}"


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with at_desk(tmp_path) as found:
        yield found


@asynccontextmanager
async def at_desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with api(tmp_path) as served:
        await served.crashed("demo")
        row = served.deps.store.projection.require(named("demo"))
        host = served.deps.host
        output, fifo, sock = tmp_path / "console.log", tmp_path / "console.in", tmp_path / "console.sock"
        output.touch()
        await host.files.make_fifo(fifo)
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        serial = SerialConsole(host, fifo, sock)

        class AtDesk(GuestAccess):
            def console(self, vm: Key) -> tuple[VmRow, SerialConsole]:
                return row, serial

        served.replace_guest_access(AtDesk)
        shut = trio.CancelScope()

        async def boot(task_status: trio.TaskStatus[None]) -> None:
            log = served.deps.logs.open(row.id, named(row.name))
            pump = ConsolePump(host, output, log, BOOT, feed=serial.feed)
            with shut, pump, serial.fed_by(pump):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pump.follow)
                    await nursery.start(serial.serve)
                    task_status.started()

        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(boot)
                yield Desk(served, serial, output, reading, sock, shut)
                nursery.cancel_scope.cancel()
        finally:
            os.close(reading)


async def read(socket: WebSocketConnection, count: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while len(data) < count:
            message = await socket.get_message()
            assert isinstance(message, bytes), message
            data += message
    return data


async def drained(socket: WebSocketConnection) -> None:
    while True:
        await socket.get_message()


async def end(socket: WebSocketConnection) -> tuple[int, str | None]:
    """How it was closed; what still comes before is dropped."""
    with trio.fail_after(20):
        with pytest.raises(ConnectionClosed) as closed:
            await drained(socket)
    assert closed.value.reason is not None
    return closed.value.reason.code, closed.value.reason.reason


async def test_a_reader_sees_the_last_lines_the_prompt_and_then_every_byte(desk: Desk) -> None:
    desk.say(b"one\r\ntwo\r\nthree\r\n/ # ")
    await until(lambda: desk.serial._fed == 21)
    async with websocket(desk.url("?tail=2")) as socket, websocket(desk.url("?tail=0")) as other:
        assert await read(socket, 16) == b"two\r\nthree\r\n/ # "
        everything = bytes(range(256))
        desk.say(everything)
        assert await read(socket, 256) == everything
        assert await read(other, 256) == everything
    await until(lambda: desk.serial._ring is None)


async def test_what_is_typed_arrives_byte_for_byte(desk: Desk) -> None:
    async with websocket(desk.url("?write=true")) as socket:
        await socket.send_message(bytes(range(256)))
        assert await desk.heard(256) == bytes(range(256))
        await socket.send_message("é\n")
        assert await desk.heard(3) == "é\n".encode()


async def test_one_client_types_at_a_time_until_it_leaves_or_another_takes_the_keyboard(desk: Desk) -> None:
    async with websocket(desk.url("?write=true")) as first:
        refused = await desk.api.server.get("/ws/v1/vms/demo/console?write=true", **UPGRADE)
        assert refused.status == 409
        assert b"keyboard-taken" in refused.body
        async with websocket(desk.url("?take=true")) as second:
            assert await end(first) == (4000, "another client has taken the keyboard")
            await second.send_message(b"mine")
            assert await desk.heard(4) == b"mine"
    await until(lambda: desk.serial._keyboard is None)
    async with websocket(desk.url("?write=true")) as third:
        await third.send_message(b"free")
        assert await desk.heard(4) == b"free"


async def test_a_read_only_client_can_not_type(desk: Desk) -> None:
    async with websocket(desk.url()) as socket:
        await socket.send_message(b"x")
        assert (await end(socket))[0] == 1008
    assert os.read(desk.input, 1) == b""


async def test_a_guest_that_does_not_read_ends_only_the_session_that_types(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_serial, "TYPE_S", 0.3)
    async with websocket(desk.url()) as onlooker, websocket(desk.url("?write=true")) as socket:
        await socket.send_message(b"x" * 60_000)
        await socket.send_message(b"x" * 60_000)
        desk.say(b"alive")
        assert await read(onlooker, 5) == b"alive"
        assert (await desk.api.client.get("/healthz")).status_code == 200
        assert await end(socket) == (1013, "the guest does not read its console")


async def test_a_message_that_is_too_long_is_refused(desk: Desk) -> None:
    async with websocket(desk.url("?write=true")) as socket:
        await socket.send_message(b"x" * 65_537)
        assert (await end(socket))[0] == 1009


async def test_a_slow_reader_gets_the_number_of_missed_bytes_and_delays_no_other(desk: Desk) -> None:
    async with await desk.api.server.connect() as slow, websocket(desk.url("?tail=0")) as quick:
        await slow.send_all(request("GET", "/ws/v1/vms/demo/console?tail=0", **UPGRADE))
        _, rest = await read_head(slow)
        said = 0
        with trio.fail_after(20):
            for _ in range(400):
                desk.serial.feed(b"x" * 60_000)
                said += 60_000
                await read(quick, 60_000)
        desk.serial.feed(b"$")
        await read(quick, 1)
        got, missed = 0, 0
        frames = rest
        with trio.fail_after(10):
            while got + missed < said + 1:
                frames += bytes(await slow.receive_some(1_000_000))
                while (frame := _frame(frames)) is not None:
                    opcode, payload, frames = frame
                    if opcode == 1:
                        assert payload.startswith(b'{"missed":')
                        missed += int(payload[10:-1])
                    else:
                        got += len(payload)
        assert missed > 1_000_000
        assert got + missed == said + 1


def _frame(data: bytes) -> tuple[int, bytes, bytes] | None:
    """The first of a server's frames: opcode, payload, the rest."""
    if len(data) < 10:
        return None
    size, start = data[1], 2
    if size == 126:
        size, start = int.from_bytes(data[2:4], "big"), 4
    elif size == 127:
        size, start = int.from_bytes(data[2:10], "big"), 10
    if len(data) < start + size:
        return None
    return data[0] & 15, data[start : start + size], data[start + size :]


async def test_the_end_of_the_boot_and_of_the_vm_are_reported(desk: Desk) -> None:
    async with websocket(desk.url()) as socket:
        desk.say(b"last words")
        assert await read(socket, 10) == b"last words"
        desk.shut.cancel()
        assert await end(socket) == (1000, "the VM is crashed")
    await desk.api.client.delete("/api/v1/vms/demo")
    async with websocket(desk.url()) as late:
        assert await end(late) == (1000, "the VM is deleted")


async def test_the_stop_of_the_daemon_closes_with_1001(desk: Desk) -> None:
    async with websocket(desk.url("?write=true")) as socket:
        desk.api.server.stopping.set()
        assert (await end(socket))[0] == 1001


async def test_a_missing_console_is_an_error_instead_of_the_upgrade(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await served.crashed("demo")
        for path, status in (("demo/console", 409), ("nobody/console", 404), ("demo/console?tail=x", 400)):
            assert (await served.server.get(f"/ws/v1/vms/{path}", **UPGRADE)).status == status
        assert (await served.client.get("/ws/v1/vms/demo/console")).status_code == 426


@asynccontextmanager
async def plugged(desk: Desk) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(str(desk.socket)) as stream:
        yield stream


async def receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while len(data) < count and (piece := await stream.receive_some(count - len(data))):
            data += bytes(piece)
    return data


async def test_the_socket_gives_the_same_bytes_and_its_first_byte_takes_the_keyboard(desk: Desk) -> None:
    assert stat.S_IMODE(desk.socket.stat().st_mode) == 0o600
    desk.say(b"line\r\n# ")
    await until(lambda: desk.serial._fed == 8)
    async with plugged(desk) as stream:
        assert await receive(stream, 8) == b"line\r\n# "
        async with websocket(desk.url("?write=true")) as socket:
            await socket.send_message(b"a")
            assert await desk.heard(1) == b"a"
        await until(lambda: desk.serial._keyboard is None)
        await stream.send_all(b"b\xff")
        assert await desk.heard(2) == b"b\xff"
        desk.say(b"echo")
        assert await receive(stream, 4) == b"echo"
        async with plugged(desk) as second:
            await receive(second, 12)
            await second.send_all(b"c")
            assert await receive(second, 1) == b""
        desk.shut.cancel()
        assert await receive(stream, 1) == b""
    await until(lambda: not desk.socket.exists())


async def test_a_socket_has_few_places_and_an_abandoned_one_is_free_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_serial, "_SOCKET_LINGER_S", 0.05)
    streams = [await trio.open_unix_socket(str(desk.socket)) for _ in range(9)]
    await until(lambda: desk.serial._connections == 8)
    assert await receive(streams[8], 1) == b""
    await streams[0].send_eof()
    assert await receive(streams[0], 1) == b""
    await until(lambda: desk.serial._connections == 7)
    for stream in streams:
        await stream.aclose()
    await until(lambda: desk.serial._connections == 0)


async def test_what_a_killed_daemon_left_is_no_obstacle(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "console.sock"))
    async with at_desk(tmp_path) as desk, plugged(desk) as stream:
        desk.say(b"here")
        assert await receive(stream, 4) == b"here"
