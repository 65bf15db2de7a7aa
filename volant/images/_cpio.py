"""Makes the `newc` archive that the kernel unpacks as its initramfs.

Not with the host's `cpio`: a bare host has none, and it would copy inode numbers, owners and times. Here all metadata
is fixed and entries are sorted, so equal trees are equal bytes.

The format: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel's source.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory, symbolic link or character device, by `mode`."""

    mode: int
    data: bytes = b""
    """The content of a file, the target of a link."""
    device: tuple[int, int] = (0, 0)


def file(data: bytes, mode: int = 0o644) -> Entry:
    """Returns a regular file."""
    return Entry(stat.S_IFREG | mode, data)


def directory(mode: int = 0o755) -> Entry:
    """Returns a directory."""
    return Entry(stat.S_IFDIR | mode)


def symlink(target: str) -> Entry:
    """Returns a symbolic link."""
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def character_device(major: int, minor: int, mode: int) -> Entry:
    """Returns a device node. In an archive that needs no privileges."""
    return Entry(stat.S_IFCHR | mode, b"", (major, minor))


Tree = dict[str, Entry]
"""Entries by path, relative to the root, without a leading slash."""


def with_parents(tree: Mapping[str, Entry]) -> Tree:
    """Returns `tree` with the missing parent directories.

    :raises ValueError: a path is not relative and normalized, or lies below something that is not a directory
    """
    whole: Tree = {}
    for path in sorted(tree):
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts) or "\0" in path:
            raise ValueError(f"{path!r} is not a clean relative path")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            known = tree.get(parent)
            if known is None:
                whole.setdefault(parent, directory())
            elif not stat.S_ISDIR(known.mode):
                raise ValueError(f"{path!r} lies beneath {parent!r}, which is not a directory")
        whole[path] = tree[path]
    return whole


def archive(tree: Mapping[str, Entry]) -> Iterator[bytes]:
    """Yields the archive in pieces: parents before children, names sorted, owner root, time 0."""
    whole = with_parents(tree)
    # The kernel takes equal inode numbers for hard links.
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
