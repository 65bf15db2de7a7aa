"""The feed of events loses none, or says so; its parser keeps to the standard however the stream is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
from hypothesis import given, strategies as st

from volant.client import Client, ClientProblem, ConnectionLost, Feed, StreamGap, UnexpectedAnswer, Unreachable
from volant.client._sse import Message, SseParser
from volant.model import Event, EventType

from .kit import Request, Server, answer, event, problem, serving, sse

PATH = "/api/v1/events/vms"
GAP = 'event: STREAM_GAP\nid: e-8\ndata: {"type":"STREAM_GAP","requested":"e-3","oldest":"e-9","newest":"e-20"}'

STREAM = (
    b'\xef\xbb\xbfretry: 1000\r\n\r\nid: 1\r\nevent: A\r\ndata: {"x":\r\ndata:1}\r\n\r\n: comment\rdata: \xc3\xa4\r\r'
    b"id: 3\n\nid: bad\0\nunknown: x\ndata\n\n"
)
MESSAGES = [
    Message("A", '{"x":\n1}', "1"),
    Message("message", "ä", "1"),
    Message("message", None, "3"),
    Message("message", "", "3"),
]


async def ids(feed: Feed[Event | StreamGap], count: int) -> list[str]:
    with trio.fail_after(20):
        items = [await feed.receive() for _ in range(count)]
    return [item.id if isinstance(item, Event) else item.type for item in items]


def start_at(server: Server, seq: int) -> None:
    server.routes["GET /api/v1/vms"] = answer([], Volant_Event_Id=f"e-{seq}")


async def test_events_begin_when_the_block_is_entered_even_if_the_first_connection_breaks() -> None:
    async with serving() as server, Client(server.base_url) as client:
        start_at(server, 4)
        server.routes[f"GET {PATH}"] = [sse(), sse(event(5), stay=True)]
        async with client.events(vm="demo", types=["VM_RUNNING"], labels={"a": "b"}) as feed:
            assert await ids(feed, 1) == ["e-5"]
    assert [request.headers["last-event-id"] for request in server.asked(PATH)] == ["e-4", "e-4"]
    assert server.asked(PATH)[1].query == [("vm", "demo"), ("types", "VM_RUNNING"), ("label", "a=b")]


async def test_a_feed_resumes_after_the_last_event_and_passes_on_gaps() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [
            sse("retry: 50", event(2), event(3) + "\n: cut off here"),
            problem(503, "daemon-stopping", "soon"),
            sse(event(3), GAP, event(9), "id: e-15", stay=False),
            sse(event(16), stay=True),
        ]
        retries: list[str] = []
        async with client.events(after="e-1", on_retry=lambda error, delay_s: retries.append(str(error))) as feed:
            assert await ids(feed, 6) == ["e-2", "e-3", "e-3", "STREAM_GAP", "e-9", "e-16"]
    assert [request.headers["last-event-id"] for request in server.asked(PATH)] == ["e-1", "e-3", "e-3", "e-15"]
    assert len(retries) == 3


async def test_the_oldest_kept_event_is_requested_by_parameter() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [sse(event(1)), sse(event(2), stay=True)]
        async with client.events(after="0") as feed:
            assert await ids(feed, 2) == ["e-1", "e-2"]
    first, second = server.asked(PATH)
    assert first.param("since") == "0"
    assert "last-event-id" not in first.headers
    assert second.headers["last-event-id"] == "e-1"


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with serving() as server, Client(server.base_url) as client:
        start_at(server, 0)
        go_on = trio.Event()

        async def slow(request: Request, stream: trio.abc.Stream) -> None:
            await sse(event(1))(request, stream)
            await go_on.wait()
            await stream.send_all(event(2).encode() + b"\n\n")
            await trio.sleep_forever()

        server.routes[f"GET {PATH}"] = slow
        async with client.events() as feed:
            assert await ids(feed, 1) == ["e-1"]
            with trio.move_on_after(0.01):
                await feed.receive()
            go_on.set()
            assert await ids(feed, 1) == ["e-2"]
    assert len(server.asked(PATH)) == 1


async def test_types_of_newer_daemons_are_left_out() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = sse(event(1, "VM_TELEPORTED"), event(2), stay=True)
        async with client.events(after="e-0") as feed:
            item = await feed.receive()
    assert isinstance(item, Event)
    assert item.type is EventType.VM_RUNNING


async def test_reconnecting_ends_after_patience_s() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [sse(event(1)), *[sse() for _ in range(50)]]
        async with client.events(after="e-0", patience_s=0.3) as feed:
            assert await ids(feed, 1) == ["e-1"]
            with trio.fail_after(20), pytest.raises(ConnectionLost):
                await feed.receive()
            with pytest.raises(ConnectionLost):
                await feed.receive()


async def test_a_refusal_ends_the_feed_with_its_reason() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = [sse(event(1)), problem(410, "events-gone", "not kept")]
        async with client.events(after="e-0") as feed:
            assert await ids(feed, 1) == ["e-1"]
            with trio.fail_after(20), pytest.raises(ClientProblem, match="not kept"):
                await feed.receive()


async def test_a_failure_of_the_first_connection_is_raised_where_the_block_is_entered() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = problem(400, "invalid-request", "no", field="types")
        with pytest.raises(ClientProblem, match="no"):
            async with client.events(after="e-0"):
                pytest.fail("entered")
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(Unreachable):
            async with client.events():
                pytest.fail("entered")


async def test_the_blocks_own_error_leaves_it_in_no_group() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = sse(stay=True)
        with pytest.raises(ZeroDivisionError):
            async with client.events(after="e-0"):
                raise ZeroDivisionError


async def test_a_malformed_event_ends_the_feed() -> None:
    async with serving() as server, Client(server.base_url) as client:
        server.routes[f"GET {PATH}"] = sse("event: VM_RUNNING\ndata: {}", stay=True)
        async with client.events(after="e-0") as feed:
            with trio.fail_after(20), pytest.raises(UnexpectedAnswer):
                await feed.receive()


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_messages_do_not_depend_on_how_the_stream_is_cut(cuts: list[int]) -> None:
    parser = SseParser()
    places = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:end] for start, end in pairwise(places)]
    assert [message for chunk in chunks for message in parser.feed(chunk)] == MESSAGES
    assert parser.retry_s == 1.0


def test_an_incomplete_tail_is_no_message() -> None:
    assert SseParser().feed(b"id: 1\ndata: x\n") == []


def test_a_block_without_end_takes_no_more_than_4_mib() -> None:
    parser = SseParser()
    for _ in range(63):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")
    with pytest.raises(ValueError, match="larger than 4 MiB"):
        parser.feed(b"data: " + b"x" * 65536 + b"\n")


def test_many_small_blocks_are_not_taken_for_one_large() -> None:
    parser = SseParser()
    assert sum(len(parser.feed(b"data: x\n\n" * 7000)) for _ in range(100)) == 700_000
