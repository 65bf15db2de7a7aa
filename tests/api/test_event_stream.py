"""Events over SSE: in order, resumed without a hole, and what is lost is said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio.testing

from tests.api.kit import Api, Body, api, read_head, read_to_end, request, streamed, until
from volant.api import _events
from volant.http import ApiSettings


class Blocks:
    """The blocks of an event stream, one at a time."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._buffer = b""

    async def next(self) -> dict[str, str]:
        while b"\n\n" not in self._buffer:
            data = await self._body.more()
            assert data, "the stream has ended"
            self._buffer += data
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        return dict(line.split(": ", 1) for line in block.decode().split("\n"))

    async def event(self) -> dict[str, Any]:
        """The next block that is an event, checked."""
        block = await self.next()
        while set(block) <= {"id", "retry"}:
            block = await self.next()
        data = dict(json.loads(block["data"]))
        assert data["type"] == block["event"]
        if data["type"] != "STREAM_GAP":
            assert data["id"] == block["id"]
        return data

    async def events(self, count: int) -> list[dict[str, Any]]:
        return [await self.event() for _ in range(count)]

    async def rest(self) -> bytes:
        while data := await self._body.more():
            self._buffer += data
        return self._buffer


@asynccontextmanager
async def stream(served: Api, query: str = "", **headers: str) -> AsyncIterator[Blocks]:
    async with streamed(served.server, f"/api/v1/events/vms{query}", **headers) as body:
        assert body.status == 200
        assert body.headers["content-type"].startswith("text/event-stream")
        assert body.headers["cache-control"] == "no-cache, no-transform"
        assert body.headers["x-accel-buffering"] == "no"
        blocks = Blocks(body)
        assert await blocks.next() == {"retry": "1000"}
        yield blocks


async def test_a_stream_begins_now(served: Api) -> None:
    await served.crashed("before")
    async with stream(served) as blocks:
        await served.crashed("demo")
        events = await blocks.events(3)
    assert [event["type"] for event in events] == ["VM_CREATED", "VM_STARTING", "VM_CRASHED"]
    assert {event["name"] for event in events} == {"demo"}
    assert events[2]["reason"]["code"]
    numbers = [int(event["id"].rpartition("-")[2]) for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + 3))


async def test_readers_at_different_places_get_the_same_events(served: Api) -> None:
    await served.crashed("one")
    async with stream(served, "?since=0") as first, stream(served, "?since=0") as second, stream(served) as late:
        await served.crashed("two")
        events = await first.events(6)
        assert await second.events(6) == events
        assert await late.events(3) == events[3:]


async def test_a_client_of_http_1_0_gets_events_without_chunks(served: Api) -> None:
    async with await served.server.connect() as client:
        await client.send_all(b"GET /api/v1/events/vms HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        head, data = await read_head(client)
        assert b"chunked" not in head.lower()
        await served.crashed("demo")
        with trio.fail_after(10):
            while data.count(b"\ndata: ") < 3 or not data.endswith(b"\n\n"):
                data += await client.receive_some(65536)
        assert [block.partition(b":")[0] for block in data.split(b"\n\n")] == [b"retry", b"id", b"id", b"id", b""]


async def test_a_stream_resumes_after_an_id(served: Api) -> None:
    await served.crashed("demo")
    async with stream(served, "?since=0") as blocks:
        events = await blocks.events(3)
    first, second = events[0]["id"], events[1]["id"]
    for query, headers in (
        ("", {"Last_Event_ID": first}),
        (f"?last_event_id={first}", {}),
        (f"?since={first}", {}),
        (f"?since=0&last_event_id={first}", {}),
        (f"?since=0&last_event_id={second}", {"Last_Event_ID": first}),
    ):
        async with stream(served, query, **headers) as blocks:
            assert [event["id"] for event in await blocks.events(2)] == [event["id"] for event in events[1:]]


@pytest.mark.parametrize("given", ["nonsense", "0000-1", "{epoch}-999999", "-", "{epoch}--1"])
async def test_an_id_that_is_not_known_is_a_gap_then_the_oldest(served: Api, given: str) -> None:
    await served.crashed("demo")
    epoch = served.deps.store.events.epoch
    given = given.format(epoch=epoch)
    async with stream(served, f"?last_event_id={given}") as blocks:
        gap = await blocks.event()
        assert gap["type"] == "STREAM_GAP"
        assert gap["requested"] == given
        assert (gap["oldest"], gap["newest"]) == (f"{epoch}-1", f"{epoch}-3")
        assert (await blocks.event())["id"] == f"{epoch}-1"
    answer = await served.client.get(f"/api/v1/events/vms?on_gap=410&last_event_id={given}")
    assert answer.status_code == 410
    assert f"{epoch}-1" in answer.json()["hint"]


async def test_no_gap_is_reported_where_there_is_none(served: Api) -> None:
    for query in ("?since=0&on_gap=410", "?on_gap=410", f"?on_gap=410&since={served.deps.store.events.newest}"):
        async with stream(served, query) as blocks:
            await served.crashed(f"vm{len(query)}")
            assert (await blocks.event())["type"] == "VM_CREATED"


async def test_a_stream_is_filtered(served: Api) -> None:
    await served.crashed("one", labels={"team": "a"})
    await served.crashed("two", labels={"team": "b", "tier": "x"})
    for query, expected in (
        ("vm=two", ["VM_CREATED", "VM_STARTING", "VM_CRASHED"]),
        ("types=VM_CRASHED", ["VM_CRASHED", "VM_CRASHED"]),
        ("types=VM_CRASHED,VM_CREATED&vm=one", ["VM_CREATED", "VM_CRASHED"]),
        ("label=team=b&types=VM_STARTING", ["VM_STARTING"]),
        ("label=team=b&label=tier=x&types=VM_STARTING", ["VM_STARTING"]),
    ):
        async with stream(served, f"?since=0&{query}") as blocks:
            assert [event["type"] for event in await blocks.events(len(expected))] == expected


async def test_a_filtered_reader_keeps_up(served: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_events, "KEEP_UP_S", 0.05)
    async with stream(served, "?vm=nobody") as blocks:
        await served.crashed("demo")
        newest = str(served.deps.store.events.newest)
        while (block := await blocks.next()) != {"id": newest}:
            assert set(block) == {"id"}


async def test_a_stream_ends_cleanly_and_with_the_newest_id_when_the_daemon_stops(served: Api) -> None:
    async with stream(served, "?vm=nobody") as blocks:
        await served.crashed("demo")
        await trio.testing.wait_all_tasks_blocked(0.01)
        served.server.stopping.set()
        assert await blocks.rest() == f"id: {served.deps.store.events.newest}\n\n".encode()


async def test_a_reader_that_leaves_is_forgotten(served: Api) -> None:
    async with stream(served):
        assert served.deps.store.events.statistics().readers == 1
    await until(lambda: not served.deps.store.events.statistics().readers)


async def test_an_event_names_the_caller_of_the_change(tmp_path: Path) -> None:
    key = "k3y-0123456789abcdef"
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    async with api(tmp_path, ApiSettings(api_keys=(key,))) as served:
        served.client.headers["X-Volant-API-Key"] = key
        await served.crashed("demo")
        await served.client.post("/api/v1/vms/demo/stop")
        body = {"command": "volant.vms.delete", "params": {"name": "demo"}}
        assert (await served.client.post("/api/v1/mcp", json=body)).json()["error"] == ""
        async with stream(served, "?since=0", X_Volant_API_Key=key) as blocks:
            events: list[Any] = []
            while not events or events[-1]["type"] != "VM_DELETED":
                events.append(await blocks.event())
        callers = {event["status"] or "gone": event.get("caller") for event in events}
        me = f"127.0.0.1 key {digest}"
        # The daemon itself has made it crash.
        assert callers.pop("crashed") is None
        assert {callers.pop(status) for status in ("pending", "stopped", "deleting")} == {me}
        assert key not in json.dumps(events)


async def test_a_client_that_has_half_closed_makes_a_vm_and_follows_the_events(served: Api) -> None:
    async with await served.server.connect() as stream:
        await stream.send_all(request("GET", "/api/v1/events/vms", Accept="text/event-stream"))
        await stream.send_eof()
        await read_head(stream)
        async with await served.server.connect() as other:
            await other.send_all(request("POST", "/api/v1/vms", b'{"name": "demo"}', Content_Type="application/json"))
            await other.send_eof()
            assert (await read_to_end(other)).startswith(b"HTTP/1.1 201 ")
        events = b""
        with trio.fail_after(10):
            while b"VM_CREATED" not in events:
                events += await stream.receive_some(65536)
        assert served.deps.store.events.statistics().readers == 1
    # Both directions are closed now.
    await until(lambda: not served.deps.store.events.statistics().readers)
