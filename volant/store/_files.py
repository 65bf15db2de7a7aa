"""Small files that are replaced as a whole, and what a full disk is called.

All functions block: caches are used by worker threads and by programs of their own.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from volant.model import CodedError

T = TypeVar("T")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
_MAX_RECORD_BYTES = 16 * 1024 * 1024
_RESERVE_BYTES = 256 * 1024 * 1024
"""Space that stays free on the file system of a cache, which often contains the database too."""


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replaces a file on the disk, all or nothing; several may do so at once. :raises OSError: the disk fails"""
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        with new.open("xb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Flushes the names in a directory to the disk. :raises OSError: the disk fails"""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(path: Path, kind: type[T]) -> T | None:
    """Returns the content of a small file of JSON, or None if it is missing or something else."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_RECORD_BYTES), type=kind)
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None


def entries(directory: Path) -> list[str]:
    """Returns the names in a directory without hidden ones, sorted; none if it is missing or a file."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def fingerprint(path: Path) -> str:
    """Returns a text that changes when a file is written to or replaced. :raises OSError: there is no file"""
    figures = path.lstat()
    return f"{figures.st_ino}.{figures.st_size}.{figures.st_mtime_ns}"


def check_space(path: Path, needed: int, error: type[CodedError]) -> None:
    """Checks that the file system of `path` has room for `needed` more bytes, and a reserve stays free.

    :raises CodedError: an `error`, `cache_full`
    """
    figures = os.statvfs(path)
    free = figures.f_bavail * figures.f_frsize
    if free < needed + _RESERVE_BYTES:
        raise error(
            "cache_full",
            f"the cache has {free // 2**20} MiB free, {-(-needed // 2**20)} are needed and "
            f"{_RESERVE_BYTES // 2**20} must stay",
            "make room on its file system, or name another folder with VOLANT_CACHE_DIR",
        )


@contextmanager
def disk_errors(error: type[CodedError]) -> Iterator[None]:
    """Turns errors of a cache's disk in a block into an `error`.

    :raises CodedError: `cache_full`, `cache_unwritable` or `io_error`
    """
    try:
        yield
    except OSError as failure:
        name = f": {failure.filename}" if failure.filename else ""
        what = f"the cache can't be written: {failure.strerror or failure}{name}"
        if failure.errno in _FULL:
            raise error("cache_full", what, "make room on its file system") from failure
        if failure.errno in _DENIED:
            hint = "check who owns its folder, or name another with VOLANT_CACHE_DIR"
            raise error("cache_unwritable", what, hint) from failure
        raise error("io_error", what, "check its disk") from failure
