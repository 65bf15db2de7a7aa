"""Copies of files keep their holes, and copies of a process's memory have its own pages."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from volant.host import Host, ProcessGone, _mappings
from volant.model import ProcessIdentity

MIB = 1024 * 1024
SIZE = 5 * MIB
OWN = ((0, 1), (7, 1), (20, 300), (511, 2), (SIZE // 4096 - 1, 1))
"""First page and count of what the process writes to."""

# Maps a file privately, writes to some of it, reads the rest, and says so.
WRITER = f"""
import mmap, os, sys, time
fd = os.open("memory", os.O_RDONLY)
memory = mmap.mmap(fd, {SIZE}, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
sum(memory[::4096])
for first, count in {OWN}:
    memory[first * 4096 : (first + count) * 4096] = bytes([first % 251 + 1]) * (count * 4096)
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def content() -> bytes:
    """Data, a hole, data, and a hole at the end."""
    noise = random.Random(1).randbytes
    return noise(MIB + 4096) + bytes(2 * MIB) + noise(MIB // 2) + bytes(SIZE - 3 * MIB - MIB // 2 - 4096)


@pytest.fixture
def memory(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "memory"
    with path.open("wb") as file:
        for start in range(0, SIZE, 4096):
            if any(page := content[start : start + 4096]):
                file.seek(start)
                file.write(page)
        file.truncate(SIZE)
    return path


@pytest.fixture
async def writer(host: Host, tmp_path: Path, memory: Path) -> AsyncIterator[ProcessIdentity]:
    tag = f"volant-test.{host.random.new_id()}"
    argv = [sys.executable, "-c", WRITER, f"guest={tag}"]
    identity = await host.processes.spawn(argv, tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out")
    with host.processes.open(identity) as process:
        with trio.fail_after(20), host.watches.open(tmp_path / "out") as watch:
            while not await host.files.read(tmp_path / "out"):
                await watch.wait()
        yield identity
        process.kill()
        await process.wait()


def seen_by_writer(content: bytes) -> bytes:
    seen = bytearray(content)
    for first, count in OWN:
        seen[first * 4096 : (first + count) * 4096] = bytes([first % 251 + 1]) * (count * 4096)
    return bytes(seen)


@pytest.fixture(params=[_mappings.PIECE, MIB])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and in pieces whose borders lie anywhere."""
    monkeypatch.setattr(_mappings, "PIECE", request.param)


@pytest.mark.usefixtures("pieces")
async def test_a_file_is_copied_without_its_holes(host: Host, tmp_path: Path, memory: Path, content: bytes) -> None:
    copy = tmp_path / "copy"
    await host.files.copy(memory, copy)
    assert copy.read_bytes() == content
    assert copy.stat().st_mode & 0o777 == 0o600
    assert host.disk.used(copy) <= host.disk.used(memory)
    with pytest.raises(FileExistsError):
        await host.files.copy(memory, copy)


@pytest.mark.usefixtures("pieces")
async def test_a_mapping_is_copied_whose_file_has_lost_its_name(
    host: Host, tmp_path: Path, memory: Path, content: bytes, writer: ProcessIdentity
) -> None:
    await host.files.remove(memory)
    copy = tmp_path / "copy"
    await host.process_memory.copy_mapped_file(writer, SIZE, copy)
    assert copy.read_bytes() == content
    assert await host.process_memory.copy_own_pages(writer, SIZE, copy) == sum(count for _, count in OWN) * 4096
    assert copy.read_bytes() == seen_by_writer(content)


# Maps a file as the writer does. Then it puts another file in the place of its descriptor, and back, without end: one
# that it has not opened for reading, which takes no right.
SWAPPER = f"""
import ctypes, mmap, os, sys
shown = os.open("memory", os.O_RDONLY)
protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
ctypes.CDLL(None).mmap(None, ctypes.c_size_t({SIZE}), protection, flags, shown, ctypes.c_long(0))
other, kept = os.open(sys.argv[1], os.O_PATH), os.dup(shown)
print("up", flush=True)
while True:
    os.dup2(other, shown)
    os.dup2(kept, shown)
"""


@pytest.mark.parametrize("size", [SIZE, SIZE + 4096])
async def test_a_process_that_swaps_its_descriptors_gets_no_other_file(
    host: Host, tmp_path: Path, memory: Path, content: bytes, size: int
) -> None:
    (tmp_path / "secret").write_bytes(b"secret" + bytes(size - 6))
    tag = f"volant-test.{host.random.new_id()}"
    argv = [sys.executable, "-c", SWAPPER, str(tmp_path / "secret"), f"guest={tag}"]
    identity = await host.processes.spawn(argv, tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out")
    with host.processes.open(identity) as process:
        with trio.fail_after(20), host.watches.open(tmp_path / "out") as watch:
            while not await host.files.read(tmp_path / "out"):
                await watch.wait()
        try:
            for _ in range(300):
                with suppress(FileNotFoundError):
                    fd = _mappings.find_private_mapping(process.pid, SIZE).open_file()
                    assert os.pread(fd, 6, 0) == content[:6]
                    os.close(fd)
        finally:
            process.kill()
            await process.wait()


async def test_a_missing_mapping_is_an_error(host: Host, tmp_path: Path, writer: ProcessIdentity) -> None:
    with pytest.raises(FileNotFoundError, match="0 private mappings"):
        await host.process_memory.copy_mapped_file(writer, SIZE + 4096, tmp_path / "copy")
    with host.processes.open(writer) as process:
        process.kill()
        await process.wait()
    with pytest.raises((ProcessGone, OSError)):
        await host.process_memory.copy_own_pages(writer, SIZE, tmp_path / "memory")


async def test_a_cancelled_copy_stops_between_two_pieces(
    host: Host, tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_mappings, "PIECE", 4096)
    with trio.CancelScope() as scope:
        scope.cancel()
        await host.files.copy(memory, tmp_path / "copy")
    assert scope.cancelled_caught
    assert host.disk.used(tmp_path / "copy") < 8 * 4096


async def test_a_large_hole_is_skipped_at_once(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel looks at each of its pages, so who asks again and again on the way takes seconds."""
    size, began = 1024 * MIB, list[int]()
    copy_piece = _mappings.copy_piece

    def counted(source: int, target: int, start: int, size: int) -> int:
        began.append(start)
        return copy_piece(source, target, start, size)

    monkeypatch.setattr(_mappings, "copy_piece", counted)
    await host.disk.allocate(tmp_path / "memory", size, reserve=False)
    with (tmp_path / "memory").open("r+b") as file:
        for at in (MIB, size - MIB):
            file.seek(at)
            file.write(b"data")
    await host.files.copy(tmp_path / "memory", tmp_path / "copy")
    assert began == [0]
    with (tmp_path / "copy").open("rb") as copy:
        for at in (MIB, size - MIB):
            copy.seek(at)
            assert copy.read(4) == b"data"
    assert host.files.size(tmp_path / "copy") == size


async def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with trio.fail_after(20), pytest.raises(OSError, match="no regular file"):
        await Host().files.copy(tmp_path / "pipe", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
