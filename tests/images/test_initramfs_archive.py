"""The archive of the initramfs: the kernel reads the tree from it, and equal trees are equal bytes."""

from __future__ import annotations

import random
import stat

import pytest

from volant.images import _cpio


def unpack(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Reads a newc archive as the kernel does."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    inodes = set()
    while True:
        head = data[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * index : 14 + 8 * index], 16) for index in range(13)]
        inode, mode, uid, gid, _, mtime, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid, mtime) == (0, 0, 0)
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        start = (at + 110 + name_size + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            assert start == len(data)
            return found
        assert inode not in inodes
        inodes.add(inode)
        found[name[:-1].decode()] = (mode, data[start : start + size], (major, minor))
        at = (start + size + 3) // 4 * 4


TREE = {
    "init": _cpio.file(b"#!/bin/x\n", 0o755),
    "usr/bin/a": _cpio.file(b"12345"),
    "usr/bin/b": _cpio.symlink("a"),
    "usr-local/c": _cpio.file(b""),
    "tmp": _cpio.directory(0o1777),
    "dev/console": _cpio.character_device(5, 1, 0o600),
}


def test_the_archive_has_the_tree_with_parents_first() -> None:
    found = unpack(b"".join(_cpio.archive(TREE)))
    assert set(found) == {*TREE, "usr", "usr/bin", "usr-local", "dev"}
    for path, entry in TREE.items():
        assert found[path] == (entry.mode, entry.data, entry.device)
    names = list(found)
    for name in names:
        if "/" in name:
            assert names.index(name.rsplit("/", 1)[0]) < names.index(name)
    assert stat.S_ISDIR(found["usr"][0])


def test_the_order_of_insertion_does_not_matter() -> None:
    items = list(TREE.items())
    expected = b"".join(_cpio.archive(TREE))
    for seed in range(5):
        random.Random(seed).shuffle(items)
        assert b"".join(_cpio.archive(dict(items))) == expected


@pytest.mark.parametrize("path", ["/a", "a/", "a//b", "../a", "a/../b", "./a", "", "a\0b"])
def test_a_path_that_is_not_clean_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="clean relative path"):
        b"".join(_cpio.archive({path: _cpio.file(b"")}))


def test_paths_below_a_file_or_link_are_refused() -> None:
    with pytest.raises(ValueError, match="not a directory"):
        b"".join(_cpio.archive({"a": _cpio.symlink("/etc"), "a/b": _cpio.file(b"")}))
