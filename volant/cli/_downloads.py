"""Downloads of this user, which appear under their names when they are complete."""

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
    """Returns an unpredictable path in the same directory, for a file that will become `path`."""
    return path.with_name(f".{path.name[:60]}.volar-{secrets.token_hex(6)}")


@contextmanager
def download(path: Path, mode: int, *, overwrite: bool = True) -> Iterator[BinaryIO]:
    """Opens a new file for the block, which becomes `path` at its end, and is removed if the block fails.

    A device or a pipe, such as /dev/null or the target of /dev/stdout, is written directly, not replaced.

    :param mode: the file's mode, before the umask
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
    """Returns whether a path is not a plain file: a device, a pipe, or a link of the system to an open file."""
    if path.exists() and not path.is_file():
        return True
    parent = path.parent.resolve()
    return path.is_symlink() and (parent == Path("/dev") or Path("/proc") in parent.parents)
