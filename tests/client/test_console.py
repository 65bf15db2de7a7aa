"""The client at a console and at a port, against the real API: nothing is lost without a word, ends are ends."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio

from tests.api.test_console import Desk, at_desk
from tests.api.test_relay import guest
from tests.api.test_tcp import digest_at_the_end, listening
from volant.client import Client, ClientProblem, Console, ConsoleGap, Reconnected


def client_of(desk: Desk) -> Client:
    return Client(f"http://127.0.0.1:{desk.api.server.port}")


async def read(console: Console, count: int) -> bytes:
    data = b""
    with trio.fail_after(20):
        while len(data) < count:
            piece = await console.receive()
            assert isinstance(piece, bytes)
            data += piece
    return data


async def test_a_console_is_read_typed_on_and_ends_with_its_reason(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk, client_of(desk) as client:
        desk.say(b"before\r\n# ")
        async with client.vms.console("demo", write=True) as console:
            assert await read(console, 10) == b"before\r\n# "
            await console.send(b"x" * 40_000)
            assert await desk.heard(40_000) == b"x" * 40_000
            desk.say(b"after")
            assert await read(console, 5) == b"after"
            desk.shut.cancel()
            with trio.fail_after(20), pytest.raises(trio.EndOfChannel):
                await console.receive()
            assert console.end == "the VM is crashed"


async def test_refusals_are_problems(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk, client_of(desk) as client:
        async with client.vms.console("demo", write=True, tail=0) as first:
            with pytest.raises(ClientProblem) as refused:
                async with client.vms.console("demo", write=True):
                    pytest.fail("two keyboards")
            assert (refused.value.status, refused.value.code) == (409, "keyboard-taken")
            async with client.vms.console("demo", take=True):
                with trio.fail_after(20), pytest.raises(ClientProblem, match="another client"):
                    await first.receive()
        async with client.vms.console("demo", tail=0) as reader:
            await reader.send(b"x")
            with trio.fail_after(20), pytest.raises(ClientProblem) as refused:
                await reader.receive()
            assert refused.value.code == "console-read-only"


async def test_a_gap_is_reported(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk, client_of(desk) as client:
        async with client.vms.console("demo", tail=0) as console:
            for _ in range(400):
                desk.serial.feed(b"x" * 60_000)
                await trio.lowlevel.checkpoint()
            got = missed = 0
            with trio.fail_after(10):
                while got + missed < 24_000_000:
                    piece = await console.receive()
                    if isinstance(piece, ConsoleGap):
                        missed += piece.missed
                    else:
                        assert isinstance(piece, bytes)
                        got += len(piece)
            assert missed


async def test_a_console_reconnects_after_a_lost_connection(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk, client_of(desk) as client:
        retries: list[str] = []
        async with client.vms.console(
            "demo", write=True, tail=0, on_retry=lambda error, delay_s: retries.append(str(error))
        ) as console:
            desk.say(b"one")
            assert await read(console, 3) == b"one"
            socket = console._state.socket
            assert socket is not None
            await trio.aclose_forcefully(socket._connection._stream)
            with trio.fail_after(10):
                assert await console.receive() == Reconnected()
            await console.send(b"typed")
            assert await desk.heard(5) == b"typed"
            desk.say(b"two")
            assert await read(console, 3) == b"two"
        assert retries


async def test_a_tcp_stream_has_two_ends(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    async with guest(tmp_path) as at, listening(digest_at_the_end) as port:
        async with Client(f"http://127.0.0.1:{at.api.server.port}") as client:
            async with client.vms.tcp("demo", port) as stream:
                with trio.fail_after(10):
                    await stream.send_all(data)
                    await stream.send_all(b"")
                    await stream.send_eof()
                    answer = b""
                    while piece := await stream.receive_some(7):
                        answer += piece
                assert answer == hashlib.sha256(data).digest()
                with pytest.raises(trio.ClosedResourceError):
                    await stream.send_all(b"more")
            with pytest.raises(ClientProblem) as refused:
                async with client.vms.tcp("demo", 1):
                    pytest.fail("nobody listens")
            assert (refused.value.status, refused.value.code) == (502, "port-unreachable")


async def test_a_tcp_stream_that_is_cut_off_is_broken_and_not_at_its_end(tmp_path: Path) -> None:
    async def silent(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with guest(tmp_path) as at, listening(silent) as port:
        async with Client(f"http://127.0.0.1:{at.api.server.port}") as client:
            async with client.vms.tcp("demo", port) as stream:
                at.api.server.stopping.set()
                with trio.fail_after(20), pytest.raises(trio.BrokenResourceError, match="stops"):
                    await stream.receive_some()
