"""Sends the chunks of files, and receives the missing chunks of an assembly.

Both are independent of the other end, which is a registry or another host. Both hold a few chunks in memory at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import trio

from volant.concurrency import TokenBucket

from ._description import Description
from ._files import Assembly, ChunkReader, LocalChunks, check_chunk

_BURST_S = 0.25


class Throttle:
    """Limits the bytes per second that are sent and received. A transfer that exceeds the limit waits."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """Creates it. With None there is no limit."""
        self._bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, bytes_per_s * _BURST_S)

    async def spend(self, count: int) -> None:
        """Waits until `count` more bytes fit into the bandwidth."""
        wait_s = 0.0 if self._bucket is None else self._bucket.spend(count, trio.current_time())
        if wait_s > 0:
            await trio.sleep(wait_s)


_MEMORY = 32 * 1024 * 1024
"""Maximum memory for the chunks of one transfer, unless two chunks are larger."""
_MOST_AT_ONCE = 8


class Received(NamedTuple):
    """A chunk that has arrived, not checked yet."""

    data: bytes
    wire_bytes: int
    """Its size as sent, possibly compressed."""


class Sink(Protocol):
    """The destination of chunks."""

    async def lacks(self, digests: Sequence[str]) -> Collection[str]:
        """Returns the chunks that may have to be sent."""

    async def put(self, digest: str, data: bytes) -> int:
        """Sends a chunk, unless it exists there; returns the number of sent bytes. Several calls run at once."""


class Source(Protocol):
    """The source of chunks, which is not trusted."""

    async def get(self, digest: str, length: int) -> Received:
        """Returns a chunk of at most `length` bytes. Several calls run at once."""


class Progress(msgspec.Struct):
    """The progress of a transfer."""

    total_chunks: int = 0
    done_chunks: int = 0
    """The number of chunks at their destination, whether they were moved or not."""
    moved_chunks: int = 0
    total_bytes: int = 0
    done_bytes: int = 0
    """The size of these chunks, before compression."""
    moved_bytes: int = 0
    """The bytes sent or received, as transferred."""
    on_change: Callable[[], None] = lambda: None

    def begin(self, description: Description) -> None:
        """Records the total size."""
        self.total_chunks, self.total_bytes = len(description.chunks), description.size

    def count(self, length: int, *, moved: int = 0) -> None:
        """Counts a chunk of `length` bytes, for which `moved` bytes were transferred."""
        self.done_chunks += 1
        self.done_bytes += length
        self.moved_chunks += bool(moved)
        self.moved_bytes += moved
        self.on_change()


async def send(reader: ChunkReader, description: Description, sink: Sink, progress: Progress) -> None:
    """Sends the chunks that the sink lacks. :raises OSError: the files can't be read. Raises the errors of the sink."""
    progress.begin(description)
    places = [each[0] for each in description.places()]
    lacking = await sink.lacks(description.chunks)

    async def put(chunk: int) -> None:
        digest, place = description.chunks[chunk], places[chunk]
        if digest not in lacking:
            progress.count(place.length)
            return
        data = await reader.read(place)
        # The content may have changed since its description, or the disk fails.
        check_chunk(digest, data)
        progress.count(place.length, moved=await sink.put(digest, data))

    await _for_each(put, range(len(places)), description.chunk_bytes)


async def receive(
    assembly: Assembly, description: Description, source: Source, progress: Progress, local: LocalChunks | None = None
) -> None:
    """Completes an assembly with its existing content, chunks of this host, and the rest from the source. Everything is
    on the disk when this returns.

    :raises ChunkError: `chunk_mismatch` :raises OSError: the files can't be written. Raises the errors of the source.
    """
    progress.begin(description)
    lengths = [each[0].length for each in description.places()]
    missing = await assembly.lacks()
    for chunk in set(range(len(lengths))).difference(missing):
        progress.count(lengths[chunk])
    if local is not None and missing:
        copied = await local.copy(assembly, description, missing)
        missing = [chunk for chunk in missing if chunk not in copied]
        for chunk in copied:
            progress.count(lengths[chunk])

    async def get(chunk: int) -> None:
        received = await source.get(description.chunks[chunk], lengths[chunk])
        await assembly.write(chunk, received.data)
        progress.count(lengths[chunk], moved=received.wire_bytes)

    await _for_each(get, missing, description.chunk_bytes)
    await assembly.sync()


async def _for_each(work: Callable[[int], Awaitable[None]], chunks: Iterable[int], chunk_bytes: int) -> None:
    """Runs the work for each chunk, for several at once. The first failure ends all and is raised."""
    todo = iter(chunks)
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def worker() -> None:
            try:
                for chunk in todo:
                    await work(chunk)
            except Exception as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        for _ in range(max(1, min(_MOST_AT_ONCE, _MEMORY // (2 * chunk_bytes)))):
            nursery.start_soon(worker)
    if failures:
        raise failures[0]
