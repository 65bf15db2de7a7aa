"""Writing an artifact to the cache while it arrives, within its bounds."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from volant.store import check_space

from ._errors import ImageError

_BLOCK = 64 * 1024
_READ = 1024 * 1024
_FICLONE = 0x40049409
_ZEROS = bytes(_BLOCK)
_CHECK_SPACE_BYTES = 32 * 1024 * 1024


class Part:
    """The file of an artifact while it arrives: counts and hashes the bytes, and leaves holes for zeros."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._handle = path.open("r+b", buffering=0)
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self._space_checked_at = -_CHECK_SPACE_BYTES
        self.size = 0
        self.path = path

    def close(self) -> None:
        self._handle.close()

    def expect(self, size: int) -> None:
        """Announces the size. :raises ImageError: `artifact_too_large`."""
        if size > self._max_bytes:
            raise too_large(self._max_bytes)

    def write(self, data: bytes) -> None:
        """Writes the next bytes.

        :raises ImageError: `artifact_too_large`, `cache_full`
        :raises OSError: the disk fails
        """
        self.size += len(data)
        if self.size > self._max_bytes:
            raise too_large(self._max_bytes)
        if self.size - self._space_checked_at >= _CHECK_SPACE_BYTES:
            self._space_checked_at = self.size
            check_space(self.path, 0, ImageError)
        self._hash.update(data)
        self._pending += data
        whole = len(self._pending) - len(self._pending) % _BLOCK
        self._put(self._pending[:whole])
        del self._pending[:whole]

    def clone(self, source: int) -> bool:
        """Copies a whole local file by sharing its extents; returns False if the file system can't do that."""
        try:
            fcntl.ioctl(self._handle.fileno(), _FICLONE, source)
        except OSError:
            return False
        # Hashes the clone, as the original may change meanwhile.
        with self.path.open("rb") as handle:
            while data := handle.read(_READ):
                self.size += len(data)
                if self.size > self._max_bytes:
                    raise too_large(self._max_bytes)
                self._hash.update(data)
        self._handle.seek(0, os.SEEK_END)
        return True

    def finish(self) -> str:
        """Flushes everything to the disk; returns the SHA-256. :raises OSError: the disk fails."""
        self._put(self._pending)
        self._pending.clear()
        self._handle.truncate(self.size)
        os.fsync(self._handle.fileno())
        return self._hash.hexdigest()

    def _put(self, data: bytes | bytearray) -> None:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if block == _ZEROS[: len(block)]:
                self._handle.seek(len(block), os.SEEK_CUR)
                continue
            while block:
                block = block[self._handle.write(block) :]


def too_large(max_bytes: int) -> ImageError:
    """Returns the error for an artifact with more bytes than allowed."""
    return ImageError(
        "artifact_too_large",
        f"it has more than {max_bytes // 2**20} MiB",
        "raise VOLANT_ARTIFACT_MAX_MB if it should have",
    )
