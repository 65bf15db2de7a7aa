"""The queue of data that a client has sent and the app has not read yet, for one request, bounded by bytes.

Hypercorn's own queue counts messages, so sixteen-megabyte WebSocket messages count as much as single bytes, and a
reader that is blocked on it never notices that its client has disconnected. This one counts bytes, can drop data, and
accepts a disconnect at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio

Message = dict[str, Any]

_OVERHEAD = 256
"""The cost of a queued message besides its payload, which bounds empty frames too."""


class Inbox:
    """A queue of ASGI messages from the connection's reader to the app.

    `on_first_receive` is awaited before the app receives its first message: it sends `100 Continue` to a client that
    waits for it. `left()` returns whether the peer has disconnected.
    """

    def __init__(
        self,
        *,
        limit: int,
        drop_limit: int,
        on_first_receive: Callable[[], Awaitable[None]],
        left: Callable[[], bool],
        poll_s: float,
    ) -> None:
        self._limit = limit
        self._drop_limit = drop_limit
        self._on_first_receive: Callable[[], Awaitable[None]] | None = on_first_receive
        self._left = left
        self._poll_s = poll_s
        self._messages: deque[tuple[int, Message]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._dropping = False
        self._arrived = trio.Event()
        self._taken = trio.Event()
        self.settled = trio.Event()
        """Set once no more relevant data can arrive: the body is complete, the client has disconnected, or too much of
        the body was dropped."""

    async def put(self, message: Message) -> None:
        """Queues `message`; waits while the app is behind.

        :raises trio.BrokenResourceError: the client disconnected during the wait.
        """
        kind = message["type"]
        if kind in ("http.disconnect", "websocket.disconnect"):
            self.settled.set()
            self._queue(0, message)
            return
        size = len(message.get("body") or message.get("bytes") or message.get("text") or b"")
        while not self._dropping and self._bytes >= self._limit:
            self._taken = trio.Event()
            with trio.move_on_after(self._poll_s):
                await self._taken.wait()
                continue
            # The socket is not read while we wait here, so a disconnect would go unnoticed.
            if self._left():
                raise trio.BrokenResourceError("the client left")
        last = kind == "http.request" and not message.get("more_body", False)
        if self._dropping:
            self._dropped += size
            if last or self._dropped > self._drop_limit:
                self.settled.set()
            return
        self._queue(size + _OVERHEAD, message)
        if last:
            self.settled.set()

    def drop(self) -> None:
        """Drops the body, both what has arrived and what will arrive."""
        self._dropping = True
        self._messages = deque(entry for entry in self._messages if entry[1]["type"] != "http.request")
        self._bytes = sum(size for size, _ in self._messages)
        self._taken.set()

    async def receive(self) -> Message:
        """Returns the next message; it is the app's `receive`."""
        if self._on_first_receive is not None:
            ask, self._on_first_receive = self._on_first_receive, None
            await ask()
        waited = False
        while not self._messages:
            self._arrived = trio.Event()
            await self._arrived.wait()
            waited = True
        size, message = self._messages.popleft()
        if message["type"] in ("http.disconnect", "websocket.disconnect"):
            # An app that calls again must get it again instead of waiting for ever, and must not block other tasks.
            self._messages.append((0, message))
            if not waited:
                await trio.lowlevel.checkpoint()
        self._bytes -= size
        self._taken.set()
        return message

    def _queue(self, size: int, message: Message) -> None:
        self._messages.append((size, message))
        self._bytes += size
        self._arrived.set()
