"""Files and disk space."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from volant.host import Host


async def test_files_are_replaced_whole_and_trees_removed(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    await host.files.write(path, b"one")
    await host.files.write(path, b"two", mode=0o640)
    assert await host.files.read(path) == b"two"
    assert await host.files.read(path, limit=2) == b"tw"
    assert await host.files.read_tail(path, 2) == b"wo"
    assert await host.files.read_tail(path, 100) == b"two"
    assert host.files.names(tmp_path) == ["file"]
    assert not await host.files.empty_if_larger(path, 3)
    assert await host.files.empty_if_larger(path, 2)
    assert host.files.size(path) == 0
    await host.files.make_fifo(tmp_path / "fifo")
    await host.files.make_fifo(tmp_path / "fifo")
    with pytest.raises(FileExistsError):
        await host.files.make_fifo(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    await host.files.mkdir(tmp_path / "tree" / "deep")
    (tmp_path / "tree" / "link").symlink_to(outside)
    (tmp_path / "alias").symlink_to(outside)
    for name in ("tree", "tree", "alias", "file"):
        await host.files.remove_tree(tmp_path / name)
    assert host.files.names(tmp_path) == ["fifo", "outside"]


async def test_allocation_fails_before_the_space_is_used(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "memory"
    await host.disk.allocate(path, 1 << 20)
    assert path.stat().st_blocks * 512 >= 1 << 20
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(OSError, match=r"No space left|File too large"):
        await host.disk.allocate(path, host.disk.free(tmp_path) * 16)
    assert not path.exists()


def test_a_hole_gives_space_back_and_keeps_the_size(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = host.descriptors.open(path, os.O_RDWR | os.O_CREAT)
    try:
        host.descriptors.write(fd, b"x" * 65536)
        os.fsync(fd)
        before = path.stat().st_blocks
        if not host.descriptors.punch_hole(fd, 0, 32768):
            pytest.skip("this file system has no holes")
        assert path.stat().st_blocks < before
        assert host.descriptors.read_at(fd, 4, 32766) == b"\0\0xx"
        with pytest.raises(OSError, match="Invalid"):
            host.descriptors.punch_hole(fd, -1, 1)
    finally:
        host.descriptors.close(fd)


async def test_unbacked_space_is_not_spare_memory(host: Host, tmp_path: Path) -> None:
    assert host.disk.unbacked(tmp_path / "nowhere") == 0
    await host.disk.allocate(tmp_path / "full", 2**20)
    await host.disk.allocate(tmp_path / "empty", 2**22, reserve=False)
    assert host.disk.unbacked(tmp_path) == 2**22
    with (tmp_path / "empty").open("r+b") as file:
        file.write(bytes(2**16))
        file.flush()
        os.fsync(file.fileno())
    assert host.disk.unbacked(tmp_path) == 2**22 - 2**16
    assert host.machine.spare_memory_mb(tmp_path) <= host.machine.memory_available_mb() + 64
    await host.disk.allocate(tmp_path / "vast", 2**43, reserve=False)
    assert host.machine.spare_memory_mb(tmp_path) == 0
    assert host.machine.file_room_mb(tmp_path) == 0
    (tmp_path / "vast").unlink()
    (tmp_path / "inner").mkdir()
    await host.disk.allocate(tmp_path / "inner" / "empty", 2**20, reserve=False)
    assert host.disk.unbacked(tmp_path) == 2**22 - 2**16 + 2**20
    for directory in (tmp_path, tmp_path / "none"):
        assert 0 < host.machine.file_room_mb(directory) <= host.disk.free(tmp_path) // 2**20
