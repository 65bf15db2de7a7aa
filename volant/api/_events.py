"""`/api/v1/events/vms` and `/api/v1/events/images`: events of VMs and of OCI images, as server-sent events.

In a fleet, a stream has the events of all hosts, and an id is a position in all of their streams
(`volant/fleet/_events.py`), unless another host asks, or the request names a host.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING

import trio

from volant.http import Call, Piece, StreamRoute, interruptible, seen_project
from volant.journal import EventCursor, EventFrame, EventGap
from volant.model import IMAGE_EVENTS, VM_EVENTS, Event, EventId, Problem, events_gone, is_name
from volant.operations import ApiDeps

if TYPE_CHECKING:
    from volant.fleet import FleetCursor

KEEP_UP_S = 15.0
"""The interval of heartbeats, which carry the newest id."""

_PATH = re.compile(r"/api/v1/events/(vms|images)/?\Z")
_TYPES = {
    "vms": frozenset(str(kind) for kind in VM_EVENTS),
    "images": frozenset(str(kind) for kind in IMAGE_EVENTS),
}
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),
]
_MAX_ID = 200


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """Returns the routes of this resource."""
    blocks = _Blocks()

    async def events(call: Call) -> None:
        (of,) = call.args
        query = call.query(credentials=True)
        since, last_event_id = query.text("since"), query.text("last_event_id")
        project = call.listed if of == "vms" else seen_project(call.scope)
        wanted = _Filter(
            blocks,
            project=None if project is None else deps.store.projection.sees(project),
            of_images=of == "images",
            vm=query.text("vm") if of == "vms" else None,
            types=query.words("types", _TYPES[of]),
            labels=query.labels() if of == "vms" else {},
            strict=query.text("on_gap"),
        )
        query.done()
        after = _after(call.header(b"last-event-id"), last_event_id, since)
        # The cursor is opened before the head is sent, so the client misses nothing after it.
        if deps.fleet is not None and deps.fleet.spans(call.scope):
            from volant.fleet import Followed, follow

            followed = Followed(
                log=deps.store.events,
                scope=call.scope,
                path=f"/api/v1/events/{of}",
                query=wanted.query,
                matching=wanted.matching,
                strict=wanted.strict,
            )
            async with follow(deps.fleet, followed, after) as place:
                await _answer(call, place.position, partial(_stream_of_fleet, call, place))
            return
        if wanted.strict and after is not None and after != "oldest":
            gap = deps.store.events.gap(after)
            if gap is not None:
                raise events_gone(after, str(gap.oldest))
        log = deps.store.events
        # Another host wants to know at once how far it is.
        newest = None if call.scope["state"].get("forwarded") is None else lambda: log.newest
        async with log.cursor(after) as cursor:
            await _answer(call, str(cursor.position), partial(_stream, call, cursor, wanted, newest))

    return [StreamRoute(_PATH, events, sse=True)]


async def _answer(call: Call, position: str, stream: Callable[[], Awaitable[None]]) -> None:
    await call.start(200, [*_HEADERS, (b"volant-event-id", position.encode("ascii"))])
    if call.method != "HEAD":
        await call.write(b"retry: 1000\n\n")
        if not await call.while_connected(stream):
            return
    await call.finish()


class _Blocks:
    """The last sent events, encoded once, because readers usually get the same ones at the same time."""

    def __init__(self) -> None:
        self._frames: list[EventFrame] = []
        self._piece: Piece | None = None

    def of(self, frames: list[EventFrame]) -> Piece | None:
        """Returns the SSE blocks of all events of VMs in `frames`, if there are any."""
        if frames is not self._frames:
            self._frames = frames
            blocks = [frame.sse for frame in frames if frame.event.image is None]
            self._piece = Piece(b"".join(blocks)) if blocks else None
        return self._piece


class _Filter:
    """The events that a client wants. :raises Problem: 400."""

    def __init__(
        self,
        blocks: _Blocks,
        *,
        project: Callable[[Event], bool] | None,
        of_images: bool,
        vm: str | None,
        types: frozenset[str],
        labels: dict[str, str],
        strict: str | None,
    ) -> None:
        if vm is not None and not is_name(vm):
            raise Problem(400, "invalid-request", f"the parameter vm is {vm[:80]!r}, not a name", field="vm")
        if strict not in (None, "410"):
            raise Problem(
                400,
                "invalid-request",
                f"the parameter on_gap is {strict[:40]!r}",
                field="on_gap",
                hint="410 or nothing",
            )
        self._blocks = blocks
        self._project = project
        self._of_images = of_images
        self._vm = vm
        self._types = types
        self._labels = labels.items()
        self._all = project is None and not of_images and vm is None and not types and not labels
        self.strict = strict is not None

    def of(self, frames: list[EventFrame]) -> Piece | None:
        """Returns the SSE blocks of the matching events, if there are any."""
        if self._all:
            return self._blocks.of(frames)
        found = [frame.sse for frame in self.matching(frames)]
        return Piece(b"".join(found)) if found else None

    def matching(self, frames: list[EventFrame]) -> list[EventFrame]:
        """Returns the matching events."""
        return [frame for frame in frames if self._wants(frame)]

    @property
    def query(self) -> dict[str, str | list[str]]:
        """The query parameters of the same filter, without the project."""
        found: dict[str, str | list[str]] = {"label": [f"{key}={value}" for key, value in self._labels]}
        if self._vm is not None:
            found["vm"] = self._vm
        if self._types:
            found["types"] = ",".join(sorted(self._types))
        return found

    def _wants(self, frame: EventFrame) -> bool:
        event = frame.event
        return (
            (event.image is not None) == self._of_images
            and (self._project is None or self._project(event))
            and (self._vm is None or event.name == self._vm)
            and (not self._types or event.type in self._types)
            and self._labels <= event.labels.items()
        )


def _after(header: str | None, last_event_id: str | None, since: str | None) -> str | None:
    """Returns the event after which to begin. The header has priority, as an `EventSource` reconnects with its first
    URL."""
    if not header and not last_event_id and since == "0":
        return "oldest"
    given = header or last_event_id or since
    # The place in a fleet has its own bound.
    return given if given is None or given.startswith("*") else given[:_MAX_ID]


async def _stream(call: Call, cursor: EventCursor, wanted: _Filter, newest: Callable[[], EventId] | None) -> None:
    """Sends events until the daemon stops.

    :param newest: returns the newest event, for a reader that gets its id as soon as it has all earlier ones; None for
        readers that get it periodically
    """
    sent_to = cursor.position
    if newest is not None and cursor.position == newest():
        await call.write_piece(_id_block(str(sent_to)))
    beat = trio.current_time() + KEEP_UP_S
    async with interruptible(call.stopping) as waits:
        while not waits.stopped():
            taken = await waits.until(cursor.take, beat)
            if taken is None:
                if waits.stopped():
                    break
                beat = trio.current_time() + KEEP_UP_S
                piece: Piece | None = _id_block(str(cursor.position))
            elif isinstance(taken, EventGap):
                piece = Piece(taken.sse)
            elif taken:
                piece = wanted.of(taken)
            else:
                break
            if piece is not None:
                sent_to = cursor.position
                await call.write_piece(piece)
            if taken is not None and newest is not None and cursor.position == newest():
                sent_to = cursor.position
                await call.write_piece(_id_block(str(sent_to)))
        # A client that reconnects after our restart need not read filtered events again.
        if cursor.position != sent_to:
            await call.write_piece(_id_block(str(cursor.position)))


async def _stream_of_fleet(call: Call, cursor: FleetCursor) -> None:
    """Sends events of all hosts until the daemon stops."""
    sent_to = cursor.position
    beat = trio.current_time() + KEEP_UP_S
    async with interruptible(call.stopping) as waits:
        while not waits.stopped():
            taken = await waits.until(cursor.take, beat)
            if taken is None:
                if waits.stopped():
                    break
                beat = trio.current_time() + KEEP_UP_S
                sent_to = cursor.position
                await call.write_piece(_id_block(sent_to))
            elif taken:
                sent_to = cursor.position
                await call.write(
                    b"".join(b"id: %b\n%b" % (place.encode("ascii"), block.body) for place, block in taken)
                )
        if cursor.position != sent_to:
            await call.write_piece(_id_block(cursor.position))


def _id_block(position: str) -> Piece:
    return Piece(f"id: {position}\n\n".encode())
