"""The audit log as lines of JSON, continued over several connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import trio

from volant.model import AuditGap, AuditRecord, LogRange

from ._errors import ConnectionLost, UnexpectedAnswer
from ._feed import Patience, keep_connected
from ._http import Http, chunks_of
from ._transport import Query, Request, decode_json

PATH = "/api/v1/audit"
# To a follower the daemon writes at least every 15 s.
_SILENCE_S = 40.0
_MAX_LINE = 1024 * 1024


class _Head(msgspec.Struct):
    gap: LogRange | None = None


async def pump_audit(
    http: Http,
    query: Query,
    follow: bool,
    backoff: Patience,
    channel: trio.MemorySendChannel[AuditRecord | AuditGap],
    started: Callable[[], None],
) -> None:
    """Sends the stored records to `channel`, and with `follow` also new ones, forever."""

    async def connect(opened: Callable[[], None]) -> ConnectionLost | None:
        nonlocal query
        request = Request("GET", PATH, query, headers={"Accept": "application/x-ndjson"})
        lines = _Lines()
        async with http.stream(request, read_s=_SILENCE_S) as response:
            opened()
            async with chunks_of(response) as chunks:
                async for chunk in chunks:
                    for line in lines.feed(chunk):
                        backoff.received()
                        item = _decode(line)
                        await channel.send(item)
                        last = item.gap.last if isinstance(item, AuditGap) else item.seq
                        query = {**query, "cursor": last, "tail": None}
        return ConnectionLost(f"{http.address.text} ended the audit log") if follow else None

    await keep_connected(connect, backoff, started)


class _Lines:
    """Splits an answer into lines, and drops the empty keep-alive lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Adds data, and yields complete lines. :raises UnexpectedAnswer: a line is too long."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise UnexpectedAnswer(f"a line of the audit log is longer than {_MAX_LINE} bytes")
        return (line for line in lines if line)


def _decode(line: bytes) -> AuditRecord | AuditGap:
    if decode_json(line, _Head, "a line of the audit log").gap is not None:
        return decode_json(line, AuditGap, "a gap in the audit log")
    return decode_json(line, AuditRecord, "a record of the audit log")
