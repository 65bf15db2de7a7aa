"""Reads files in chunks, and assembles files from chunks.

A file that is being assembled needs no record of its chunks: the next transfer, even after a kill, hashes the content,
keeps valid chunks, and clears the rest.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import trio

from ._description import ZEROS, ChunkedFile, ChunkError, Description, Place, chunk_bytes_for

_TURN = 32 * 1024 * 1024
"""Bytes that a thread reads between two checks for cancellation."""
_PAGE = 4096
_NO_PAGE = bytes(_PAGE)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class ChunkReader:
    """Open files, read in chunks. They may lose their names while they are open."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors

    async def describe(self, names: Sequence[str]) -> Description:
        """Returns the description of the files, after reading all of their content. :raises ChunkError: :raises
        OSError:"""
        sizes = [os.fstat(fd).st_size for fd in self._descriptors]
        chunk_bytes = chunk_bytes_for(sizes)
        numbers: dict[str, int] = {}
        files = []
        for name, fd, size in zip(names, self._descriptors, sizes, strict=True):
            pieces = [ZEROS] * -(-size // chunk_bytes)
            for offset, digest in await _digests(fd, size, chunk_bytes):
                pieces[offset // chunk_bytes] = numbers.setdefault(digest, len(numbers))
            files.append(ChunkedFile(name, size, tuple(pieces)))
        return Description(chunk_bytes, tuple(numbers), tuple(files))

    async def read(self, place: Place) -> bytes:
        """Returns the content of a piece. :raises OSError:"""
        return await trio.to_thread.run_sync(_read, self._descriptors[place.file], place.offset, place.length)

    async def find(self, wanted: Collection[str], chunk_bytes: int) -> dict[str, Place]:
        """Returns the places of wanted chunks in the files, by their digests. :raises OSError:"""
        found: dict[str, Place] = {}
        for number, fd in enumerate(self._descriptors):
            size = os.fstat(fd).st_size
            for offset, digest in await _digests(fd, size, chunk_bytes):
                if digest in wanted:
                    found[digest] = Place(number, offset, min(chunk_bytes, size - offset))
        return found


@contextmanager
def open_files(paths: Sequence[Path]) -> Iterator[ChunkReader]:
    """Opens files to read them in chunks. :raises OSError:"""
    with ExitStack() as stack:
        descriptors = []
        for path in paths:
            descriptors.append(fd := os.open(path, _READ))
            stack.callback(os.close, fd)
        yield ChunkReader(descriptors)


class Assembly:
    """The files of a description, assembled in a directory. Nothing else may write there at the same time."""

    def __init__(self, directory: Path, description: Description) -> None:
        self._directory = directory
        self._description = description
        self._places = description.places()
        self._descriptors: list[int] = []

    def __enter__(self) -> Self:
        try:
            for file in self._description.files:
                fd = os.open(self._directory / file.name, _WRITE, 0o600)
                self._descriptors.append(fd)
                if os.fstat(fd).st_size != file.size:
                    os.ftruncate(fd, file.size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors.clear()

    async def lacks(self) -> list[int]:
        """Returns the numbers of the missing chunks, and clears wrong content.

        :raises OSError:
        """
        digests, chunk_bytes = self._description.chunks, self._description.chunk_bytes
        missing: set[int] = set()
        for file, fd in zip(self._description.files, self._descriptors, strict=True):
            right = set()
            for offset, digest in await _digests(fd, file.size, chunk_bytes):
                at = offset // chunk_bytes
                if file.pieces[at] != ZEROS and digests[file.pieces[at]] == digest:
                    right.add(at)
                else:
                    length = min(chunk_bytes, file.size - offset)
                    await trio.to_thread.run_sync(_write, fd, bytes(length), offset)
            missing |= {chunk for at, chunk in enumerate(file.pieces) if chunk != ZEROS and at not in right}
        return sorted(missing)

    async def write(self, chunk: int, data: bytes) -> None:
        """Writes a chunk to each of its places, which must be empty.

        :raises ChunkError: `chunk_mismatch`, the data are not that chunk :raises OSError:
        """
        await trio.to_thread.run_sync(self._write, chunk, data)

    def _write(self, chunk: int, data: bytes) -> None:
        check_chunk(self._description.chunks[chunk], data)
        for place in self._places[chunk]:
            for start, end in _runs(data):
                _write(self._descriptors[place.file], data[start:end], place.offset + start)

    async def sync(self) -> None:
        """Writes all data to the disk. :raises OSError:"""
        for fd in self._descriptors:
            await trio.to_thread.run_sync(os.fsync, fd)


class LocalChunks:
    """Files of this host that may have wanted chunks, such as those of a template or of another copy."""

    def __init__(self, files: Sequence[Path], *, max_bytes: int) -> None:
        """Creates it. `files` has the most promising first; `max_bytes` is the maximum to read in search of chunks."""
        self._files = files
        self._max_bytes = max_bytes

    async def copy(self, assembly: Assembly, description: Description, missing: Collection[int]) -> set[int]:
        """Writes the chunks found in these files, and returns their numbers. Unreadable files are skipped.

        :raises OSError: the assembly can't be written
        """
        wanted = {description.chunks[chunk]: chunk for chunk in missing}
        left, done = self._max_bytes, set[int]()
        for path in self._files:
            with ExitStack() as stack:
                try:
                    left -= path.stat().st_blocks * 512
                    reader = stack.enter_context(open_files([path]))
                    found = await reader.find(wanted.keys(), description.chunk_bytes) if left >= 0 else {}
                except OSError:
                    continue  # it was removed meanwhile, or its disk fails
                for digest, place in found.items():
                    try:
                        data = await reader.read(place)
                    except OSError:
                        break
                    if digest_of(data) == digest:
                        await assembly.write(chunk := wanted.pop(digest), data)
                        done.add(chunk)
            if not wanted or left < 0:
                break
        return done


def digest_of(data: bytes) -> str:
    """Returns the digest of a chunk."""
    return hashlib.sha256(data).hexdigest()


def check_chunk(digest: str, data: bytes) -> None:
    """Checks a chunk. :raises ChunkError: `chunk_mismatch`"""
    if digest_of(data) != digest:
        raise ChunkError("chunk_mismatch", f"a chunk has another SHA-256 than {digest}", "try again")


async def _digests(fd: int, size: int, chunk_bytes: int) -> list[tuple[int, str]]:
    """Returns offset and digest of each piece of a file that is not zeros. Holes are not read. :raises OSError:"""
    found: list[tuple[int, str]] = []
    at = 0
    while at < size:
        at = await trio.to_thread.run_sync(_hash_turn, fd, at, size, chunk_bytes, found)
    return found


def _hash_turn(fd: int, at: int, size: int, chunk_bytes: int, found: list[tuple[int, str]]) -> int:
    """Hashes some of the pieces from `at` on, and returns the next offset."""
    left = _TURN
    while at < size and left > 0:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA) // chunk_bytes * chunk_bytes
        except OSError as error:
            if error.errno == errno.ENXIO:
                return size  # the rest is a hole
            raise
        data = _read(fd, at, min(chunk_bytes, size - at))
        if data.count(0) != len(data):
            found.append((at, digest_of(data)))
        at += chunk_bytes
        left -= chunk_bytes
    return at


def _read(fd: int, offset: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.pread(fd, length, offset)
        if not part:
            raise OSError(errno.EIO, "the file was cut while it was read")
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(fd: int, data: bytes, offset: int) -> None:
    # A disk that is nearly full takes a part; the next write fails.
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def _runs(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields the ranges without pages of zeros, which stay holes."""
    start = None
    for at in range(0, len(data), _PAGE):
        is_hole = data[at : at + _PAGE] == _NO_PAGE
        if is_hole and start is not None:
            yield start, at
            start = None
        elif not is_hole and start is None:
            start = at
    if start is not None:
        yield start, len(data)
