"""Copies of the database, and the files beside it that copies and restores use. Everything here blocks.

`VACUUM INTO` makes a copy through a connection that can't write: it reads one snapshot, and neither commits nor readers
wait for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import apsw
import msgspec

from volant.host import Host

from ._errors import DatabaseRefused
from ._schema import open_reader

_READ = 1024 * 1024


class Copied(msgspec.Struct, frozen=True):
    """A finished copy."""

    path: Path
    size: int
    sha256: bytes


def copy_path(path: Path, name: str) -> Path:
    """Returns the path for a copy. The next start removes one that is left over."""
    return path.with_name(f"{path.stem}-copy-{name}{path.suffix}")


def upload_path(path: Path, name: str) -> Path:
    """Returns the path for an upload. The next start removes one that is left over."""
    return path.with_name(f"{path.stem}-upload-{name}{path.suffix}")


def next_path(path: Path) -> Path:
    """Returns the path of the database that replaces this one at the next start."""
    return path.with_name(f"{path.stem}-next{path.suffix}")


def replaced_databases(path: Path) -> list[Path]:
    """Returns the files of databases that restores have moved aside."""
    return sorted(path.parent.glob(f"{path.stem}-before-*{path.suffix}*"))


def make_copy(host: Host, path: Path, to: Path, opened: Callable[[apsw.Connection], None]) -> Copied:
    """Copies the database and checks the copy. `opened` gets each connection, to interrupt it.

    :raises apsw.InterruptError: it was interrupted.
    :raises apsw.Error: the disk fails.
    :raises DatabaseRefused: the database is damaged.
    """
    host.descriptors.close(host.descriptors.open(to, os.O_RDWR | os.O_CREAT, 0o600))
    connection = open_reader(path)
    try:
        opened(connection)
        connection.execute("VACUUM INTO ?", (str(to),))
    finally:
        connection.close()
    copy = open_reader(to)
    try:
        opened(copy)
        found = copy.execute("PRAGMA quick_check(1)").get
    finally:
        copy.close()
    if found != "ok":
        raise DatabaseRefused(f"{path} is damaged: {found}")
    with to.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    return Copied(to, to.stat().st_size, digest)


def append(path: Path, data: bytes) -> None:
    """Writes the next piece of an upload. :raises OSError: the disk fails."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def read(path: Path, offset: int) -> bytes:
    """Returns the next piece of a copy. :raises OSError: the disk fails."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(_READ)
