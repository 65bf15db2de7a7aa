"""The events of all hosts as one stream, with logs and hosts in memory and connections that break all the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trio

from volant.channel import AgentUnreachable
from volant.fleet import FleetCursor, Followed, Member, follow
from volant.host import Host
from volant.http import first_problem
from volant.journal import EventFrame, EventGap, EventLog
from volant.model import Caller, Event, EventId, EventType, Problem, Status

PATH = "/api/v1/events/vms"
SCOPE = {
    "state": {"caller": Caller("1", "key 1"), "request_id": "r1", "project": "default", "names_project": False},
    "headers": [],
}
CUT = 900
"""Bytes after which a connection breaks: some events, and a part of the next one."""
PIECE = 100
WAIT_S = 100.0
"""In virtual time. A host that can't be reached is asked again within 5 s."""


class Logs:
    """The event logs of hosts. `away`: hosts that can't be reached"""

    def __init__(self, *hosts: str) -> None:
        self._logs: dict[str, EventLog] = {}
        self.away: set[str] = set()
        self.broken = 0
        """How many connections have broken."""
        self._members: dict[str, Member] = {}
        for host in hosts:
            self.begin(host, f"aa0{host[1:]}")

    def __getitem__(self, host: str) -> EventLog:
        return self._logs[host]

    def begin(self, host: str, epoch: str) -> None:
        """Gives a host a new log."""
        if host in self._logs:
            # Its daemon has stopped.
            self._logs[host].close()
        # All events are in memory, so there is no database.
        log = self._logs[host] = EventLog(cast(Host, None), cast(Any, f"/none/{host}"))
        log.attach(epoch, 1, 0, [])
        since = EventId(epoch, 0)
        self._members[host] = Member(number=int(host[1:]), name=host, is_up=True, vms=0, since=since, head=since)

    def happens(self, host: str, *names: str) -> None:
        """Adds an event of each of these VMs to the log of a host."""
        log = self._logs[host]
        for name in names:
            newest = log.newest
            event = Event(
                type=EventType.VM_CREATED, id=f"{newest.epoch}-{newest.seq + 1}", name=name, vm_id=1,
                status=Status.PENDING, ip_address="", timestamp=datetime(2026, 1, 1, tzinfo=UTC), message="",
            )  # fmt: skip
            log.append([EventFrame.of(newest.seq + 1, event)])

    @asynccontextmanager
    async def follow(self, host: str, after: str | None, *, strict: bool = False) -> AsyncIterator[FleetCursor]:
        """Follows the events of all, at one host."""
        wanted = Followed(
            log=self[host], scope=SCOPE, path=PATH, query={}, matching=lambda frames: frames, strict=strict
        )
        async with follow(self._seen_by(host), wanted, after) as cursor:
            yield cursor

    def _seen_by(self, host: str) -> Any:
        async def known_members() -> Sequence[Member]:
            await trio.lowlevel.checkpoint()
            return [*self._members.values()]

        return SimpleNamespace(
            host=host, members=lambda: [*self._members.values()], known_members=known_members,
            changed=trio.sleep_forever, peers=SimpleNamespace(connect=self._connect),
        )  # fmt: skip

    @asynccontextmanager
    async def _connect(self, host: str) -> AsyncIterator[Any]:
        await trio.lowlevel.checkpoint()
        if host in self.away:
            raise Problem(503, "host-unreachable", f"{host} gives no sign of life")

        @asynccontextmanager
        async def stream(method: str, target: str, headers: Iterable[tuple[bytes, bytes]], *, timeout_s: float) -> Any:
            query, log = parse_qs(urlsplit(target).query), self[host]
            given = dict(headers).get(b"last-event-id", b"").decode() or None
            if given is None and query.get("since") == ["0"]:
                given = "oldest"
            if query.get("on_gap") == ["410"] and given not in (None, "oldest") and log.gap(str(given)):
                yield SimpleNamespace(status=410, headers=[])
                return
            async with log.cursor(given) as cursor:
                yield Answer(self, cursor, str(cursor.position))

        yield SimpleNamespace(stream=stream)


class Answer:
    """A stream of another host, which breaks after some bytes."""

    status = 200

    def __init__(self, logs: Logs, cursor: Any, begin: str) -> None:
        self.headers = [(b"volant-event-id", begin.encode())]
        self._logs = logs
        self._cursor = cursor
        self._rest = b"retry: 1000\n\n" + f"id: {begin}\n\n".encode()
        self._left = CUT

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._left:
            self._logs.broken += 1
            raise AgentUnreachable("the connection broke")
        if not self._rest:
            taken = await self._cursor.take()
            self._rest = taken.sse if isinstance(taken, EventGap) else b"".join(frame.sse for frame in taken)
        size = min(PIECE, self._left)
        piece, self._rest = self._rest[:size], self._rest[size:]
        self._left -= len(piece)
        return piece


class Reader:
    """A client that reads until it has what it waits for."""

    def __init__(self, cursor: FleetCursor) -> None:
        self._cursor = cursor
        self.got: list[tuple[str, Mapping[str, Any]]] = []
        """Each event or gap, with the place after it."""

    async def has(self, *names: str) -> None:
        """Waits until it has the events of these VMs."""
        with trio.fail_after(WAIT_S):
            while not set(names) <= set(self.names):
                taken = await self._cursor.take()
                self.got += [(place, msgspec.json.decode(block.data)) for place, block in taken]

    @property
    def names(self) -> list[str]:
        return [event["name"] for _, event in self.got if event["type"] != "STREAM_GAP"]

    @property
    def gaps(self) -> list[Mapping[str, Any]]:
        return [event for _, event in self.got if event["type"] == "STREAM_GAP"]

    def check(self, **names: Iterable[str]) -> None:
        """Checks that it has exactly these events of hosts, each host's in their order, and no gap."""
        assert self.gaps == []
        for host, wanted in names.items():
            assert [name for name in self.names if name.startswith(host)] == [*wanted]
        assert [name for name, count in Counter(self.names).items() if count > 1] == []


def some(host: str, first: int, last: int) -> list[str]:
    """Returns names of VMs of a host."""
    return [f"{host}-{number}" for number in range(first, last + 1)]


async def test_a_stream_is_continued_at_another_host_without_a_hole_or_a_double(autojump_clock: Any) -> None:
    logs = Logs("h1", "h2", "h3")
    for host in ("h1", "h2", "h3"):
        logs.happens(host, *some(host, 1, 20))
    async with logs.follow("h1", None) as cursor:
        # It begins with what happens from now on.
        for host in ("h1", "h2", "h3"):
            logs.happens(host, *some(host, 21, 40))
        first = Reader(cursor)
        await first.has("h1-40", "h2-40", "h3-40")
    first.check(**{host: some(host, 21, 40) for host in ("h1", "h2", "h3")})
    assert logs.broken > 2

    # A client continues after any of them, at any host, also with one that is away for a while.
    for number in range(0, len(first.got), 7):
        place, seen = first.got[number][0], first.names[: number + 1]
        last = 41 + number
        logs.happens("h1", *some("h1", last, last + 6))
        for host in ("h2", "h3"):
            async with logs.follow(host, place) as cursor:
                logs.away = {"h1"}
                then = Reader(cursor)
                await then.has("h2-40", "h3-40")
                assert not any(name in then.names for name in some("h1", last, last + 6))
                logs.away = set()
                await then.has(f"h1-{last + 6}")
            whole = {each: some(each, 21, 40) for each in ("h1", "h2", "h3")}
            whole["h1"] = some("h1", 21, last + 6)
            then.check(**{each: [name for name in whole[each] if name not in seen] for each in whole})


async def test_a_host_that_joins_is_in_the_stream_from_its_beginning(autojump_clock: Any) -> None:
    logs = Logs("h1", "h2")
    async with logs.follow("h1", None) as cursor:
        logs.happens("h1", "h1-1")
        logs.happens("h2", "h2-1")
        reader = Reader(cursor)
        await reader.has("h1-1", "h2-1")
    place = reader.got[-1][0]
    logs.begin("h3", "aa03")
    logs.happens("h3", *some("h3", 1, 10))
    async with logs.follow("h2", place) as cursor:
        then = Reader(cursor)
        await then.has("h3-10")
    then.check(h1=[], h2=[], h3=some("h3", 1, 10))


@pytest.mark.parametrize("host", ["h1", "h3"])
async def test_a_journal_that_does_not_continue_is_one_gap(host: str, autojump_clock: Any) -> None:
    """At another host, and at the one whose journal it is."""
    logs = Logs("h1", "h2", "h3")
    async with logs.follow("h1", None) as cursor:
        for each in ("h1", "h2", "h3"):
            logs.happens(each, *some(each, 1, 10))
        before = Reader(cursor)
        await before.has("h1-10", "h2-10", "h3-10")
    place = before.got[-1][0]
    logs.begin("h3", "bb03")
    logs.happens("h2", "h2-11")
    logs.happens("h3", *some("h3", 11, 30))

    async with logs.follow(host, place) as cursor:
        cut = Reader(cursor)
        await cut.has("h2-11", "h3-30")
    assert [(gap["requested"], gap["oldest"]) for gap in cut.gaps] == [("aa03-10", "bb03-1")]
    assert sorted(cut.names) == sorted(["h2-11", *some("h3", 11, 30)])
    # The gap comes before what follows it.
    events = [event for _, event in cut.got if event.get("name") != "h2-11"]
    assert events[0]["type"] == "STREAM_GAP"

    # A client that has got the gap does not get it again, wherever it continues.
    after_gap = next(place for place, event in cut.got if event["type"] == "STREAM_GAP")
    for other in ("h1", "h2", "h3"):
        async with logs.follow(other, after_gap) as cursor:
            then = Reader(cursor)
            await then.has("h3-30")
        then.check(h1=[], h3=some("h3", 11, 30))

    # Nor is one sent to a client that does not want any.
    with pytest.raises(ExceptionGroup) as refused:
        async with logs.follow(host, place, strict=True):
            pass
    problem = first_problem(refused.value)
    assert (problem.status, problem.code) == (410, "events-gone")
    async with logs.follow(host, after_gap, strict=True) as cursor:
        then = Reader(cursor)
        await then.has("h3-30")


async def test_a_stream_from_the_oldest_event_has_those_of_all_hosts(autojump_clock: Any) -> None:
    logs = Logs("h1", "h2", "h3")
    for host in ("h1", "h2", "h3"):
        logs.happens(host, *some(host, 1, 20))
    async with logs.follow("h2", "oldest") as cursor:
        reader = Reader(cursor)
        await reader.has("h1-20", "h2-20", "h3-20")
    reader.check(**{host: some(host, 1, 20) for host in ("h1", "h2", "h3")})
