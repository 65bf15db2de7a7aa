"""Files of this user that appear under their names when they are complete."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ._run import Failure
from ._text import safe


def beside(path: Path) -> Path:
    """Returns a path in the same directory that nobody can know before, for what is to become `path`."""
    return path.with_name(f".{path.name[:60]}.volar-{secrets.token_hex(6)}")


@contextmanager
def download(path: Path, mode: int, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Has a new file to write for the length of a block, which becomes `path` at its end, and is removed if it fails.

    A device or a pipe, such as /dev/null, is written to, as is what /dev/stdout stands for: no file takes its place.

    :param mode: of the file, less the umask
    :raises Failure: instead of OSError
    """
    try:
        if _is_written_to(path):
            with path.open("wb") as file:
                yield file
            return
        part = beside(path)
        try:
            # Never through a link, and never a file that was there.
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            with os.fdopen(fd, "wb") as file:
                yield file
            if overwrite:
                part.replace(path)
            else:
                os.link(part, path)
        finally:
            with suppress(OSError):
                part.unlink()
    except OSError as error:
        raise Failure(f"{safe(path)} can't be written: {error.strerror}") from None


def _is_written_to(path: Path) -> bool:
    """Whether a path is no name of a file: a device, a pipe, or a link of the system's to an open file."""
    if path.exists() and not path.is_file():
        return True
    parent = path.parent.resolve()
    return path.is_symlink() and (parent == Path("/dev") or Path("/proc") in parent.parents)
