"""Sends the chunks of files somewhere, and gets the chunks that an assembly lacks.

Neither knows what is at the other end: a registry, or another host. Both hold a few chunks in memory at a time.
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
    """Bounds how many bytes a second are sent and received. A transfer that spends more than there is waits."""

    def __init__(self, bytes_per_s: float | None) -> None:
        """None: no bound."""
        self._bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, bytes_per_s * _BURST_S)

    async def spend(self, count: int) -> None:
        """Returns once `count` more bytes fit into the bandwidth."""
        wait_s = 0.0 if self._bucket is None else self._bucket.spend(count, trio.current_time())
        if wait_s > 0:
            await trio.sleep(wait_s)


_MEMORY = 32 * 1024 * 1024
"""What the chunks of one transfer take at most, unless two are larger."""
_MOST_AT_ONCE = 8


class Received(NamedTuple):
    """A chunk that has arrived, not checked."""

    data: bytes
    wire_bytes: int
    """Its size as it was sent, perhaps compressed."""


class Sink(Protocol):
    """Where chunks are sent."""

    async def lacks(self, digests: Sequence[str]) -> Collection[str]:
        """Returns the chunks that may have to be sent."""

    async def put(self, digest: str, data: bytes) -> int:
        """Sends a chunk, unless it is there; returns how many bytes were sent. Several calls run at once."""


class Source(Protocol):
    """Where chunks come from. What it gives is not trusted."""

    async def get(self, digest: str, length: int) -> Received:
        """Returns a chunk of at most `length` bytes. Several calls run at once."""


class Progress(msgspec.Struct):
    """How far a transfer is."""

    total_chunks: int = 0
    done_chunks: int = 0
    """Those that are where they are to be, whether they were moved or not."""
    moved_chunks: int = 0
    total_bytes: int = 0
    done_bytes: int = 0
    """Of the chunks that are done, before compression."""
    moved_bytes: int = 0
    """What was sent or received, as it was on the wire."""
    on_change: Callable[[], None] = lambda: None

    def begin(self, description: Description) -> None:
        """Notes how much there is."""
        self.total_chunks, self.total_bytes = len(description.chunks), description.size

    def count(self, length: int, *, moved: int = 0) -> None:
        """Counts a chunk of `length` bytes, for which `moved` bytes were on the wire."""
        self.done_chunks += 1
        self.done_bytes += length
        self.moved_chunks += bool(moved)
        self.moved_bytes += moved
        self.on_change()


async def send(reader: ChunkReader, description: Description, sink: Sink, progress: Progress) -> None:
    """Sends the chunks that the sink lacks. :raises OSError: the files can't be read. Raises what the sink raises."""
    progress.begin(description)
    places = [each[0] for each in description.places()]
    lacking = await sink.lacks(description.chunks)

    async def put(chunk: int) -> None:
        digest, place = description.chunks[chunk], places[chunk]
        if digest not in lacking:
            progress.count(place.length)
            return
        data = await reader.read(place)
        # What was described may have changed, or the disk fails.
        check_chunk(digest, data)
        progress.count(place.length, moved=await sink.put(digest, data))

    await _for_each(put, range(len(places)), description.chunk_bytes)


async def receive(
    assembly: Assembly, description: Description, source: Source, progress: Progress, local: LocalChunks | None = None
) -> None:
    """Completes an assembly: with what is there already, with chunks of this host, and the rest from the source. All is
    on the disk when this returns.

    :raises ChunkError: `chunk_mismatch` :raises OSError: the files can't be written. Raises what the source raises.
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
    """Does the work for each chunk, for several at once. The first failure ends all and is raised."""
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
