"""An archive from a client, written to a working directory of the cache as it arrives, within limits."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import trio

from volant.store import check_space, disk_errors

from ._errors import OciError

_PIECE = 1024 * 1024
"""The size of one write."""
_CHECK_SPACE_BYTES = 32 * 1024 * 1024
_BLOCK = 512
_SIZE = re.compile(rb"[ \0]*([0-7]+)[ \0]*\Z")
_MAX_ENTRIES = 10_000
"""Maximum entries to search for the type of an archive: an image has 127 layers and some other files."""


class ArchiveUpload:
    """An incomplete archive. Call `write` with its pieces."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._file = path.open("xb", buffering=0)
        self._pending = bytearray()
        self._size = 0
        self._checked = -_CHECK_SPACE_BYTES

    def expect(self, size: int) -> None:
        """Announces the size. :raises OciError: `image_too_large`"""
        if size > self._max_bytes:
            raise OciError(
                "image_too_large", f"the archive has {size // 2**20} MiB, at most {self._max_bytes // 2**20} are "
                "allowed", "an administrator can allow more: oci_max_mb",
            )  # fmt: skip

    async def write(self, data: bytes) -> None:
        """Writes the next bytes. :raises OciError: `image_too_large`, `cache_full`, `io_error`"""
        self._pending += data
        if len(self._pending) >= _PIECE:
            await self.flush()

    async def flush(self) -> None:
        """Writes buffered bytes. :raises OciError: see `write`"""
        data, self._pending = bytes(self._pending), bytearray()
        self._size += len(data)
        self.expect(self._size)
        with disk_errors(OciError):
            await trio.to_thread.run_sync(self._put, data)

    def close(self) -> None:
        self._file.close()

    def _put(self, data: bytes) -> None:
        if self._size - self._checked >= _CHECK_SPACE_BYTES:
            self._checked = self._size
            check_space(self.path.parent, 0, OciError)
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def archive_kind(path: Path) -> Literal["oci-archive", "docker-archive"]:
    """Returns the type of an archive by the files in it. Recent archives of Docker are both; a compressed one is
    treated as Docker's, which skopeo decompresses. Blocks.

    :raises OciError: `image_invalid`: it is no archive of an image
    """
    with path.open("rb") as file:
        first = file.read(_BLOCK)
        if first[:2] == b"\x1f\x8b" or first[:4] == b"\x28\xb5\x2f\xfd" or first[:3] == b"BZh":
            return "docker-archive"
        is_oci = False
        for _ in range(_MAX_ENTRIES):
            if len(first) < _BLOCK or not first.strip(b"\0"):
                break
            name = first[:100].split(b"\0")[0].removeprefix(b"./")
            if name == b"manifest.json":
                return "docker-archive"
            is_oci = is_oci or name == b"oci-layout"
            size = _SIZE.match(first[124:136])
            if size is None:
                break
            file.seek(-(-int(size[1], 8) // _BLOCK) * _BLOCK, os.SEEK_CUR)
            first = file.read(_BLOCK)
        if is_oci:
            return "oci-archive"
    raise OciError(
        "image_invalid", "the body is not an archive of an image",
        "make one with `docker save`, `podman save` or `skopeo copy … oci-archive:FILE`",
    )  # fmt: skip
