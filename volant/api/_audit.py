"""`/api/v1/audit`: the audit log as a page of JSON, as lines of JSON, or as server-sent events.

A stream reads the stored records in pages, and then continues with published ones. It takes its position in the log
before it reads, so it misses nothing in between. A reader that has fallen behind retention gets a gap.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol
from urllib.parse import urlencode

import apsw
import msgspec
import trio

from volant.http import (
    Call,
    Query,
    StreamRoute,
    interruptible,
    names_project,
    parse_time,
    project_of_link,
    without_credentials,
)
from volant.journal import AuditFilter, AuditFrame, AuditLog, AuditPage, EventGap, FrameCursor
from volant.model import AuditGap, EventId, LogRange, Problem, invalid
from volant.operations import ApiDeps

KEEP_UP_S = 15.0
"""The interval of lines that show a follower that the connection holds."""

_PATH = re.compile(r"/api/v1/audit/?\Z")
_MAX_LIMIT = 1000
_HEADERS = {
    "application/json": [(b"content-type", b"application/json"), (b"cache-control", b"no-store")],
    "application/x-ndjson": [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")],
    "text/event-stream": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache, no-transform"),
        (b"x-accel-buffering", b"no"),
    ],
}

_encode = msgspec.json.Encoder().encode


def routes(deps: ApiDeps) -> list[StreamRoute]:
    """Returns the routes of this resource."""

    async def audit(call: Call) -> None:
        log = deps.store.audit
        wanted = _Wanted.of(call)
        media = _media(call)
        if media == "application/json":
            await _page(call, log, wanted)
        else:
            await _stream(call, log, wanted, media)

    return [StreamRoute(_PATH, audit, sse=True)]


class _Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a request."""

    filter: AuditFilter
    after: int
    """The number after which records are wanted."""
    is_resumed: bool
    """Whether the client knows that record, so that a gap after it matters."""
    tail: int | None
    limit: int
    follow: bool

    @classmethod
    def of(cls, call: Call) -> _Wanted:
        """Parses a request. :raises Problem: 400."""
        query = call.query(credentials=True)
        wanted = AuditFilter(
            project=_project(call),
            caller=query.text("caller"),
            operation=query.text("operation"),
            target=query.text("target"),
            request_id=query.text("request_id"),
            since=_time(query, "since"),
            until=_time(query, "until"),
        )
        cursor, tail = query.integer("cursor"), query.integer("tail", maximum=_MAX_LIMIT)
        limit = query.integer("limit", minimum=1, maximum=_MAX_LIMIT)
        follow = query.flag("follow", default=False)
        query.done()
        last = call.header(b"last-event-id")
        if last is not None and last.isascii() and last.isdecimal() and len(last) <= 18:
            # An `EventSource` reconnects with its first URL.
            cursor, tail = int(last), None
        if cursor is not None and tail is not None:
            raise invalid("tail", "tail and cursor exclude each other")
        return cls(
            filter=wanted,
            after=cursor or 0,
            is_resumed=bool(cursor),
            tail=tail,
            limit=limit or _MAX_LIMIT,
            follow=follow,
        )


def _project(call: Call) -> str | None:
    """Returns the project that the request names; None if it names none, or all."""
    return call.listed if names_project(call.scope) else None


def _time(query: Query, name: str) -> datetime | None:
    text = query.text(name)
    return None if text is None else parse_time(text, name)


def _media(call: Call) -> str:
    """Returns the type of the answer: the first supported one in `Accept`, otherwise JSON."""
    for part in (call.header(b"accept") or "").split(","):
        media = part.partition(";")[0].strip().lower()
        if media in _HEADERS:
            return media
    return "application/json"


async def _find(log: AuditLog, wanted: _Wanted, after: int, limit: int, *, newest: bool = False) -> AuditPage:
    """Returns the matching records. :raises Problem: 503, the disk can't be read."""
    try:
        return await log.find(wanted.filter, after=after, limit=limit, newest=newest)
    except (apsw.Error, msgspec.MsgspecError) as error:
        raise Problem(
            503, "audit-unreadable", f"the audit log can't be read: {error}", hint="check the disk"
        ) from error


async def _page(call: Call, log: AuditLog, wanted: _Wanted) -> None:
    if wanted.follow:
        raise invalid(
            "follow", "one answer in JSON can't follow", hint="send Accept: application/x-ndjson or text/event-stream"
        )
    if wanted.tail is not None:
        frames = (await _find(log, wanted, 0, wanted.tail, newest=True)).frames if wanted.tail else []
    else:
        frames = (await _find(log, wanted, wanted.after, wanted.limit)).frames
    body = b"[" + b",".join(frame.data for frame in frames) + b"]"
    headers = [*_HEADERS["application/json"], (b"content-length", b"%d" % len(body))]
    if wanted.tail is None and len(frames) == wanted.limit:
        given = [pair for pair in without_credentials(call.scope["query_string"]).decode("ascii").split("&") if pair]
        pairs = [pair for pair in given if not pair.startswith("cursor=")]
        query = "&".join([*pairs, urlencode([*project_of_link(call.scope), ("cursor", frames[-1].seq)])])
        headers.append((b"link", f'</api/v1/audit?{query}>; rel="next"'.encode()))
    await call.reject(200, headers, b"" if call.method == "HEAD" else body)


async def _stream(call: Call, log: AuditLog, wanted: _Wanted, media: str) -> None:
    show: _Show = _Events() if media == "text/event-stream" else _Lines()
    # The place is taken before the head is sent, so the client misses nothing after it.
    async with log.cursor(None) as cursor:
        await call.start(200, _HEADERS[media])

        async def stream() -> None:
            await _send_stored(call, log, wanted, show, cursor.seq)
            if show.follows or wanted.follow:
                await _follow(call, cursor, wanted, show)

        if call.method == "HEAD" or await call.while_connected(stream):
            await call.finish()


async def _send_stored(call: Call, log: AuditLog, wanted: _Wanted, show: _Show, up_to: int) -> None:
    """Sends the stored records up to a number."""
    if wanted.tail is not None:
        frames = (await _find(log, wanted, 0, wanted.tail, newest=True)).frames if wanted.tail else []
        await _write(call, [frame for frame in frames if frame.seq <= up_to], show)
        return
    after, known = wanted.after, wanted.is_resumed
    while after < up_to and not call.stopping.is_set():
        page = await _find(log, wanted, after, _MAX_LIMIT)
        if known and after + 1 < page.oldest:
            await call.write(show.gap(after + 1, page.oldest - 1))
        await _write(call, [frame for frame in page.frames if frame.seq <= up_to], show)
        if len(page.frames) < _MAX_LIMIT:
            return
        after, known = page.frames[-1].seq, True


async def _follow(call: Call, cursor: FrameCursor[AuditFrame], wanted: _Wanted, show: _Show) -> None:
    """Sends records as they are written, until the daemon stops."""
    beat = trio.current_time() + KEEP_UP_S
    async with interruptible(call.stopping) as waits:
        while not waits.stopped():
            taken = await waits.until(cursor.take, beat)
            if taken is None:
                if waits.stopped():
                    break
                beat = trio.current_time() + KEEP_UP_S
                await call.write(show.beat(cursor.seq))
            elif isinstance(taken, EventGap):
                before = EventId.parse(taken.requested)
                await call.write(show.gap(1 if before is None else before.seq + 1, taken.oldest.seq - 1))
            elif taken:
                await _write(call, [frame for frame in taken if wanted.filter.wants(frame.record)], show)
            else:
                break


async def _write(call: Call, frames: Sequence[AuditFrame], show: _Show) -> None:
    if frames:
        await call.write(b"".join(map(show.record, frames)))


class _Show(Protocol):
    """The format of a stream."""

    follows: bool
    """Whether it always continues with new records."""

    def record(self, frame: AuditFrame) -> bytes: ...

    def gap(self, first: int, last: int) -> bytes: ...

    def beat(self, seq: int) -> bytes: ...


class _Lines:
    """Lines of JSON."""

    follows = False

    def record(self, frame: AuditFrame) -> bytes:
        return frame.data + b"\n"

    def gap(self, first: int, last: int) -> bytes:
        return _encode(AuditGap(LogRange(first, last))) + b"\n"

    def beat(self, seq: int) -> bytes:
        return b"\n"


class _Events:
    """Server-sent events."""

    follows = True

    def record(self, frame: AuditFrame) -> bytes:
        return frame.sse

    def gap(self, first: int, last: int) -> bytes:
        return b"id: %d\nevent: STREAM_GAP\ndata: %b\n\n" % (last, _encode(AuditGap(LogRange(first, last))))

    def beat(self, seq: int) -> bytes:
        return b"id: %d\n\n" % seq
