"""A file tree as plain data, and the `newc` archive that the kernel unpacks as its initramfs.

The host's `cpio` is not used: a bare host has none, and it would copy inode numbers, owners and times of this machine
into the image. Here every field that is not content is fixed, and entries are sorted, so equal trees are equal bytes.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a tree: a file, directory, symbolic link or character device, as `mode` says."""

    mode: int
    data: bytes = b""
    """The content of a file, the target of a link."""
    device: tuple[int, int] = (0, 0)


def file(data: bytes, mode: int = 0o644) -> Entry:
    """Return a regular file."""
    return Entry(stat.S_IFREG | mode, data)


def directory(mode: int = 0o755) -> Entry:
    """Return a directory."""
    return Entry(stat.S_IFDIR | mode)


def symlink(target: str) -> Entry:
    """Return a symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def character_device(major: int, minor: int, mode: int) -> Entry:
    """Return a device node; it is only bytes in an archive, so making one needs no rights."""
    return Entry(stat.S_IFCHR | mode, b"", (major, minor))


Tree = dict[str, Entry]
"""Entries by path, relative to the root, without a leading slash."""


def with_parents(tree: Mapping[str, Entry]) -> Tree:
    """Return `tree` with the directories that its paths need and that it does not name.

    :raises ValueError: a path is no clean relative path, or lies beneath something that is no directory
    """
    whole: Tree = {}
    for path in sorted(tree):
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in path:
            raise ValueError(f"{path!r} is no clean relative path")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            known = tree.get(parent)
            if known is None:
                whole.setdefault(parent, directory())
            elif not stat.S_ISDIR(known.mode):
                raise ValueError(f"{path!r} lies beneath {parent!r}, which is no directory")
        whole[path] = tree[path]
    return whole


def archive(tree: Mapping[str, Entry]) -> Iterator[bytes]:
    """Yield the archive of `tree`, piece by piece: parents before children, names sorted, owner root, time 0."""
    whole = with_parents(tree)
    # The kernel joins hard links by inode number, so each entry has its own.
    for number, path in enumerate(sorted(whole, key=lambda name: name.split("/")), start=1):
        entry = whole[path]
        yield _header(number, entry, path)
        yield entry.data
        yield b"\0" * (-len(entry.data) % 4)
    yield _header(0, Entry(0), "TRAILER!!!")


def _header(number: int, entry: Entry, path: str) -> bytes:
    name = path.encode() + b"\0"
    if len(entry.data) > 0xFFFFFFFF:
        raise ValueError(f"{path!r} is too large for a newc archive")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (number, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return head + b"\0" * (-len(head) % 4)
