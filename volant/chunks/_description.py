"""Describes files as lists of chunks: pieces of one size, each named by the SHA-256 of its content.

Memory is aligned to pages, and files of disks to clusters, so pieces at fixed offsets find the common data of two
copies of a guest. A piece of zeros has no digest and costs nothing. A description is not trusted: `check` refuses
inconsistent numbers, so that an assembly writes only inside its files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec

from volant.model import CodedError


class ChunkError(CodedError):
    """An error of describing, sending or assembling files: `description_invalid`, `chunk_mismatch`, `too_large`."""


MIN_CHUNK_BYTES = 256 * 1024
"""Guests touch pages all over their memory: of two clones of a template with 84 MiB each, the second adds 20 MiB in
chunks of 64 KiB, 30 of 256 KiB, 46 of 1 MiB and 72 of 4 MiB. But each chunk costs requests."""
MAX_CHUNK_BYTES = 64 * 1024 * 1024
MAX_PIECES = 16384
"""Maximum pieces of all files together. As many chunks fit into a manifest of 4 MiB, the limit of registries."""
MAX_FILES = 64
ZEROS = -1

ChunkDigest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""The SHA-256 of a chunk's content, in hex."""


class ChunkedFile(msgspec.Struct, frozen=True):
    """One file."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHUNK_BYTES * MAX_PIECES)]
    """The size in bytes."""
    pieces: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_PIECES)]
    """The content: for each piece, the last of which may be shorter, the number of its chunk, or `ZEROS`."""


class Place(NamedTuple):
    """The place of a chunk."""

    file: int
    """The number of the file in the description."""
    offset: int
    length: int


class Description(msgspec.Struct, frozen=True):
    """The description of some files."""

    chunk_bytes: int
    chunks: Annotated[tuple[ChunkDigest, ...], msgspec.Meta(max_length=MAX_PIECES)]
    """The unique digests, in the order of their first appearance."""
    files: Annotated[tuple[ChunkedFile, ...], msgspec.Meta(max_length=MAX_FILES)]

    def pieces(self) -> Iterator[tuple[int, Place]]:
        """Yields each piece of each file: the number of its chunk, or `ZEROS`, and its place."""
        for number, file in enumerate(self.files):
            for at, chunk in enumerate(file.pieces):
                offset = at * self.chunk_bytes
                yield chunk, Place(number, offset, min(self.chunk_bytes, file.size - offset))

    def places(self) -> list[list[Place]]:
        """Returns the places of each chunk."""
        found: list[list[Place]] = [[] for _ in self.chunks]
        for chunk, place in self.pieces():
            if chunk != ZEROS:
                found[chunk].append(place)
        return found

    @property
    def size(self) -> int:
        """The bytes of all chunks, each counted once."""
        return sum(places[0].length for places in self.places())

    @property
    def disk_bytes(self) -> int:
        """Maximum space of the files on a disk."""
        return sum(place.length for chunk, place in self.pieces() if chunk != ZEROS)


def chunk_bytes_for(sizes: Sequence[int]) -> int:
    """Returns the size of chunks for files of these sizes, which is the same for copies of one guest. :raises
    ChunkError: they are too large."""
    chunk_bytes = MIN_CHUNK_BYTES
    while sum(-(-size // chunk_bytes) for size in sizes) > MAX_PIECES:
        chunk_bytes *= 2
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise ChunkError("too_large", f"{sum(sizes) // 2**30} GiB are more than can be described in chunks")
    return chunk_bytes


def check(description: Description, *, max_bytes: int) -> None:
    """Checks an untrusted description.

    :param max_bytes: the maximum size of the files on disk
    :raises ChunkError: `description_invalid`, `too_large`
    """
    chunk_bytes = description.chunk_bytes
    if chunk_bytes.bit_count() != 1 or not MIN_CHUNK_BYTES <= chunk_bytes <= MAX_CHUNK_BYTES:
        raise _invalid(f"chunks of {chunk_bytes} bytes")
    if len(set(description.chunks)) != len(description.chunks):
        raise _invalid("a chunk is listed twice")
    if len({file.name for file in description.files}) != len(description.files):
        raise _invalid("two files have one name")
    if sum(len(file.pieces) for file in description.files) > MAX_PIECES:
        raise _invalid(f"more than {MAX_PIECES} pieces")
    for file in description.files:
        if len(file.pieces) != -(-file.size // chunk_bytes):
            raise _invalid(f"file {file.name!r} has {file.size} bytes and {len(file.pieces)} pieces")
        if not all(ZEROS <= chunk < len(description.chunks) for chunk in file.pieces):
            raise _invalid(f"file {file.name!r} names a chunk that is not listed")
    for places in description.places():
        if len({place.length for place in places}) != 1:
            raise _invalid("a chunk is used nowhere, or has two lengths")
    if description.disk_bytes > max_bytes:
        raise ChunkError(
            "too_large",
            f"the files have {description.disk_bytes // 2**20} MiB, and {max_bytes // 2**20} are allowed here",
        )


def _invalid(why: str) -> ChunkError:
    return ChunkError("description_invalid", f"the description of the files is wrong: {why}")
