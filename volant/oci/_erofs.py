"""Reads the directories of an EROFS file system that `mkfs.erofs` has created from a layer.

The format is that of Linux, `fs/erofs/erofs_fs.h`: a node has the number `nid`, and lies at 32 times that number behind
the first block of metadata. Contents of files, compression and long prefixes of attributes are not read.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

from ._errors import OciError

BLOCK = 4096
_SUPERBLOCK_AT, _SUPERBLOCK = 1024, 128
_MAGIC = 0xE0F5E1E2
_SLOT = 128
_SIZES_AT = 64
"""The offset in the slot of a device of the number of blocks, followed by the first block."""
_DIRENT = struct.Struct("<QHBx")
_COMPACT = struct.Struct("<HHHHI4xI4xHH4x")
_EXTENDED = struct.Struct("<HHH2xQI4xIIQ")
_PLAIN, _INLINE = 0, 2
_XATTR_HEAD = 12
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_DIRECTORY = 2
"""The type of a directory entry."""


class Node(NamedTuple):
    """A file or a directory."""

    at: int
    """The offset of the data after its head: attributes, and the end of a directory."""
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    layout: int
    block: int
    xattr_bytes: int


class Entry(NamedTuple):
    """A name in a directory."""

    nid: int
    is_directory: bool


class Erofs:
    """A file system in memory. All methods raise OciError, `image_invalid`, if it is damaged."""

    def __init__(self, data: bytes | mmap) -> None:
        self._data = data
        head = data[_SUPERBLOCK_AT : _SUPERBLOCK_AT + _SUPERBLOCK]
        if len(head) < _SUPERBLOCK or struct.unpack_from("<I", head)[0] != _MAGIC or 1 << head[12] != BLOCK:
            raise damaged()
        self._root, self._built_at = struct.unpack_from("<H8xQ", head, 14)
        self._nodes, self._xattrs = (BLOCK * block for block in struct.unpack_from("<II", head, 40))
        self._devices = struct.unpack_from("<HH", head, 86)

    def devices(self) -> list[tuple[int, int]]:
        """Returns the number of blocks and the first block of each layer that was joined."""
        count, first = self._devices
        if (first + count) * _SLOT > len(self._data):
            raise damaged()
        return [struct.unpack_from("<II", self._data, (first + number) * _SLOT + _SIZES_AT) for number in range(count)]

    def root(self) -> Node:
        """Returns the directory `/`."""
        return self.node(self._root)

    def node(self, nid: int) -> Node:
        """Returns a node by its number."""
        at = self._nodes + 32 * nid
        try:
            if self._data[at] & 1:
                form, count, mode, size, block, uid, gid, mtime = _EXTENDED.unpack_from(self._data, at)
                at += 64
            else:
                form, count, mode, _, size, block, uid, gid = _COMPACT.unpack_from(self._data, at)
                at, mtime = at + 32, self._built_at
        except (struct.error, IndexError):
            raise damaged() from None
        xattr_bytes = _XATTR_HEAD + 4 * (count - 1) if count else 0
        return Node(at, mode, uid, gid, mtime, size, form >> 1 & 7, block, xattr_bytes)

    def entries(self, node: Node) -> dict[bytes, Entry]:
        """Returns the entries of a directory."""
        if not stat.S_ISDIR(node.mode) or node.layout not in (_PLAIN, _INLINE):
            raise damaged()
        found: dict[bytes, Entry] = {}
        for begin in range(0, node.size, BLOCK):
            is_last = begin + BLOCK > node.size
            at = node.block * BLOCK + begin
            if is_last and node.layout == _INLINE:
                at = node.at + node.xattr_bytes
            self._read_block(self._data[at : at + min(BLOCK, node.size - begin)], found)
        return found

    def _read_block(self, block: bytes, found: dict[bytes, Entry]) -> None:
        try:
            names_at = _DIRENT.unpack_from(block)[1]
            heads = [_DIRENT.unpack_from(block, at) for at in range(0, names_at, _DIRENT.size)]
        except struct.error:
            raise damaged() from None
        ends = [head[1] for head in heads[1:]] + [len(block)]
        for (nid, begin, kind), end in zip(heads, ends, strict=True):
            name = block[begin:end].rstrip(b"\0")
            if name not in (b".", b".."):
                found[name] = Entry(nid, kind == _DIRECTORY)

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Returns the extended attributes of a node."""
        if not node.xattr_bytes:
            return {}
        try:
            shared = self._data[node.at + 4]
            numbers = struct.unpack_from(f"<{shared}I", self._data, node.at + _XATTR_HEAD)
        except (struct.error, IndexError):
            raise damaged() from None
        found = dict(self._xattr(self._xattrs + 4 * number)[:2] for number in numbers)
        at, end = node.at + _XATTR_HEAD + 4 * shared, node.at + node.xattr_bytes
        while at + 4 <= end:
            name, value, at = self._xattr(at)
            found[name] = value
        return found

    def _xattr(self, at: int) -> tuple[bytes, bytes, int]:
        """Returns a name, its value, and the offset of the next one."""
        try:
            length, prefix, size = struct.unpack_from("<BBH", self._data, at)
        except struct.error:
            raise damaged() from None
        name_at = at + 4
        value_at = name_at + length
        name = _PREFIXES.get(prefix, b"") + self._data[name_at:value_at]
        return name, self._data[value_at : value_at + size], value_at + size + (-(length + size) % 4)


@contextmanager
def opened(path: Path) -> Iterator[Erofs]:
    """Opens a file system for the block. :raises OciError: `image_invalid` :raises OSError: it can't be read."""
    with path.open("rb") as file:
        try:
            data = mmap(file.fileno(), 0, access=ACCESS_READ)
        except ValueError:
            raise damaged() from None  # it is empty
        with data:
            yield Erofs(data)


def damaged() -> OciError:
    """Returns the error for a file that `mkfs.erofs` can't have created."""
    return OciError("image_invalid", "the file of a layer is damaged", "delete the image, and fetch it again")
