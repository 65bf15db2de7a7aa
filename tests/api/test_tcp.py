"""A WebSocket is a TCP connection into the guest: bytes, both ends, half close and how it breaks.

The agent is the real one, as in `test_relay`; what listens is the test's.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.api.kit import UPGRADE, api, request, until, websocket
from tests.api.test_relay import Guest, guest
from tests.ports import free_port

Handler = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[int]:
    async def guarded(stream: trio.SocketStream) -> None:
        try:
            await handler(stream)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, guarded, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def silent(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


def url(at: Guest, port: int | str) -> str:
    return at.url(f"/ws/v1/vms/demo/tcp/{port}")


async def message(connection: WebSocketConnection) -> bytes:
    with trio.fail_after(10):
        got = await connection.get_message()
    assert isinstance(got, bytes)
    return got


async def drained(connection: WebSocketConnection) -> None:
    while True:
        await connection.get_message()


async def code(connection: WebSocketConnection) -> int:
    with trio.fail_after(10):
        with pytest.raises(ConnectionClosed) as closed:
            await drained(connection)
    assert closed.value.reason is not None
    return int(closed.value.reason.code)


async def digest_at_the_end(stream: trio.SocketStream) -> None:
    """Answers only when its peer has said that nothing more comes."""
    digest = hashlib.sha256()
    async for data in stream:
        digest.update(data)
    await stream.send_all(digest.digest())
    await stream.send_eof()


async def test_bytes_and_the_end_of_each_direction_pass(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    async with guest(tmp_path) as at, listening(digest_at_the_end) as port:
        async with websocket(url(at, port)) as connection:
            for start in range(0, len(data), 65536):
                await connection.send_message(data[start : start + 65536])
            await connection.send_message(b"")
            got = b""
            while piece := await message(connection):
                got += piece
            assert got == hashlib.sha256(data).digest()
            assert await code(connection) == 1000


async def test_the_guests_end_leaves_the_other_direction_open(tmp_path: Path) -> None:
    heard = trio.Event()

    async def ends_first(stream: trio.SocketStream) -> None:
        await stream.send_all(b"bye")
        await stream.send_eof()
        assert await stream.receive_some() == b"and you"
        assert await stream.receive_some() == b""
        heard.set()

    async with guest(tmp_path) as at, listening(ends_first) as port:
        async with websocket(url(at, port)) as connection:
            assert await message(connection) == b"bye"
            assert await message(connection) == b""
            await connection.send_message(b"and you")
            await connection.send_message(b"")
            assert await code(connection) == 1000
            with trio.fail_after(20):
                await heard.wait()


async def test_a_client_that_stops_reading_slows_only_its_guest(tmp_path: Path) -> None:
    sent = 0

    async def pours(stream: trio.SocketStream) -> None:
        nonlocal sent
        while True:
            await stream.send_all(b"x" * 65536)
            sent += 65536

    async with guest(tmp_path) as at, listening(pours) as port:
        async with await at.api.server.connect() as slow:
            await slow.send_all(request("GET", f"/ws/v1/vms/demo/tcp/{port}", **UPGRADE))
            before = -1
            with trio.fail_after(20):
                while sent != before or not sent:
                    before = sent
                    assert (await at.client.get("/healthz")).status_code == 200
                    await trio.sleep(0.2)
            assert sent < 50_000_000


@pytest.mark.parametrize(("messages", "expected"), [(["text"], 1003), ([b"", b"more"], 1002), ([b"x" * 65_537], 1009)])
async def test_messages_that_break_the_protocol_are_refused(
    tmp_path: Path, messages: list[bytes | str], expected: int
) -> None:
    async with guest(tmp_path) as at, listening(silent) as port:
        async with websocket(url(at, port)) as connection:
            for each in messages:
                await connection.send_message(each)
            assert await code(connection) == expected


async def test_the_guest_notices_that_a_client_vanishes(tmp_path: Path) -> None:
    ended = trio.Event()

    async def waits(stream: trio.SocketStream) -> None:
        try:
            await stream.receive_some()
        finally:
            ended.set()

    async with guest(tmp_path) as at, listening(waits) as port:
        async with websocket(url(at, port)) as connection:
            await trio.aclose_forcefully(connection._stream)
            await until(ended.is_set)


async def test_the_stop_of_the_daemon_closes_with_1001(tmp_path: Path) -> None:
    async with guest(tmp_path) as at, listening(silent) as port:
        async with websocket(url(at, port)) as connection:
            at.api.server.stopping.set()
            assert await code(connection) == 1001


async def test_an_error_comes_instead_of_the_upgrade(tmp_path: Path) -> None:
    nobody = free_port()
    async with guest(tmp_path) as at:
        for path, status in ((nobody, 502), (0, 400), (65536, 400), ("x", 400), (f"{nobody}?x=1", 400)):
            answer = await at.api.server.get(f"/ws/v1/vms/demo/tcp/{path}", **UPGRADE)
            assert answer.status == status, path
        assert (await at.client.get(f"/ws/v1/vms/demo/tcp/{nobody}")).status_code == 426


async def test_no_such_vm_or_one_that_is_down(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        await served.crashed("demo")
        for name, status in (("demo", 409), ("nobody", 404), ("%2F", 404)):
            assert (await served.server.get(f"/ws/v1/vms/{name}/tcp/80", **UPGRADE)).status == status
