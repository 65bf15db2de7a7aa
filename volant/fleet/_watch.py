"""Watches: the changes of all keys that begin with a prefix, those of one revision together, without a hole."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import msgspec
import trio

from ._gateway import MAX_ANSWER, Line, range_of, read_line
from ._interface import Changes, Compacted, EtcdRefused, EtcdUnavailable, OutcomeUnknown

_Stream = Callable[[str, bytes], AbstractAsyncContextManager[AsyncIterable[bytes]]]
"""Sends a request to a member and gives the body of its answer."""

_BEGIN_S = 10.0
"""How long the first line may take: etcd sends it at once, or, without a quorum, an error after some seconds."""


class Watch:
    """The changes after a revision. `Etcd.watch` opens it."""

    def __init__(self, lines: AsyncIterator[bytes], endpoint: str) -> None:
        self._lines = lines
        self._endpoint = endpoint

    async def receive(self) -> Changes:
        """Waits for the next changes.

        :raises Compacted: what it has to report is not kept any more; list again.
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
        """Returns the next line, which may have no changes. :raises: as `receive`"""
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
    """It has more bytes than may be in memory."""


@asynccontextmanager
async def watching(endpoint: str, stream: _Stream, prefix: str, *, after: int) -> AsyncIterator[Watch]:
    """Watches all keys that begin with a prefix, from the revision after `after` on.

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
