"""The standard streams of `volar`, which may be closed, on a full disk, or without a reader."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO

BROKEN_PIPE = 141
"""128 + SIGPIPE: the exit code of a process that the signal ends."""


class OutputError(Exception):
    """Output could not be written; `broken_pipe` if its reader has exited, which needs no message."""

    def __init__(self, fd: int, error: OSError) -> None:
        # A descriptor that was closed is replaced by one that can only be read.
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        super().__init__(f"can't write to standard {'error' if fd == 2 else 'output'}: {why}")
        self.broken_pipe = error.errno == errno.EPIPE


class _Output(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(self.fileno(), error) from None


class _Messages(io.FileIO):
    """Standard error: a message that can't be written is dropped, without effect on the command or its exit code."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def prepare() -> None:
    """Opens standard streams that are closed, and converts failures to write output to `OutputError`."""
    # No file or socket that is opened later may get one of these numbers.
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = _text(_Output, 1, sys.stdout)
    sys.stderr = _text(_Messages, 2, sys.stderr)


def discard_output() -> None:
    """Drops buffered standard output, so that it does not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _text(raw: type[io.FileIO], fd: int, before: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw(fd, "w", closefd=False)),
        encoding=before.encoding if before is not None else "utf-8",
        errors="backslashreplace" if fd == 2 else before.errors if before is not None else None,
        line_buffering=fd == 2 or os.isatty(fd),
    )
