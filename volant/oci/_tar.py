"""Checks a tar while it streams to `mkfs.erofs`, which is written in C and should only see well-formed data.

All bytes pass unchanged up to the end of the archive, except for entries that `mkfs.erofs` would misinterpret
(`_tree.py`). Two readers of one archive must not see different files in it, so ambiguous archives are refused: data
after links, mode bits of another file type, a single block of zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ._errors import OciError
from ._tree import MAX_ENTRIES, LayerTree

_MAX_NAME = 4096
_MAX_EXTENDED = 1024 * 1024
"""Maximum size of one extended header: all attributes of a file have at most 64 KiB on Linux."""
_MAX_SIZE = 2**62
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
END = 2 * _ZEROS
"""The end of an archive."""

_REGULAR, _OLD_REGULAR, _HARD_LINK, _DIRECTORY = b"0", b"\0", b"1", b"5"
_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK = b"x", b"g", b"L", b"K"
_KINDS = {
    _REGULAR: 0o100000,
    _OLD_REGULAR: 0o100000,
    _HARD_LINK: 0o100000,
    b"2": 0o120000,
    _DIRECTORY: 0o040000,
    b"6": 0o010000,
}
"""File types of entries, and the bits of the mode that old archives have for them."""
_DEVICES = (b"3", b"4")
_TYPE_BITS = 0o170000
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*\Z")
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ")
_SPARSE = b"GNU.sparse."
_ATTRIBUTE = re.compile(rb"(?:SCHILY|LIBARCHIVE)\.xattr\.(.*)", re.DOTALL)
"""The name of an extended attribute in archives; in the second form with `%` for special characters."""
_ALLOWED_ATTRIBUTE = re.compile(rb"(?!user\.overlay\.)(?:user|security|system\.posix_acl)[._][!-$&-~]+\Z")
"""Allowed attributes. Others have no meaning in an image, or control overlayfs in the guest."""


class TarCheck:
    """A check of an archive: call `feed` with its pieces, then `finish`."""

    def __init__(self) -> None:
        self.entries = 0
        self._tree = LayerTree()
        self._head = bytearray()
        """The headers of the next entry that were not passed on yet."""
        self._name = b""
        """The name of the next entry, from an extended header."""
        self._rest = b""
        """The beginning of an incomplete header."""
        self._skip = 0
        """Bytes until the next header."""
        self._wanted = 0
        """The missing bytes of an extended header, with its padding."""
        self._extended = bytearray()
        self._read_extended: Callable[[bytes], None] = self._long_name
        self._extended_size = 0
        self._size: int | None = None
        """The size of the next entry, from an extended header."""
        self._zeros = 0
        """Blocks of zeros since the last entry."""

    @property
    def ended(self) -> bool:
        """Whether the archive has ended; the rest is padding."""
        return self._zeros == 2

    def feed(self, piece: bytes) -> bytes:
        """Returns the part of a piece that belongs to the archive. :raises OciError: `image_invalid`"""
        passed = list[bytes]()
        at, end = 0, len(piece)
        while at < end and not self.ended:
            if self._skip:
                step = min(self._skip, end - at)
                self._skip -= step
                passed.append(piece[at : at + step])
                at += step
            elif self._wanted:
                step = min(self._wanted, end - at)
                self._extended += piece[at : at + step]
                self._head += piece[at : at + step]
                self._wanted -= step
                at += step
                if not self._wanted:
                    self._read_extended(bytes(self._extended[: self._extended_size]))
                    self._extended.clear()
            else:
                step = min(_BLOCK - len(self._rest), end - at)
                self._rest += piece[at : at + step]
                at += step
                if len(self._rest) == _BLOCK:
                    header, self._rest = self._rest, b""
                    if self._header(header):
                        passed.append(bytes(self._head))
                        self._head.clear()
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def finish(self) -> bytes:
        """Returns the end. :raises OciError: `image_invalid`, the archive is truncated; `image_too_large`"""
        if self._skip or self._wanted or self._rest or self._size is not None or self._name:
            raise _invalid("it is cut off")
        return self._tree.closing() + END

    def _header(self, header: bytes) -> bool:
        """Parses a header; returns whether the held headers may pass."""
        if header == _ZEROS:
            self._zeros += 1
            return False
        if self._zeros:
            raise _invalid("it has a block of zeros between two entries")
        if _number(header[148:156], "checksum") != sum(header) - sum(header[148:156]) + 8 * 32:
            raise _invalid("a header has a wrong checksum")
        self.entries += 1
        if self.entries > MAX_ENTRIES:
            raise OciError("image_too_large", f"the layer has more than {MAX_ENTRIES} entries", "use another image")
        self._head += header
        kind, size = header[156:157], _number(header[124:136], "size")
        if kind in (_PAX, _PAX_FOR_ALL, _LONG_NAME, _LONG_LINK):
            self._begin_extended(kind, size)
            return False
        if self._size is not None:
            size, self._size = self._size, None
        self._check_kind(kind, header)
        if size and kind not in (_REGULAR, _OLD_REGULAR):
            raise _invalid(f"{_name(header)} has data and is no file")
        self._skip = _padded(size)
        name, self._name = self._name or _full_name(header), b""
        missing = self._tree.add(name, kind == _DIRECTORY)
        if missing is not None:
            self._head[:0] = missing
        elif not size:
            self._head.clear()
        return True

    def _check_kind(self, kind: bytes, header: bytes) -> None:
        if kind in _DEVICES:
            raise OciError(
                "image_invalid", f"the layer has the device {_name(header)}", "build the image without devices in it"
            )
        bits = _KINDS.get(kind)
        if bits is None:
            raise _invalid(f"{_name(header)} is of the unknown kind {kind!r}")
        if _number(header[100:108], "mode") & _TYPE_BITS not in (0, bits):
            raise _invalid(f"{_name(header)} has a mode of another kind of file")

    # Extended headers

    def _begin_extended(self, kind: bytes, size: int) -> None:
        limit = _MAX_NAME + 1 if kind in (_LONG_NAME, _LONG_LINK) else _MAX_EXTENDED
        if not 0 < size <= limit or len(self._head) > 2 * _MAX_EXTENDED:
            raise _invalid(f"an extended header has {size} bytes, or there are many of them")
        self._extended_size = size
        self._wanted = _padded(size)
        self._read_extended = {
            _PAX: self._records, _PAX_FOR_ALL: self._records_for_all, _LONG_NAME: self._long_name
        }.get(kind, self._long_link)  # fmt: skip

    def _long_name(self, data: bytes) -> None:
        self._name = data.partition(b"\0")[0]

    def _long_link(self, data: bytes) -> None:
        pass

    def _records_for_all(self, data: bytes) -> None:
        self._records(data)
        if self._size is not None or self._name:
            raise _invalid("a header for all entries has a size or a name")

    def _records(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            begin = _RECORD.match(data, at)
            end = at + int(begin[1]) if begin else 0
            if begin is None or end <= begin.end() or end > len(data) or data[end - 1] != 0x0A:
                raise _invalid("an extended header is malformed")
            key, equals, value = data[begin.end() : end - 1].partition(b"=")
            if not key or not equals or b"\0" in key:
                raise _invalid("an extended header is malformed")
            attribute = _ATTRIBUTE.match(key)
            if key.startswith(_SPARSE) or (attribute is not None and not _ALLOWED_ATTRIBUTE.match(attribute[1])):
                raise _invalid(f"it uses {key[:60].decode(errors='replace')!r}")
            if key in (b"path", b"linkpath") and (len(value) > _MAX_NAME or b"\0" in value):
                raise _invalid(f"a name has {len(value)} bytes or a zero byte")
            if key == b"path":
                self._name = value
            if key == b"size":
                if not value.isdigit() or len(value) > 19 or int(value) > _MAX_SIZE:
                    raise _invalid("an extended header has a wrong size")
                self._size = int(value)
            at = end


def _number(field: bytes, what: str) -> int:
    """Returns a number of a header: octal digits, or binary as in GNU tar."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] == 0xFF or value > _MAX_SIZE:
            raise _invalid(f"a header has a wrong {what}")
        return value
    match = _OCTAL.match(field)
    if match is None:
        raise _invalid(f"a header has a wrong {what}")
    return int(match[1] or b"0", 8)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _full_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _name(header: bytes) -> str:
    return repr(header[:100].split(b"\0")[0].decode(errors="replace"))


def _invalid(why: str) -> OciError:
    return OciError("image_invalid", f"the layer is not a usable tar: {why}", "build or push the image again")
