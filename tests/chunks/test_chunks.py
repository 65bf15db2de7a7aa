"""Files become chunks and files again; only what is lacking is moved, and nothing that is wrong is accepted."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from volant.chunks import (
    MAX_CHUNK_BYTES,
    MAX_PIECES,
    Assembly,
    ChunkedFile,
    ChunkError,
    Description,
    LocalChunks,
    Progress,
    Received,
    Throttle,
    check,
    chunk_bytes_for,
    open_files,
    receive,
    send,
)

PIECE = 256 * 1024
GIB = 2**30


class Peer:
    """Both ends of a transfer, in memory. `breaks_after`: so many chunks arrive, then the connection breaks."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.chunks: dict[str, bytes] = {}
        self.moved: list[str] = []
        self._left = breaks_after

    async def lacks(self, digests: Sequence[str]) -> Collection[str]:
        await trio.lowlevel.checkpoint()
        return set(digests) - self.chunks.keys()

    async def put(self, digest: str, data: bytes) -> int:
        await self._move(digest)
        self.chunks[digest] = data
        return len(data)

    async def get(self, digest: str, length: int) -> Received:
        await self._move(digest)
        data = self.chunks[digest]
        return Received(data, len(data))

    async def _move(self, digest: str) -> None:
        await trio.lowlevel.checkpoint()
        if self._left is not None:
            if not self._left:
                raise ConnectionResetError
            self._left -= 1
        self.moved.append(digest)


def memory(path: Path, *content: bytes | int) -> Path:
    """Writes a file of pieces, each of one byte value repeated; a number is a hole of so many pieces."""
    with path.open("wb") as file:
        for piece in content:
            if isinstance(piece, int):
                file.seek(piece * PIECE, os.SEEK_CUR)
            else:
                file.write(piece)
        file.truncate()
    return path


def piece(letter: str, length: int = PIECE) -> bytes:
    return letter.encode() * length


async def describe(*paths: Path) -> Description:
    with open_files(paths) as reader:
        return await reader.describe([path.name for path in paths])


async def push(peer: Peer, *paths: Path) -> tuple[Description, Progress]:
    progress = Progress()
    with open_files(paths) as reader:
        description = await reader.describe([path.name for path in paths])
        await send(reader, description, peer, progress)
    return description, progress


async def pull(
    peer: Peer, description: Description, directory: Path, local: Sequence[Path] = (), max_bytes: int = GIB
) -> Progress:
    progress = Progress()
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240
    with Assembly(directory, description) as assembly:
        await receive(assembly, description, peer, progress, LocalChunks(local, max_bytes=max_bytes))
    return progress


async def test_files_arrive_as_they_are_and_zeros_are_free(tmp_path: Path) -> None:
    first = memory(tmp_path / "memory", 3, piece("a"), 5, piece("b"), bytes(PIECE), piece("a"), 2)
    second = memory(tmp_path / "state", piece("c", 1000))
    peer = Peer()
    description, sent = await push(peer, first, second)
    got = await pull(peer, description, tmp_path / "there")
    for path in (first, second):
        copy = tmp_path / "there" / path.name
        assert copy.read_bytes() == path.read_bytes()
        assert copy.stat().st_blocks <= path.stat().st_blocks
    assert (sent.moved_chunks, got.moved_chunks) == (3, 3)
    assert got.done_bytes == got.total_bytes == sent.moved_bytes == 2 * PIECE + 1000


async def test_pages_of_zeros_in_a_chunk_stay_holes(tmp_path: Path) -> None:
    spread = bytearray(PIECE)
    spread[PIECE // 2] = 1
    peer = Peer()
    description, _ = await push(peer, memory(tmp_path / "memory", bytes(spread)))
    await pull(peer, description, tmp_path / "there")
    assert (tmp_path / "there" / "memory").read_bytes() == spread
    assert (tmp_path / "there" / "memory").stat().st_blocks * 512 <= 8192


async def test_siblings_share_chunks_in_both_directions(tmp_path: Path) -> None:
    peer = Peer()
    one = memory(tmp_path / "one", piece("a"), piece("b"), piece("c"))
    other = memory(tmp_path / "other", piece("a"), piece("x"), piece("c"))
    await push(peer, one)
    description, sent = await push(peer, other)
    assert (sent.moved_chunks, sent.done_chunks) == (1, 3)
    got = await pull(peer, description, tmp_path / "there", [tmp_path / "gone", one])
    assert (got.moved_chunks, got.done_chunks) == (1, 3)
    assert (tmp_path / "there" / "other").read_bytes() == other.read_bytes()


async def test_local_files_are_read_within_a_bound(tmp_path: Path) -> None:
    peer = Peer()
    one = memory(tmp_path / "one", piece("a"), piece("b"))
    description, _ = await push(peer, one)
    assert (await pull(peer, description, tmp_path / "there", [one], max_bytes=PIECE)).moved_chunks == 2


@pytest.mark.parametrize("direction", ["push", "pull"])
async def test_a_broken_transfer_goes_on_where_it_ended(tmp_path: Path, direction: str) -> None:
    source = memory(tmp_path / "memory", *(piece(letter) for letter in "abcdefghij"))
    peer = Peer()
    description = await describe(source)
    if direction == "pull":
        await push(peer, source)
    peer.moved, peer._left = [], 4
    with pytest.raises(ConnectionResetError):
        await (push(peer, source) if direction == "push" else pull(peer, description, tmp_path / "there"))
    arrived = len(peer.moved)
    peer._left = None
    if direction == "push":
        _, progress = await push(peer, source)
    else:
        progress = await pull(peer, description, tmp_path / "there")
        assert (tmp_path / "there" / "memory").read_bytes() == source.read_bytes()
    assert len(peer.moved) == len(set(peer.moved)) == 10
    assert progress.moved_chunks == 10 - arrived


async def test_what_was_there_and_is_wrong_is_replaced(tmp_path: Path) -> None:
    half = piece("a", PIECE // 2) + bytes(PIECE // 2)
    source = memory(tmp_path / "memory", half, 1, piece("b"))
    peer = Peer()
    description, _ = await push(peer, source)
    (tmp_path / "there").mkdir()
    memory(tmp_path / "there" / "memory", piece("z"), piece("z"), piece("b"), piece("z"))
    assert (await pull(peer, description, tmp_path / "there")).moved_chunks == 1
    assert (tmp_path / "there" / "memory").read_bytes() == source.read_bytes()


async def test_writes_that_are_cut_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = piece("a", PIECE // 2) + bytes(PIECE // 2)
    source = memory(tmp_path / "memory", half, 1)
    peer = Peer()
    description, _ = await push(peer, source)
    (tmp_path / "there").mkdir()
    memory(tmp_path / "there" / "memory", piece("z"), piece("z"))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: len(data) // 2 + 1], offset))
    await pull(peer, description, tmp_path / "there")
    assert (tmp_path / "there" / "memory").read_bytes() == source.read_bytes()


async def test_local_files_that_can_not_be_read_have_no_chunks(tmp_path: Path) -> None:
    peer = Peer()
    description, _ = await push(peer, memory(tmp_path / "memory", piece("a"), piece("b")))
    other = memory(tmp_path / "other", piece("b"))
    local = [tmp_path, tmp_path / "missing", other]
    assert (await pull(peer, description, tmp_path / "there", local)).moved_chunks == 1


async def test_a_chunk_that_was_changed_on_the_way_is_refused(tmp_path: Path) -> None:
    peer = Peer()
    description, _ = await push(peer, memory(tmp_path / "memory", piece("a"), piece("b")))
    peer.chunks[description.chunks[1]] = piece("x")
    with pytest.raises(ChunkError) as caught:
        await pull(peer, description, tmp_path / "there")
    assert caught.value.code == "chunk_mismatch"


async def test_a_file_that_changes_while_it_is_sent_is_not_sent(tmp_path: Path) -> None:
    path = memory(tmp_path / "memory", piece("a"))
    peer = Peer()
    with open_files([path]) as reader:
        description = await reader.describe(["memory"])
        path.write_bytes(piece("b"))
        with pytest.raises(ChunkError):
            await send(reader, description, peer, Progress())
    assert not peer.chunks


async def test_links_are_not_followed(tmp_path: Path) -> None:
    description = await describe(memory(tmp_path / "memory", piece("a")))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "memory").symlink_to(tmp_path / "memory")
    with pytest.raises(OSError, match="symbolic"), Assembly(tmp_path / "there", description):
        pass
    with pytest.raises(OSError, match="symbolic"), open_files([tmp_path / "there" / "memory"]):
        pass


def test_chunks_grow_with_the_files_so_that_their_number_is_bounded() -> None:
    assert chunk_bytes_for([GIB, 1]) == PIECE
    assert chunk_bytes_for([16 * GIB]) == 2**20
    assert chunk_bytes_for([16 * GIB, 1]) == 2**21
    with pytest.raises(ChunkError):
        chunk_bytes_for([MAX_CHUNK_BYTES * MAX_PIECES + 1])


A, B = "a" * 64, "b" * 64
GOOD = Description(PIECE, (A, B), (ChunkedFile("memory", 3 * PIECE, (0, -1, 1)), ChunkedFile("state", PIECE, (0,))))


@pytest.mark.parametrize(
    "bad",
    [
        {"chunk_bytes": PIECE + 1},
        {"chunk_bytes": PIECE // 2},
        {"chunk_bytes": 2 * MAX_CHUNK_BYTES},
        {"chunks": (A, A)},
        {"chunks": (A, B, "c" * 64)},
        {"files": (GOOD.files[0], GOOD.files[0])},
        {"files": (ChunkedFile("memory", 3 * PIECE, (0, 1)),)},
        {"files": (ChunkedFile("memory", 2 * PIECE, (0, 1, 1)),)},
        {"files": (ChunkedFile("memory", 2 * PIECE, (0, 2)),)},
        {"files": (ChunkedFile("memory", 2 * PIECE, (1, -2)),)},
        {"files": (ChunkedFile("memory", PIECE + 1, (0, 0)), ChunkedFile("state", PIECE, (1,)))},
    ],
)
def test_a_description_whose_numbers_do_not_fit_is_refused(bad: dict[str, object]) -> None:
    check(GOOD, max_bytes=3 * PIECE)
    with pytest.raises(ChunkError) as caught:
        check(msgspec.structs.replace(GOOD, **bad), max_bytes=GIB)
    assert caught.value.code == "description_invalid"


def test_a_description_of_too_much_is_refused() -> None:
    with pytest.raises(ChunkError) as caught:
        check(GOOD, max_bytes=3 * PIECE - 1)
    assert caught.value.code == "too_large"


async def test_the_bandwidth_is_bounded(autojump_clock: MockClock) -> None:
    throttle = Throttle(1000)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(throttle.spend, 1000)
    assert 9 <= trio.current_time() - began <= 10
