"""The stream of lifecycle events, across reconnects."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import trio

from volant.model import Event, EventType, StreamGap

from ._errors import ConnectionLost, UnexpectedAnswer
from ._feed import Patience, keep_connected
from ._http import Http, chunks_of
from ._sse import Message, SseParser
from ._transport import Query, Request, decode_json

PATH = "/api/v1/events/vms"
# The daemon writes at least every 15 s.
_SILENCE_S = 40.0
_KNOWN = frozenset(str(kind) for kind in EventType)


async def pump_events(
    http: Http,
    query: Query,
    last_event_id: str,
    backoff: Patience,
    channel: trio.MemorySendChannel[Event | StreamGap],
    started: Callable[[], None],
) -> None:
    """Sends the events after `last_event_id` to `channel`, forever."""

    async def connect(opened: Callable[[], None]) -> ConnectionLost:
        nonlocal last_event_id
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        parser = SseParser(last_event_id)
        async with http.stream(Request("GET", PATH, query, headers=headers), read_s=_SILENCE_S) as response:
            opened()
            async with chunks_of(response) as chunks:
                async for chunk in chunks:
                    for message in _parse(parser, chunk):
                        backoff.received()
                        item = _decode(message)
                        if item is not None:
                            await channel.send(item)
                        last_event_id = message.last_event_id
                    backoff.at_least_s = parser.retry_s or backoff.at_least_s
        return ConnectionLost(f"{http.address.text} ended the stream of events")

    await keep_connected(connect, backoff, started)


def _parse(parser: SseParser, chunk: bytes) -> list[Message]:
    try:
        return parser.feed(chunk)
    except ValueError as error:
        raise UnexpectedAnswer(str(error)) from None


def _decode(message: Message) -> Event | StreamGap | None:
    if message.data is None:
        return None
    if message.event == "STREAM_GAP":
        return decode_json(message.data, StreamGap, "a gap in the stream of events")
    if message.event not in _KNOWN:
        # A newer daemon may have more types.
        return None
    event = decode_json(message.data, Event, "an event")
    # In a fleet, the stream continues after a place in the events of all hosts; the event has the id of its own host.
    return event if event.id == message.last_event_id else msgspec.structs.replace(event, id=message.last_event_id)
