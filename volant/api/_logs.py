"""`/ws/v1/vms/{name}/logs` and `/api/v1/vms/{name}/logs`: the output of a VM's console and workload."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import partial
from typing import cast

import msgspec

from volant.concurrency import FairShare
from volant.http import NORMAL, Call, Query, StreamRoute, interruptible, parse_time
from volant.logs import LogCursor, LogGap, LogStream, VmLog
from volant.model import Problem, invalid, is_name, no_such_vm
from volant.operations import ApiDeps, open_log, unreadable

from ._session import moved

_WEBSOCKET = re.compile(r"/ws/v1/vms/([^/]*)/logs/?\Z")
_HTTP = re.compile(r"/api/v1/vms/([^/]*)/logs/?\Z")
_STREAMS = frozenset({"stdout", "stderr", "console"})
_NDJSON = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-store")]
_DEFAULT_TAIL = 100
_MAX_TAIL = 1_000_000
_BATCH = 64 * 1024


def routes(deps: ApiDeps, share: FairShare) -> list[StreamRoute]:
    """Returns the routes of this resource."""

    async def websocket(call: Call) -> None:
        log, wanted = _find(deps, call, tail=_DEFAULT_TAIL, follow=True)
        elsewhere = moved(deps, log.vm_id, log.key)
        # The cursor is opened before the upgrade is answered, so the client misses nothing after it.
        async with wanted.cursor(log) as cursor:
            await call.accept()

            async def stream() -> None:
                ended = await _send(call, cursor, share, log.vm_id, call.send_texts)
                await call.close(*((elsewhere() or (NORMAL, "")) if ended else call.stopping.closing))

            await call.while_connected(stream)

    async def ndjson(call: Call) -> None:
        log, wanted = _find(deps, call, tail=None, follow=False)
        async with wanted.cursor(log) as cursor:
            await call.start(200, _NDJSON)

            async def write(lines: list[bytes]) -> None:
                await call.write(b"\n".join(lines) + b"\n")

            async def stream() -> None:
                await _send(call, cursor, share, log.vm_id, write)

            if call.method == "HEAD" or await call.while_connected(stream):
                await call.finish()

    return [
        StreamRoute(_WEBSOCKET, websocket, http=False, websocket=True),
        StreamRoute(_HTTP, ndjson),
    ]


class _Wanted(msgspec.Struct, frozen=True):
    """The lines that a client wants."""

    since_seq: int | None
    since_time: datetime | None
    tail: int | None
    follow: bool
    streams: frozenset[LogStream]

    def cursor(self, log: VmLog) -> AbstractAsyncContextManager[LogCursor]:
        """Opens a cursor at the first wanted line. :raises OSError: the disk can't be read."""
        return log.cursor(
            since_seq=self.since_seq,
            since_time=self.since_time,
            tail=self.tail,
            streams=self.streams,
            follow=self.follow,
        )


def _find(deps: ApiDeps, call: Call, *, tail: int | None, follow: bool) -> tuple[VmLog, _Wanted]:
    """Returns the requested log. :raises Problem: 400, 404, 503."""
    name = call.args[0]
    query = call.query(credentials=call.is_websocket)
    wanted = _wanted(query, tail, follow)
    vm_id = query.integer("vm_id", minimum=1)
    query.done()
    row = deps.store.projection.get(call.named(name)) if is_name(name) else None
    if row is not None and vm_id in (None, row.id):
        return open_log(deps, row), wanted
    if vm_id is not None and deps.store.projection.by_id(vm_id) is None:
        with unreadable(name):
            log = deps.logs.find(vm_id)
        if log is not None and log.key == call.named(name):
            return log, wanted
    if row is None and vm_id is None:
        raise no_such_vm(name[:80])
    raise Problem(
        404, "log-not-found", f"there is no log of a VM {name[:80]!r} with the id {vm_id}",
        hint="a deleted VM's log is kept for 24 h",
    )  # fmt: skip


def _wanted(query: Query, tail: int | None, follow: bool) -> _Wanted:
    since = query.text("since")
    given = query.integer("tail", maximum=_MAX_TAIL)
    streams = cast("frozenset[LogStream]", query.words("stream", _STREAMS))
    seq = time = None
    if since is not None:
        if since.isascii() and since.isdecimal():
            if len(since) > 18:
                raise invalid("since", "since is too large")
            seq = int(since)
        else:
            time = parse_time(since, "since")
    return _Wanted(seq, time, given if given is not None else tail, query.flag("follow", follow), streams)


async def _send(
    call: Call, cursor: LogCursor, share: FairShare, vm_id: int, send: Callable[[list[bytes]], Awaitable[None]]
) -> bool:
    """Sends lines until the log or its requested part ends (True) or the daemon stops (False)."""
    ended = False
    async with interruptible(call.stopping) as waits:
        while (taken := await waits.until(partial(cursor.take, _BATCH))) is not None:
            if not taken:
                ended = True
                break
            frames = [taken.frame] if isinstance(taken, LogGap) else taken
            await share.take(vm_id, sum(map(len, frames)))
            await send(frames)
    return ended
