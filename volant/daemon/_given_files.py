"""Files that settings name, such as those with keys and certificates."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class UnreadableFile(Exception):
    """A file can't be used. The text says why, and begins after the name of the file."""


def read_given(path: Path, max_bytes: int) -> bytes:
    """Returns the content of a regular file. :raises UnreadableFile: it can't be read, is no such file, or is larger"""
    try:
        # Non-blocking, because opening a pipe without a writer would block forever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableFile("is not a regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UnreadableFile(f"can't be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise UnreadableFile(f"is larger than {max_bytes} bytes")
    return data
