"""QMP with a peer that answers in any way."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from volant.host._host import LinuxRandom
from volant.hypervisor.qemu._qmp import LINE_LIMIT, QmpClient, QmpLost, QmpRefused

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'


class Peer:
    """QEMU's side of the socket."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        ours, self.stream = trio.testing.memory_stream_pair()
        self.client = QmpClient(ours, lambda name, data: self.events.append((name, data)), LinuxRandom())
        self.first = 0
        """The number of the first command after the negotiation; the next has the next."""

    async def say(self, *lines: bytes) -> None:
        for line in lines:
            await self.stream.send_all(line + b"\n")

    async def heard(self) -> bytes:
        return bytes(await self.stream.receive_some())

    async def start(self, nursery: trio.Nursery) -> None:
        await self.stream.send_all(GREETING)
        async with trio.open_nursery() as starting:
            starting.start_soon(nursery.start, self.client.start)
            asked = json.loads(await self.heard())
            assert asked["execute"] == "qmp_capabilities"
            await self.say(b'{"event": "RESUME"}', b'{"return": {}, "id": %d}' % asked["id"])
        self.first = asked["id"] + 1


async def test_answers_match_their_commands_with_events_in_between(nursery: trio.Nursery) -> None:
    peer = Peer()
    await peer.start(nursery)
    results: dict[str, Any] = {}

    async def run(command: str) -> None:
        results[command] = await peer.client.execute(command, {"a": 1} if command == "one" else None)

    async with trio.open_nursery() as commands:
        commands.start_soon(run, "one")
        await trio.testing.wait_all_tasks_blocked()
        commands.start_soon(run, "two")
        await trio.testing.wait_all_tasks_blocked()
        assert (await peer.heard()).splitlines() == [
            b'{"execute":"one","id":%d,"arguments":{"a":1}}' % peer.first,
            b'{"execute":"two","id":%d}' % (peer.first + 1),
        ]
        await peer.say(
            b'{"return": "second", "id": %d}' % (peer.first + 1),
            b'{"event": "STOP", "data": {"x": 1}}',
            b'{"return": "nobody\'s", "id": %d}' % (peer.first + 99),
            b'{"return": {"first": true}, "id": %d}' % peer.first,
        )
    assert results == {"one": {"first": True}, "two": "second"}
    assert peer.events == [("RESUME", {}), ("STOP", {"x": 1})]


async def test_events_without_end_delay_neither_an_answer_nor_another_task(nursery: trio.Nursery) -> None:
    """A guest can cause events as fast as QEMU writes them."""
    peer = Peer()
    await peer.start(nursery)
    event = b'{"event": "STOP", "data": {"x": "%s"}}\n' % (b"x" * 1000)
    most = 2**16 // len(event) + 1  # in one read
    answers: list[bytes] = []
    seen: list[int] = []

    async def flood() -> None:
        await peer.stream.send_all(event * 1000)
        while True:
            await peer.stream.send_all(event * (most - 2) + (answers.pop() if answers else b""))

    async def answer() -> None:
        await peer.heard()
        answers.append(b'{"return": "here", "id": %d}\n' % peer.first)

    async def other_task() -> None:
        while True:
            seen.append(len(peer.events))
            await trio.lowlevel.checkpoint()

    for task in (flood, answer, other_task):
        nursery.start_soon(task)
    assert await peer.client.execute("x", timeout_s=30) == "here"
    assert len(peer.events) > 1000
    assert max(after - before for before, after in pairwise(seen)) <= 2 * most


async def test_a_parked_session_goes_on_where_it_was(nursery: trio.Nursery) -> None:
    peer = Peer()
    async with trio.open_nursery() as first:
        await peer.start(first)
        # Half of an event has come by then, and an answer that nobody waits for any more comes later.
        await peer.stream.send_all(b'{"event": "STO')
        with trio.move_on_after(0.01):
            await peer.client.execute("given-up")
        await trio.testing.wait_all_tasks_blocked()
        assert peer.client.park()
        first.cancel_scope.cancel()
    assert not peer.client.lost.is_set()
    later: list[str] = []
    peer.client.set_handler(lambda name, data: later.append(name))
    await peer.say(b'P"}', b'{"return": "late", "id": %d}' % peer.first)
    await nursery.start(peer.client.start)
    await peer.heard()

    async def answer() -> None:
        await peer.heard()
        await peer.say(b'{"return": "new", "id": %d}' % (peer.first + 1))

    nursery.start_soon(answer)
    assert await peer.client.execute("x") == "new"
    assert (peer.events, later) == ([("RESUME", {})], ["STOP"])


async def test_a_session_that_is_lost_or_writes_is_not_parked(nursery: trio.Nursery) -> None:
    peer = Peer()
    await peer.start(nursery)
    await peer.stream.aclose()
    with trio.fail_after(20):
        await peer.client.lost.wait()
    assert not peer.client.park()


async def test_a_refusal_has_qemus_message(nursery: trio.Nursery) -> None:
    peer = Peer()
    await peer.start(nursery)

    async def answer() -> None:
        await peer.heard()
        await peer.say(b'{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}' % peer.first)

    nursery.start_soon(answer)
    with pytest.raises(QmpRefused, match="no such thing"):
        await peer.client.execute("x")


async def test_a_missing_answer_is_a_timeout(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    peer = Peer()
    await peer.start(nursery)
    with pytest.raises(QmpLost, match="within 3 s"):
        await peer.client.execute("x", timeout_s=3)
    assert trio.current_time() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"no json\n", "JSON"),
        (b"[1]\n", "QMP"),
        (b"[" * 100_000 + b"\n", "JSON"),
        (b"x" * (LINE_LIMIT + 2), "too long"),
        (b"", "closed"),
    ],
)
async def test_a_broken_stream_fails_waiting_commands(nursery: trio.Nursery, data: bytes, why: str) -> None:
    peer = Peer()
    await peer.start(nursery)

    async def break_it() -> None:
        await peer.heard()
        if data:
            await peer.stream.send_all(data)
        else:
            await peer.stream.aclose()

    nursery.start_soon(break_it)
    with pytest.raises(QmpLost, match=why):
        await peer.client.execute("x")
    await peer.client.lost.wait()
    with pytest.raises(QmpLost):
        await peer.client.execute("y")


async def test_answers_to_the_session_before_are_nobodys(nursery: trio.Nursery) -> None:
    """QEMU begins a command, its client leaves, the next one connects and gets the answer, even before the greeting."""
    before = Peer()
    await before.start(nursery)
    late = [b'{"return": "late", "id": %d}' % number for number in range(before.first - 1, before.first + 9)]
    peer = Peer()
    await peer.say(*late, b'{"error": {"desc": "late"}}', b'{"event": "STOP"}')
    await peer.start(nursery)

    async def answer() -> None:
        await peer.heard()
        await peer.say(*late, b'{"return": "new", "id": %d}' % peer.first)

    nursery.start_soon(answer)
    assert await peer.client.execute("x") == "new"
    assert peer.events == [("RESUME", {})]


async def test_a_socket_with_another_greeting_is_refused() -> None:
    peer = Peer()
    await peer.say(b'{"hello": 1}')
    with pytest.raises(QmpLost, match="greet"):
        await peer.client.start()
