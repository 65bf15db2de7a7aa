"""The feed of a log goes on over connections without repeating or losing a line."""

from __future__ import annotations

import socket
import struct

import pytest
import trio

from volant.client import Client, ClientProblem, ConnectionLost, LogGap, LogLine

from .kit import Handler, Request, log_line, problem, send_head, serving, websocket

PATH = "/ws/v1/vms/demo/logs"


async def test_a_log_resumes_at_its_line_and_stays_with_its_vm() -> None:
    async with serving() as server, Client(server.base_url, api_key="k") as client:
        server.routes[f"GET {PATH}"] = [
            websocket(log_line(3), log_line(4, partial=True), code=1001),
            websocket(log_line(4), {"gap": {"from": 5, "to": 8}}, log_line(9), code=None),
            problem(503, "daemon-starting", "soon"),
            websocket(log_line(10, "\udcff".encode("utf-8", "replace").decode()), code=1000),
        ]
        async with client.vms.logs("demo", tail=2, streams=["console", "stdout"]) as feed:
            with trio.fail_after(10):
                items = [item async for item in feed]
    seen = [item.seq if isinstance(item, LogLine) else (item.gap.first, item.gap.last) for item in items]
    assert seen == [3, 4, (5, 8), 9, 10]
    assert isinstance(items[1], LogLine)
    assert items[1].partial
    first, second, third, fourth = server.asked(PATH)
    assert dict(first.query) == {"tail": "2", "follow": "true", "stream": "console,stdout"}
    assert dict(second.query) == {"since": "4", "follow": "true", "stream": "console,stdout", "vm_id": "7"}
    assert third.param("since") == fourth.param("since") == "9"
    assert first.headers["x-volant-api-key"] == "k"


async def _ended(request: Request, stream: trio.abc.Stream) -> None:
    """A daemon that stops before it has answered."""


async def _reset(request: Request, stream: trio.abc.Stream) -> None:
    """A daemon that is killed before it has answered."""
    assert isinstance(stream, trio.SocketStream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _cut(request: Request, stream: trio.abc.Stream) -> None:
    """A daemon that is killed while it answers."""
    await send_head(stream, 503, Content_Length="100")


@pytest.mark.parametrize("lost", [_ended, _reset, _cut])
async def test_a_connection_that_ends_before_its_answer_is_made_again_at_once(lost: Handler) -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [websocket(log_line(1), code=1001), lost, websocket(log_line(2), code=1000)]
        with trio.fail_after(10):
            async with client.vms.logs("demo") as feed:
                items = [item async for item in feed]
    assert [item.seq for item in items if isinstance(item, LogLine)] == [1, 2]


async def test_a_first_connection_that_ends_before_its_answer_is_an_error() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = _ended
        with pytest.raises(ConnectionLost, match="broke"), trio.fail_after(10):
            async with client.vms.logs("demo"):
                pytest.fail("entered")


async def test_a_gap_at_the_start_is_reported_once() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [
            websocket({"gap": {"from": 1, "to": 8}}, code=None),
            websocket(code=1000),
        ]
        async with client.vms.logs("demo", since=0) as feed:
            with trio.fail_after(10):
                items = [item async for item in feed]
    assert [type(item) for item in items] == [LogGap]
    assert server.asked(PATH)[1].param("since") == "8"


async def test_no_vm_is_a_problem_where_the_block_is_entered() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = problem(404, "vm-not-found", "no VM", hint="list them")
        with pytest.raises(ClientProblem, match="no VM") as caught:
            async with client.vms.logs("demo"):
                pytest.fail("entered")
    assert caught.value.hint == "list them"


async def test_leaving_the_block_leaves_the_daemon() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = websocket(log_line(1), stay=True)
        with trio.fail_after(20):
            async with client.vms.logs("demo") as feed:
                assert isinstance(await feed.receive(), LogLine)
