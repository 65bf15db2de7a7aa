"""Clients that never finish their large bodies fill no memory and block no ordinary request."""

from __future__ import annotations

import http.client
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from msgspec.structs import replace

from tests.api.kit import FAST, Api, api, read_answer, read_head, request
from tests.system.kit import Daemon
from volant.http import Call, receive_into
from volant.http._bodies import Bodies
from volant.model import Problem

MIB = 1024 * 1024
CLIENTS = 200
RSS_MB = 120
"""16 MiB for the budget, plus 200 connections, their requests and Python's allocator."""
PATHS = ("/api/v1/vms", "/api/v1/plugins", "/api/v1/mcp", "/api/v1/agui", "/api/v1/system/backup")
JSON = {"Content_Type": "application/json"}


@asynccontextmanager
async def unfinished(at: Api, path: str, size: int) -> AsyncIterator[trio.SocketStream]:
    """Returns a request without the last byte of its body."""
    async with await at.server.connect() as stream:
        await stream.send_all(request("POST", path, Content_Length=str(size), **JSON) + b" " * (size - 1))
        yield stream


@pytest.mark.parametrize("path", PATHS)
async def test_large_bodies_share_one_budget_and_small_ones_need_none(tmp_path: Path, path: str) -> None:
    limits = replace(FAST, bodies=100_000, small_body=4096)
    async with api(tmp_path, limits=limits) as at, AsyncExitStack() as clients:
        await clients.enter_async_context(unfinished(at, "/api/v1/mcp", 60_000))
        refused = await clients.enter_async_context(unfinished(at, path, 60_000))
        answer = await read_answer(refused)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1"), answer.body
        assert b"too-much-under-way" in answer.body
        for number in range(3):
            await at.create(f"vm-{number}")
        await clients.aclose()

        async def fits() -> bool:
            async with unfinished(at, path, 60_000) as stream:
                await stream.send_all(b" ")
                return (await read_answer(stream)).status in (400, 406)

        with trio.fail_after(10):
            while not await fits():  # noqa: ASYNC110 - what clients left is given back on its own
                await trio.sleep(0.01)


async def test_every_end_returns_the_budget(tmp_path: Path) -> None:
    async with api(tmp_path, limits=replace(FAST, bodies=100_000, small_body=0)) as at:
        for path in PATHS:
            for _ in range(5):
                # Malformed, too large, refused, and one whose client leaves.
                for body in (b" " * 60_000, b"{" * 60_000):
                    with trio.fail_after(30):
                        # The server hears a moment later that the last client has left.
                        while (answer := await at.server.ask(request("POST", path, body, **JSON))).status == 503:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                    assert answer.status in (400, 406), (path, answer.body)
                assert (await at.server.ask(request("POST", path, b"x" * (MIB + 1), **JSON))).status == 413
                async with unfinished(at, path, 60_000):
                    pass
            async with await at.server.connect() as stream:
                chunk = b"%x\r\n%s\r\n" % (150_000, b" " * 150_000)
                await stream.send_all(request("POST", path, Transfer_Encoding="chunked", **JSON) + chunk)
                assert (await read_answer(stream)).status == 503
        await at.create("demo")


class Kept:
    """What came of an upload."""

    def __init__(self) -> None:
        self.size = 0

    def expect(self, length: int) -> None:
        raise AssertionError("no length was said")

    async def write(self, data: bytes) -> None:
        self.size += len(data)


def upload(pieces: Iterable[bytes], pause_s: float) -> Call:
    """A request whose body comes in these pieces, each after a pause."""
    left = iter(pieces)

    async def receive() -> dict[str, Any]:
        await trio.sleep(pause_s)
        return {"type": "http.request", "body": next(left, b""), "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        raise AssertionError(message)

    return Call({"type": "http", "headers": []}, receive, send, "r", Bodies(FAST).share())


@pytest.mark.parametrize(
    ("size", "pause_s", "expected", "after_s"),
    [
        (1, 59.0, "less than 32768 bytes", 300.0),
        # 64 KiB in four minutes and three quarters would never end.
        (16 * 1024, 59.0, "less than 32768 bytes", 302.0),
        (200_000, 61.0, "no data of the body arrived", 60.0),
    ],
)
async def test_a_client_that_trickles_a_file_does_not_block_others(
    autojump_clock: trio.testing.MockClock, size: int, pause_s: float, expected: str, after_s: float
) -> None:
    began = trio.current_time()
    with pytest.raises(Problem, match=expected) as refused:
        await receive_into(upload(itertools.repeat(b"x" * size), pause_s), Kept())
    assert refused.value.status == 408
    assert trio.current_time() - began == pytest.approx(after_s, abs=1.0)


async def test_a_slow_upload_that_goes_on_may_take_any_time(autojump_clock: trio.testing.MockClock) -> None:
    kept = Kept()
    with trio.move_on_after(86_400):
        await receive_into(upload(itertools.repeat(b"x" * 2 * MIB), 59.0), kept)
    assert kept.size > 2000 * MIB


async def test_a_run_that_lasts_holds_nothing_of_the_budget(tmp_path: Path) -> None:
    history = msgspec.json.encode({"threadId": "t", "runId": "r", "messages": ["x" * 60_000]})
    async with api(tmp_path, limits=replace(FAST, bodies=100_000, small_body=0)) as at, AsyncExitStack() as runs:
        for _ in range(3):
            stream = await runs.enter_async_context(await at.server.connect())
            await stream.send_all(request("POST", "/api/v1/agui", history, **JSON))
            head, _ = await read_head(stream)
            assert head.startswith(b"HTTP/1.1 200 "), head


def test_the_free_part_of_a_body_counts_once() -> None:
    bodies = Bodies(replace(FAST, bodies=100, small_body=10))
    one, other = bodies.share(), bodies.share()
    for _ in range(10):
        one.take(1)
    one.take(60)
    with pytest.raises(Problem):
        other.take(51)
    other.take(50)
    with pytest.raises(Problem):
        one.take(1)
    other.release()
    one.take(40)
    one.release()
    other.take(110)


@pytest.mark.system
@pytest.mark.cold
async def test_two_hundred_unfinished_bodies_take_little_memory(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    port = int(daemon.base_url.rpartition(":")[2])

    def ask() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("GET", "/api/v1/vms")
            return connection.getresponse().status
        finally:
            connection.close()

    assert ask() == 200
    before = daemon.rss_mb()
    sent = 0
    most = before
    async with trio.open_nursery() as nursery:

        async def hold(path: str) -> None:
            nonlocal sent
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            try:
                async with stream:
                    await stream.send_all(request("POST", path, Content_Length=str(MIB), **JSON))
                    await stream.send_all(b" " * (MIB - 1))
                    sent += 1
                    await trio.sleep_forever()
            except trio.BrokenResourceError:
                sent += 1  # It was refused, and closed.

        for number in range(CLIENTS):
            nursery.start_soon(hold, PATHS[number % len(PATHS)])
        with trio.fail_after(25):
            while sent < CLIENTS:
                most = max(most, daemon.rss_mb())
                await trio.sleep(0.02)
        most = max(most, daemon.rss_mb())
        assert await trio.to_thread.run_sync(ask) == 200
        nursery.cancel_scope.cancel()
    print(f"{before:.0f} MiB before, at most {most:.0f} MiB")
    assert most - before < RSS_MB
