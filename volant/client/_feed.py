"""Streams that continue across reconnects.

A background task holds the connection, reconnects, and puts items into a short channel. So `receive` can be cancelled,
for example by a deadline around it, without losing an item or the connection; and a slow reader slows down the daemon
instead of filling the client's memory. The task runs in a nursery of the `async with` block, never in an async
generator, which a caller may leave in the middle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import SystemRandom
from typing import Generic, TypeVar

import trio

from volant.model import Problem

from ._errors import ClientError, ClientProblem, ConnectionLost, DeadlineExceeded, Unreachable

T = TypeVar("T")

_BUFFERED_ITEMS = 64
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0
_STEADY_S = 5.0

OnRetry = Callable[[ClientError | Problem, float], None]
"""Called when a connection is lost, with the error and the seconds until the next attempt."""


class Feed(Generic[T]):
    """Items as they arrive: `await feed.receive()`, or `async for item in feed`."""

    def __init__(self, channel: trio.MemoryReceiveChannel[T]) -> None:
        self._channel = channel
        self._failure: Exception | None = None

    async def receive(self) -> T:
        """Returns the next item. May be cancelled without losing one.

        :raises trio.EndOfChannel: the stream has ended.
        :raises ClientProblem: the daemon refused to continue.
        :raises ClientError: the daemon could not be reached again in time, or its answer can't be interpreted.
        """
        try:
            return await self._channel.receive()
        except trio.EndOfChannel:
            if self._failure is not None:
                raise self._failure from None
            raise

    def __aiter__(self) -> Feed[T]:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


Pump = Callable[[trio.MemorySendChannel[T], Callable[[], None]], Awaitable[None]]
"""Puts items into the channel until the stream ends; calls its second argument once it is connected."""


@asynccontextmanager
async def feeding(pump: Pump[T]) -> AsyncIterator[Feed[T]]:
    """Runs `pump` behind a feed. Its errors are raised here until it has started, and by `receive` afterwards."""
    send, receive = trio.open_memory_channel[T](_BUFFERED_ITEMS)
    feed = Feed(receive)

    async def run(task_status: trio.TaskStatus[None]) -> None:
        has_started = False

        def started() -> None:
            nonlocal has_started
            if not has_started:
                has_started = True
                task_status.started()

        with send:
            try:
                await pump(send, started)
            except (ClientError, Problem) as error:
                if not has_started:
                    raise
                feed._failure = error
        if not has_started:
            task_status.started()

    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            await nursery.start(run)
            yield feed
        except Exception as error:
            # Raised at the end, outside of the nursery, so that the block's own error is in no group.
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class Patience:
    """Delays between attempts: they double from 0.2 s up to 5 s, with jitter, for `patience_s` in all.

    Delay and total are reset after a connection that worked: something arrived, or it lasted some seconds. A connection
    that is accepted and closed at once counts as refused.
    """

    def __init__(self, patience_s: float, on_retry: OnRetry | None) -> None:
        self.at_least_s = 0.0
        """The minimum delay, which the daemon can set with `retry:`."""
        self._patience_s = patience_s
        self._on_retry = on_retry
        self._random = SystemRandom()
        self._connected_at: float | None = None
        self._worked = False
        self._begin()

    def _begin(self) -> None:
        self._delay_s = _FIRST_DELAY_S
        self._give_up_at = trio.current_time() + self._patience_s

    def connected(self) -> None:
        """Records that a connection is open."""
        self._connected_at = trio.current_time()
        self._worked = False

    def received(self) -> None:
        """Records that something arrived over the connection."""
        self._worked = True

    async def wait(self, error: ClientError | Problem) -> None:
        """Sleeps before the next attempt. :raises: `error`, after `patience_s`."""
        now = trio.current_time()
        if self._connected_at is not None and (self._worked or now - self._connected_at >= _STEADY_S):
            self._begin()
        self._connected_at = None
        if now >= self._give_up_at:
            raise error
        delay_s = max(min(self.at_least_s, _MAX_DELAY_S), self._delay_s) * self._random.uniform(0.5, 1.0)
        self._delay_s = min(self._delay_s * 2, _MAX_DELAY_S)
        if self._on_retry is not None:
            self._on_retry(error, delay_s)
        await trio.sleep(delay_s)


def is_passing(problem: Problem) -> bool:
    """Returns whether this answer is likely temporary: the daemon, or the one behind a proxy, stops or has just
    started."""
    return problem.status in (502, 503, 504)


Connect = Callable[[Callable[[], None]], Awaitable[ClientError | None]]
"""Holds one connection until it ends, and calls its argument once it is open. Returns the error of a lost connection,
or None at the end of the stream."""


async def keep_connected(
    connect: Connect,
    backoff: Patience,
    started: Callable[[], None],
    *,
    again: Callable[[Problem], bool] = is_passing,
) -> None:
    """Reconnects until the stream ends; `connect` keeps the position in the stream.

    :param started: called when the first connection is open; a failure before that is raised at once
    :param again: whether to retry after an error of the daemon, once there was a connection
    """
    connected = False

    def opened() -> None:
        nonlocal connected
        connected = True
        backoff.connected()
        started()

    while True:
        error: ClientError | Problem
        try:
            lost = await connect(opened)
            if lost is None:
                return
            error = lost
        except ClientProblem as answer:
            if not connected or not again(answer):
                raise
            error = answer
        except (Unreachable, ConnectionLost, DeadlineExceeded) as failure:
            if not connected:
                raise
            error = failure
        await backoff.wait(error)
