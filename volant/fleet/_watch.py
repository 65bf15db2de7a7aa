"""Watches: the changes of all keys with a prefix, without gaps, with the changes of one revision together."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import msgspec
import trio

from ._gateway import MAX_ANSWER, Line, range_of, read_line
from ._interface import Changes, Compacted, EtcdRefused, EtcdUnavailable, OutcomeUnknown

_Stream = Callable[[str, bytes], AbstractAsyncContextManager[AsyncIterable[bytes]]]
"""Sends a request to a member and yields the body of its answer."""

_BEGIN_S = 10.0
"""Maximum time for the first line: etcd sends it at once, or, without a quorum, an error after some seconds."""


class Watch:
    """The changes after a revision. `Etcd.watch` opens it."""

    def __init__(self, lines: AsyncIterator[bytes], endpoint: str) -> None:
        self._lines = lines
        self._endpoint = endpoint

    async def receive(self) -> Changes:
        """Waits for the next changes.

        :raises Compacted: the changes have expired; list again.
        :raises EtcdUnavailable: the connection broke, or the member has lost the quorum; watch again.
        :raises EtcdRefused:
        """
        while True:
            try:
                changes = (await self.next_line()).changes
            except _LineTooLong:
                # Many changes at once, as after a pause. They would be as many the next time.
                raise Compacted from None
            if changes:
                return Changes(changes, max(each.revision for each in changes))

    async def next_line(self) -> Line:
        """Returns the next line, which may have no changes. :raises: see `receive`."""
        try:
            content = await anext(self._lines, None)
        except OutcomeUnknown as error:
            raise EtcdUnavailable(str(error)) from error
        if content is None:
            raise EtcdUnavailable(f"{self._endpoint} has ended the watch")
        try:
            line = read_line(content)
        except (msgspec.MsgspecError, ValueError):
            raise EtcdUnavailable(f"{self._endpoint} does not answer as etcd does") from None
        if line.broken is not None:
            raise EtcdUnavailable(f"{self._endpoint}: {line.broken}")
        # The stream stays open, without a further line.
        if line.compacted:
            raise Compacted
        if line.ended is not None:
            raise EtcdRefused(f"{self._endpoint} has ended the watch: {line.ended}")
        return line


class _LineTooLong(EtcdUnavailable):
    """The line is larger than the limit for data in memory."""


@asynccontextmanager
async def watching(endpoint: str, stream: _Stream, prefix: str, *, after: int) -> AsyncIterator[Watch]:
    """Watches all keys with a prefix, from the revision after `after` on.

    :raises EtcdUnavailable: the member does not begin the watch in time. :raises Compacted, EtcdRefused:
    """
    body = {"create_request": {**range_of(prefix), "start_revision": str(after + 1)}}
    with trio.CancelScope(deadline=trio.current_time() + _BEGIN_S) as beginning:
        try:
            async with (
                stream("/v3/watch", msgspec.json.encode(body)) as answer,
                aclosing(_lines(answer, endpoint)) as lines,
            ):
                watch = Watch(lines, endpoint)
                begun = await watch.next_line()
                if begun.revision < after:
                    # It would be silent until it gets there.
                    raise Compacted
                beginning.deadline = math.inf
                yield watch
        except OutcomeUnknown as error:
            raise EtcdUnavailable(str(error)) from error
    if beginning.cancelled_caught:
        raise EtcdUnavailable(f"{endpoint} has not begun to watch within {_BEGIN_S:g} s")


async def _lines(pieces: AsyncIterable[bytes], endpoint: str) -> AsyncGenerator[bytes, None]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_ANSWER:
            raise _LineTooLong(f"{endpoint} sends a line of more than {MAX_ANSWER} bytes")
