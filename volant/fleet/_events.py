"""The events of all hosts as one stream: this host's own, and the others', which it follows over mutual TLS.

The stream has a position for each host, so any host can continue it. Hosts are followed independently: an unreachable
one is retried from its position, and delays no other. A host whose journal does not continue there reports a gap, as to
a client. A host that joins is followed from the event of its join.

At most one piece of each host is in memory: the next one is read when the reader has taken the previous one. So a slow
reader slows down the hosts' streams, each of which costs its host only a number.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import urlencode

import msgspec
import trio

from volant.channel import AgentProtocolError, AgentResponse, AgentUnreachable
from volant.concurrency import Backoff
from volant.journal import EventFrame, EventGap, EventLog
from volant.model import EventId, Problem, events_gone

from ._forwarded import request_headers
from ._membership import OLDEST, Member
from ._peers import Peers
from ._vector import position_text, positions_in

EVENT_ID = b"volant-event-id"
"""The header of a stream's answer with the position at which it begins."""

_OPEN_S = 2.0
"""How long opening a stream waits for hosts that do not answer, if it must ask them."""
_SILENCE_S = 40.0
"""A host writes at least every 15 s, so a host that is silent for this time can't be reached."""
_RETRY_S, _RETRY_MAX_S = 0.2, 5.0
_HEAD_S = 10.0
_LOOK_S = 1.0
_PIECE = 64 * 1024
_MAX_BLOCK = 1024 * 1024
_SHOWN = 200
"""Maximum characters of an unknown id that a gap repeats."""

Matching = Callable[[list[EventFrame]], Sequence[EventFrame]]
"""Returns the events of this host that the reader wants."""


class Block(msgspec.Struct, frozen=True):
    """An event or a gap of one host, or only its position."""

    position: EventId
    body: bytes
    """The data after the id in the event stream, with the blank line; empty if there is none."""

    @property
    def data(self) -> bytes:
        """The JSON of the event or the gap."""
        return self.body.partition(b"data: ")[2].rstrip(b"\n")

    @property
    def is_gap(self) -> bool:
        return self.body.startswith(b"event: STREAM_GAP\n")


class Hosts(Protocol):
    """The fleet, as far as this module needs it."""

    host: str
    peers: Peers

    def members(self) -> Sequence[Member]: ...

    async def known_members(self) -> Sequence[Member]: ...

    async def changed(self) -> None: ...


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """The request of a reader for all hosts."""

    log: EventLog
    """The log of this host."""
    scope: Any
    """The scope of the request, with the reader and the project."""
    path: str
    query: Mapping[str, str | Sequence[str]]
    """The query of the operation, with its filters."""
    matching: Matching
    strict: bool = False
    """Whether expired events are an error at the beginning, not a gap."""


class FleetCursor:
    """A position in the events of all hosts. `follow` creates it."""

    def __init__(self) -> None:
        self.put, self._taken = trio.open_memory_channel[tuple[int, list[Block]]](0)
        self.positions: dict[int, EventId] = {}
        """The positions of the hosts, by number, after the last event taken."""
        self.behind: set[int] = set()
        """The hosts that have more events, or may have."""

    @property
    def position(self) -> str:
        """The position after the last event taken, in the form for clients."""
        return position_text(self.positions)

    @property
    def at_end(self) -> bool:
        """Whether all events of reachable hosts are taken."""
        return not self.behind

    async def take(self) -> list[tuple[str, Block]]:
        """Waits for events and takes them, each with the position after it. An empty list means that only positions
        have changed. A cancelled call has taken nothing."""
        number, blocks = await self._taken.receive()
        taken = []
        for block in blocks:
            self.positions[number] = block.position
            if block.body:
                taken.append((self.position, block))
            else:
                self.behind.discard(number)
        return taken


@asynccontextmanager
async def follow(hosts: Hosts, wanted: Followed, after: str | None) -> AsyncIterator[FleetCursor]:
    """Reads the events of all hosts. Exceptions of the block are put into a group.

    :param after: a position of an earlier cursor, the id of one host's event, or `oldest`; None for only new events
    :raises Problem: 410 with `strict`; 503, the fleet's hosts are not known yet
    """
    members = await hosts.known_members()
    cursor = FleetCursor()
    async with trio.open_nursery() as nursery:
        every = _Every(hosts, wanted, cursor, nursery)
        if after is None:
            await every.begin(members, dict.fromkeys((member.number for member in members), None))
        else:
            await every.begin(members, _positions(after, members, wanted.log), unknown=after)
        nursery.start_soon(every.join)
        yield cursor
        nursery.cancel_scope.cancel()


def _positions(after: str, members: Sequence[Member], log: EventLog) -> dict[int, EventId]:
    """Returns the positions at which to begin, by the numbers of hosts. Missing hosts begin at their join."""
    found = positions_in(after)
    if found is not None:
        return found
    event = EventId.parse(after)
    if event is not None:
        for member in members:
            if event.epoch == member.head.epoch:
                return {member.number: event}
    # For an id that is not known, it is this host that says so.
    return dict.fromkeys((member.number for member in members), OLDEST)


class _Every:
    """Follows all hosts for one reader."""

    def __init__(self, hosts: Hosts, wanted: Followed, cursor: FleetCursor, nursery: trio.Nursery) -> None:
        self._hosts = hosts
        self._wanted = wanted
        self._cursor = cursor
        self._nursery = nursery
        self._followed: dict[int, _Own | _Other] = {}

    async def begin(
        self, members: Sequence[Member], positions: Mapping[int, EventId | None], *, unknown: str = ""
    ) -> None:
        """Begins to follow hosts. :raises Problem: 410 with `strict`, the events of one of them have expired."""
        strict = self._wanted.strict and unknown not in ("", "oldest")
        for member in members:
            self._follow(member, positions.get(member.number, member.since), unknown, strict=strict)
        if strict or not unknown:
            # Each has a deadline for it.
            for followed in self._followed.values():
                await followed.opened.wait()
                if followed.failure is not None:
                    raise followed.failure

    async def join(self) -> None:
        """Follows hosts that join, and drops hosts that leave, until cancelled."""
        while True:
            members = {member.number: member for member in self._hosts.members()}
            for number, member in members.items():
                if number not in self._followed:
                    self._follow(member, member.since, "", strict=False)
            # Without an answer of etcd since the start, no host is known.
            for number in self._followed.keys() - members.keys() if members else ():
                self._followed.pop(number).scope.cancel()
                self._cursor.positions.pop(number, None)
                self._cursor.behind.discard(number)
            await trio.sleep(_LOOK_S)
            await self._hosts.changed()

    def _follow(self, member: Member, position: EventId | None, unknown: str, *, strict: bool) -> None:
        followed: _Own | _Other
        if member.name == self._hosts.host:
            followed = _Own(self._wanted, self._cursor, member, position, unknown, strict=strict)
        else:
            followed = _Other(self._hosts, self._wanted, self._cursor, member, position, strict=strict)
        self._followed[member.number] = followed
        self._cursor.behind.add(member.number)
        if position is not None:
            self._cursor.positions[member.number] = position
        self._nursery.start_soon(followed.run)


class _Own:
    """Follows the events of this host."""

    def __init__(
        self,
        wanted: Followed,
        cursor: FleetCursor,
        member: Member,
        position: EventId | None,
        unknown: str,
        *,
        strict: bool,
    ) -> None:
        self._wanted = wanted
        self._cursor = cursor
        self._number = member.number
        self._after: EventId | str | None = position
        if position == OLDEST:
            known = unknown in ("", "oldest") or positions_in(unknown) is not None
            self._after = "oldest" if known else unknown[:_SHOWN]
        self.scope = trio.CancelScope()
        self.opened = trio.Event()
        self.failure: Problem | None = None
        gap = wanted.log.gap(self._after) if strict and self._after not in (None, "oldest") else None
        if gap is not None:
            self.failure = events_gone(str(self._after), str(gap.oldest))

    async def run(self) -> None:
        """Follows them until cancelled, or until the daemon stops."""
        with self.scope:
            async with self._wanted.log.cursor(self._after) as cursor:
                if self._after in (None, "oldest"):
                    self._cursor.positions[self._number] = cursor.position
                elif isinstance(self._after, str):
                    # Whoever continues from here before the gap was taken gets it, too.
                    self._cursor.positions[self._number] = EventId("?", 0)
                self.opened.set()
                if cursor.position == self._wanted.log.newest:
                    await self._cursor.put.send((self._number, [Block(cursor.position, b"")]))
                while taken := await cursor.take(_PIECE):
                    blocks = self._blocks(taken)
                    if not blocks or cursor.position == self._wanted.log.newest:
                        blocks.append(Block(cursor.position, b""))
                    await self._cursor.put.send((self._number, blocks))

    def _blocks(self, taken: list[EventFrame] | EventGap) -> list[Block]:
        if isinstance(taken, EventGap):
            before = EventId(taken.oldest.epoch, taken.oldest.seq - 1)
            return [Block(before, _without_id(taken.sse))]
        epoch = self._wanted.log.epoch
        return [Block(EventId(epoch, each.seq), _without_id(each.sse)) for each in self._wanted.matching(taken)]


class _Other:
    """Follows the events of another host."""

    def __init__(
        self,
        hosts: Hosts,
        wanted: Followed,
        cursor: FleetCursor,
        member: Member,
        position: EventId | None,
        *,
        strict: bool,
    ) -> None:
        self._hosts = hosts
        self._wanted = wanted
        self._cursor = cursor
        self._member = member
        self._position = position
        """The position after the last event passed on; None for the position when it is reached."""
        self._strict = strict
        self.scope = trio.CancelScope()
        self.opened = trio.Event()
        """Set once the host was reached, or could not be reached."""
        self.failure: Problem | None = None

    async def run(self) -> None:
        """Follows them until cancelled."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S, steady_s=_SILENCE_S)
        with self.scope:
            while True:
                try:
                    # The reader waits for it.
                    waits = self._position is None or (self._strict and not self.opened.is_set())
                    with trio.CancelScope(deadline=trio.current_time() + (_OPEN_S if waits else _HEAD_S)) as opening:
                        await self._read(opening)
                except* (Problem, AgentUnreachable, AgentProtocolError, trio.TooSlowError):
                    pass
                self._cursor.behind.discard(self._member.number)
                if self._position is None:
                    # It can't be asked where it is. This place is a little older, so nothing is lost.
                    self._position = self._cursor.positions[self._member.number] = self._member.head
                self.opened.set()
                await backoff.pause()

    async def _read(self, opening: trio.CancelScope) -> None:
        """Follows the events over one connection; returns at its end. `opening` has the deadline until it is open."""
        position, query = self._position, dict(self._wanted.query)
        headers = [*request_headers(self._wanted.scope), (b"accept", b"text/event-stream")]
        if position == OLDEST:
            query["since"] = "0"
        elif position is not None:
            headers.append((b"last-event-id", str(position).encode("ascii")))
        if self._strict and not self.opened.is_set():
            query["on_gap"] = "410"
        target = f"{self._wanted.path}?{urlencode(query, doseq=True)}" if query else self._wanted.path
        async with (
            self._hosts.peers.connect(self._member.name) as client,
            client.stream("GET", target, headers, timeout_s=_HEAD_S) as response,
        ):
            if response.status == 410:
                self.failure = events_gone(str(position), "")
                self.opened.set()
                await trio.sleep_forever()
            if response.status != 200:
                raise AgentProtocolError(f"host {self._member.name} answers with {response.status}")
            if position is None or position == OLDEST:
                # Anywhere else, a gap may come first, and it is lost for who continues after it.
                begin = EventId.parse(dict(response.headers).get(EVENT_ID, b"").decode("latin-1"))
                if begin is None:
                    raise AgentProtocolError(f"host {self._member.name} does not say where its events begin")
                self._position = self._cursor.positions[self._member.number] = begin
            self._cursor.behind.add(self._member.number)
            opening.deadline = math.inf
            self.opened.set()
            await self._pass_on(response)

    async def _pass_on(self, response: AgentResponse) -> None:
        rest = b""
        while True:
            with trio.fail_after(_SILENCE_S):
                data = await response.receive()
            if not data:
                return
            *whole, rest = (rest + data).split(b"\n\n")
            if len(rest) > _MAX_BLOCK:
                raise AgentProtocolError(f"host {self._member.name} sends an event of more than {_MAX_BLOCK} bytes")
            blocks = [block for text in whole if (block := _block(text)) is not None]
            if blocks:
                await self._cursor.put.send((self._member.number, blocks))
                self._position = blocks[-1].position


def _block(text: bytes) -> Block | None:
    """Returns the content of a block of the stream; None if it has none. :raises AgentProtocolError: its id is
    malformed."""
    if not text.startswith(b"id: "):
        return None
    line, _, body = text.partition(b"\n")
    position = EventId.parse(line[4:].decode("latin-1"))
    if position is None:
        raise AgentProtocolError("a host sends an event whose id is malformed")
    return Block(position, body + b"\n\n" if body else b"")


def _without_id(sse: bytes) -> bytes:
    return sse.partition(b"\n")[2]
