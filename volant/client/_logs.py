"""A VM's log over WebSocket, continued over several connections."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import msgspec
import trio

from volant.model import LogGap, LogLine, LogRange

from ._errors import ConnectionLost
from ._feed import Patience, keep_connected
from ._http import Http
from ._transport import Query, decode_json
from ._websocket import read_websocket


class _Frame(msgspec.Struct):
    gap: LogRange | None = None
    name: str = ""
    vm_id: int = 0
    stream: str = "console"
    line: str = ""
    timestamp: datetime | None = None
    seq: int = 0
    partial: bool = False


async def pump_logs(
    http: Http,
    name: str,
    query: Query,
    backoff: Patience,
    channel: trio.MemorySendChannel[LogLine | LogGap],
    started: Callable[[], None],
) -> None:
    """Sends lines and gaps to `channel` until the daemon ends the log."""
    last_seq = -1

    async def handle(message: str | bytes) -> None:
        nonlocal last_seq, query
        backoff.received()
        head = decode_json(message, _Frame, "a line of the log")
        if head.gap is not None:
            gap = LogGap(head.gap)
            # A new connection continues after the gap, so that it is not reported twice.
            last_seq = max(last_seq, head.gap.last)
            await channel.send(gap)
        elif head.seq > last_seq:
            line = decode_json(message, LogLine, "a line of the log")
            await channel.send(line)
            last_seq = line.seq
            query = {**query, "vm_id": line.vm_id}
        if last_seq >= 0:
            query = {**query, "since": last_seq, "tail": None}

    async def connect(opened: Callable[[], None]) -> ConnectionLost | None:
        code = await read_websocket(http, f"/ws/v1/vms/{name}/logs", query, opened, handle)
        return None if code == 1000 else ConnectionLost(f"{http.address.text} ended the log with code {code}")

    await keep_connected(connect, backoff, started)
