"""A VM's log over WebSocket and HTTP: tail, since, follow, streams; and its end."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.api.kit import UPGRADE, Api, api, read_head, request, streamed, until, websocket
from tests.names import named
from volant.logs import LogEntry, LogStream, VmLog


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    async with api(tmp_path) as running:
        await running.crashed("demo")
        yield running


def open_log(served: Api, name: str = "demo") -> VmLog:
    row = served.deps.store.projection.get(named(name))
    assert row is not None
    return served.deps.logs.open(row.id, named(row.name))


def say(served: Api, lines: Sequence[str], stream: LogStream = "stdout") -> None:
    now = served.deps.host.clock.now()
    open_log(served).append(
        [LogEntry(stream=stream, line=line.encode(), timestamp=now, source="test", position=0) for line in lines]
    )


def url(served: Api, query: str = "") -> str:
    return f"ws://127.0.0.1:{served.server.port}/ws/v1/vms/demo/logs{query}"


async def lines(socket: WebSocketConnection, count: int) -> list[str]:
    with trio.fail_after(10):
        return [json.loads(await socket.get_message())["line"] for _ in range(count)]


async def over_http(served: Api, query: str = "") -> list[dict[str, Any]]:
    answer = await served.client.get(f"/api/v1/vms/demo/logs{query}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_websocket_tails_and_follows(served: Api) -> None:
    say(served, [f"line {number}" for number in range(150)])
    async with websocket(url(served)) as socket:
        assert await lines(socket, 100) == [f"line {number}" for number in range(50, 150)]
        say(served, ["new", "", "ä€\N{GRINNING FACE}", "x" * 70, "y" * 40_000, "z" * 65_536])
        assert await lines(socket, 6) == ["new", "", "ä€\N{GRINNING FACE}", "x" * 70, "y" * 40_000, "z" * 65_536]


async def test_a_frame_has_the_members_of_the_contract(served: Api) -> None:
    say(served, ["hello"])
    async with websocket(url(served, "?tail=1")) as socket:
        frame = json.loads(await socket.get_message())
    row = served.deps.store.projection.get(named("demo"))
    assert row is not None
    assert set(frame) == {"name", "vm_id", "stream", "line", "timestamp", "seq"}
    assert (frame["name"], frame["vm_id"], frame["stream"], frame["line"]) == ("demo", row.id, "stdout", "hello")


async def test_a_websocket_continues_after_a_number(served: Api) -> None:
    say(served, ["a", "b", "c"])
    since = open_log(served).newest - 2
    async with websocket(url(served, f"?since={since}&tail=1&follow=false")) as socket:
        assert await lines(socket, 2) == ["b", "c"]
        with pytest.raises(ConnectionClosed) as raised:
            await socket.get_message()
        assert raised.value.reason is not None
        assert raised.value.reason.code == 1000


async def test_streams_are_chosen(served: Api) -> None:
    say(served, ["out"])
    say(served, ["err"], "stderr")
    say(served, ["con"], "console")
    got = await over_http(served, "?stream=stderr,console")
    assert [frame["line"] for frame in got if frame["line"] in ("out", "err", "con")] == ["err", "con"]
    assert [frame["line"] for frame in await over_http(served, "?stream=stderr&tail=5")] == ["err"]


async def test_http_gives_everything_kept_and_ends(served: Api) -> None:
    say(served, [f"line {number}" for number in range(20_000)])
    got = await over_http(served, "?stream=stdout")
    assert [frame["line"] for frame in got] == [f"line {number}" for number in range(20_000)]
    assert [frame["line"] for frame in await over_http(served, "?tail=2")] == ["line 19998", "line 19999"]
    assert await over_http(served, "?since=2199-01-01T00:00:00Z") == []


async def test_http_follows_when_asked(served: Api) -> None:
    async with streamed(served.server, "/api/v1/vms/demo/logs?follow=true&tail=0") as body:
        say(served, ["now"])
        assert json.loads(await body.more())["line"] == "now"


async def test_the_end_of_the_vm_closes_with_1000_and_its_log_stays(served: Api) -> None:
    say(served, ["last words"])
    vm_id = open_log(served).vm_id
    async with websocket(url(served, "?tail=1")) as socket:
        assert await lines(socket, 1) == ["last words"]
        assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
        with trio.fail_after(20), pytest.raises(ConnectionClosed) as raised:
            await lines(socket, 1000)
        assert raised.value.reason is not None
        assert raised.value.reason.code == 1000
    assert (await served.client.get("/api/v1/vms/demo/logs")).status_code == 404
    assert "last words" in [frame["line"] for frame in await over_http(served, f"?vm_id={vm_id}")]
    assert (await served.client.get(f"/api/v1/vms/other/logs?vm_id={vm_id}")).status_code == 404


async def test_the_stop_of_the_daemon_closes_with_1001(served: Api) -> None:
    async with websocket(url(served, "?tail=0")) as socket:
        served.server.stopping.set()
        with trio.fail_after(20), pytest.raises(ConnectionClosed) as raised:
            await socket.get_message()
        assert raised.value.reason is not None
        assert raised.value.reason.code == 1001


async def test_a_reader_that_sends_messages_and_disconnects_is_forgotten(served: Api) -> None:
    stream = await served.server.connect()
    await stream.send_all(request("GET", "/ws/v1/vms/demo/logs?tail=0", **UPGRADE))
    await read_head(stream)
    for _ in range(2000):
        await stream.send_all(b"\x81\x85\0\0\0\0hello")
    await trio.aclose_forcefully(stream)
    await until(lambda: not open_log(served).statistics().readers)


async def test_a_reader_that_does_not_read_costs_nothing_that_grows(served: Api) -> None:
    async with await served.server.connect() as stream:
        await stream.send_all(request("GET", "/ws/v1/vms/demo/logs?tail=0", **UPGRADE))
        await read_head(stream)
        for _ in range(100):
            say(served, ["x" * 1000] * 200)
            await trio.lowlevel.checkpoint()
        assert len(await over_http(served, "?tail=3")) == 3
        assert (await served.client.get("/healthz")).status_code == 200
