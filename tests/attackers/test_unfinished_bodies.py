"""Clients that never finish their large bodies fill no memory and block no ordinary request."""

from __future__ import annotations

import http.client
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.api.kit import FAST, Api, api, read_answer, request
from tests.system.kit import Daemon
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
                    with trio.fail_after(5):
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
