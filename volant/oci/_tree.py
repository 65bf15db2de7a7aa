"""Interprets the entries of a layer together, as `mkfs.erofs` treats each separately.

Rules of the OCI's image specification (`layer.md`): a whiteout hides entries of lower layers, but none of its own
layer, wherever it is in the archive. So a directory that its own layer also contains becomes opaque. A whiteout below a
non-directory hides nothing; builders write these when a file has replaced a directory.

A directory without its own entry, which is only implied by other names, has the attributes from a lower layer,
otherwise Docker's defaults: owner root, mode 0755. Here it gets these defaults, and `IMPLIED`, by which `_join` finds
it.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

from ._errors import OciError

MAX_ENTRIES = 1_000_000
"""Maximum entries of a layer. `mkfs.erofs` has each in memory."""
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
IMPLIED = b"trusted.overlay.volant"
"""An extended attribute that overlayfs hides, because of its prefix, and that an image can't have."""
_MAX_IMPLIED_BYTES = 64 * 1024 * 1024
_BLOCK = 512
_MOST_OCTAL = 8**7
_NAME_BYTES = 100

Parts = tuple[bytes, ...]
"""A path in an image, without `/`."""


class LayerTree:
    """The entries of a layer. Call `add` for each entry; `closing` returns the missing ones."""

    def __init__(self) -> None:
        # By their hashes, as a layer may have a million long names.
        self._directories = set[int]()
        self._others = set[int]()
        """The entries that are not directories."""
        self._whiteouts = set[int]()
        self._implied: dict[Parts, bool] = {}
        """Whether more than whiteouts imply it, by directory."""
        self._opaque = set[Parts]()
        self._implied_bytes = 0

    def add(self, name: bytes, is_directory: bool) -> bytes | None:
        """Records an entry. Returns the entries that the archive lacks before it, or None if it should be left out.

        :raises OciError: `image_too_large`
        """
        path = parts_of(name)
        if not path:
            return b""
        parent, last = path[:-1], path[-1]
        if last.startswith(WHITEOUT):
            return self._add_whiteout(parent, last)
        missing = self._imply(parent, for_entry=True)
        key = hash(path)
        if not is_directory:
            self._others.add(key)
            return missing
        self._implied.pop(path, None)
        self._others.discard(key)
        self._begin_anew(path)
        self._directories.add(key)
        return missing

    def _add_whiteout(self, parent: Parts, last: bytes) -> bytes | None:
        if last != OPAQUE and self._is_hidden(parent):
            return None
        missing = self._imply(parent, for_entry=last == OPAQUE)
        if last.startswith(2 * WHITEOUT):
            return missing
        path = (*parent, last.removeprefix(WHITEOUT))
        if self._is_here(path):
            self._opaque.add(path)
            return None
        if hash(path) in self._others:
            return None
        self._whiteouts.add(hash(path))
        return missing

    def _imply(self, path: Parts, for_entry: bool) -> bytes:
        """Records that a directory and those above it exist. Returns the entries of those that a whiteout has hidden,
        as `mkfs.erofs` puts nothing below a whiteout."""
        missing = b""
        while path and not self._is_here(path):
            if path in self._implied and not for_entry:
                break
            if self._begin_anew(path):
                missing = _directory(path) + missing
                self._directories.add(hash(path))
                path = path[:-1]
                continue
            if path not in self._implied:
                self._implied_bytes += sum(map(len, path))
                if len(self._implied) >= MAX_ENTRIES or self._implied_bytes > _MAX_IMPLIED_BYTES:
                    raise OciError("image_too_large", "the layer implies too many directories", "use another image")
            self._implied[path] = for_entry
            path = path[:-1]
        return missing

    def _begin_anew(self, path: Parts) -> bool:
        """Makes a directory opaque that an earlier whiteout has hidden; returns whether one has."""
        if hash(path) not in self._whiteouts:
            return False
        self._whiteouts.discard(hash(path))
        self._implied.pop(path, None)
        self._opaque.add(path)
        return True

    def _is_here(self, path: Parts) -> bool:
        return hash(path) in self._directories or self._implied.get(path, False)

    def _is_hidden(self, path: Parts) -> bool:
        """Returns whether a path leads through a non-directory."""
        while path and not self._is_here(path):
            if hash(path) in self._others or hash(path) in self._whiteouts:
                return True
            path = path[:-1]
        return False

    def closing(self) -> bytes:
        """Returns the entries that the archive lacks."""
        implied = [path for path in self._implied if not self._is_hidden(path)]
        found = [_directory(path, {IMPLIED: b"y"}) for path in sorted(implied)]
        found += [entry(b"/".join((*path, OPAQUE)), stat.S_IFREG | 0o644) for path in sorted(self._opaque)]
        return b"".join(found)


def parts_of(name: bytes) -> Parts:
    """Returns the parts of a name, as `mkfs.erofs` reads it: from the root of the image, and never above it."""
    found: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            del found[-1:]
        elif part not in (b"", b"."):
            found.append(part)
    return tuple(found)


def _directory(path: Parts, xattrs: Mapping[bytes, bytes] | None = None) -> bytes:
    return entry(b"/".join(path) + b"/", stat.S_IFDIR | 0o755, xattrs=xattrs)


def entry(
    name: bytes, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0, xattrs: Mapping[bytes, bytes] | None = None
) -> bytes:
    """Returns an entry of a tar without content, for a directory or a file."""
    records = b"".join(_record(b"SCHILY.xattr." + key, value) for key, value in sorted((xattrs or {}).items()))
    if len(name) > _NAME_BYTES:
        records += _record(b"path", name)
    for key, number in ((b"uid", uid), (b"gid", gid)):
        if number >= _MOST_OCTAL:
            records += _record(key, b"%d" % number)
    if not 0 <= mtime < _MOST_OCTAL * 8**4:
        records += _record(b"mtime", b"%d" % mtime)
    kind = b"5" if stat.S_ISDIR(mode) else b"0"
    found = _header(name, stat.S_IMODE(mode), uid, gid, 0, mtime, kind)
    if not records:
        return found
    padding = bytes(-len(records) % _BLOCK)
    return _header(b"pax", 0o644, 0, 0, len(records), 0, b"x") + records + padding + found


def _header(name: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, kind: bytes) -> bytes:
    def octal(number: int, digits: int) -> bytes:
        return b"%0*o\0" % (digits, number if 0 <= number < 8**digits else 0)

    numbers = octal(mode, 7) + octal(uid, 7) + octal(gid, 7) + octal(size, 11) + octal(mtime, 11)
    head = name[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0") + numbers
    tail = (kind + bytes(100) + b"ustar\x0000").ljust(_BLOCK - len(head) - 8, b"\0")
    return head + b"%06o\0 " % (sum(head) + sum(tail) + 8 * 32) + tail


def _record(key: bytes, value: bytes) -> bytes:
    """Returns a record of an extended header, which begins with its own length."""
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)
