"""Backups: consistent copies of the database while the daemon works.

`VACUUM INTO` makes a copy through a connection that can't write: it reads one snapshot, and neither commits nor readers
wait for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import trio

from volant.host import Host
from volant.model import Problem

from ._errors import DatabaseRefused, no_room
from ._schema import CHANGED_PAGE, is_changed_page, open_reader
from ._store import Store

_COPY_S = 600.0
_CLEAN_S = 10.0
_RESERVE_BYTES = 64 * 2**20
"""Space that copies leave free for commits."""
_READ_BYTES = 1024 * 1024


class Backup:
    """A consistent copy of the database, to be read once."""

    def __init__(self, host: Host, path: Path, name: str, size: int, sha256: bytes) -> None:
        self._host = host
        self._path = path
        self._offset = 0
        self.name = name
        """A name for the file."""
        self.size = size
        """The size in bytes."""
        self.sha256 = sha256

    async def read(self) -> bytes:
        """Returns the next piece, empty at the end. :raises OSError: the disk fails."""
        data = await self._host.threads.run(self._read)
        self._offset += len(data)
        return data

    def _read(self) -> bytes:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            return file.read(_READ_BYTES)


class Backups:
    """Takes backups, one at a time."""

    def __init__(self, host: Host, store: Store) -> None:
        self._host = host
        self._store = store
        self._is_busy = False

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Backup]:
        """Makes a backup, which exists for the length of the block. Commits and readers continue in the meantime.

        :raises Problem: 409, another backup is being made; 503, the disk has no space.
        """
        if self._is_busy:
            raise Problem(409, "backup-under-way", "another backup is being taken", hint="retry when it is done")
        host, store = self._host, self._store
        path = store.path.with_name(f"{store.path.stem}-copy-{host.random.new_id()}{store.path.suffix}")
        name = f"volant-{store.events.newest}.db"
        self._is_busy = True
        try:
            _check_space(host, path.parent, await host.threads.run(_size, store.path))
            size, sha256 = await self._copy(path)
            yield Backup(host, path, name, size, sha256)
        finally:
            self._is_busy = False
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAN_S):
                for suffix in ("", "-journal"):
                    await host.threads.run(host.files.unlink, path.with_name(path.name + suffix))

    async def _copy(self, path: Path) -> tuple[int, bytes]:
        """Returns size and digest of the copy. :raises Problem: 503."""
        over = False

        def opened(connection: apsw.Connection) -> None:
            connection.set_progress_handler(lambda: over, 1000)

        async def interrupt() -> None:
            nonlocal over
            try:
                await trio.sleep(_COPY_S)
            finally:
                # A thread is not cancelled, and the stop of a daemon must not wait for gigabytes.
                over = True

        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupt)
            try:
                return await self._host.threads.run(_make_copy, self._host, self._store.path, path, opened)
            except (DatabaseRefused, OSError, apsw.Error) as error:
                failure = error
            finally:
                nursery.cancel_scope.cancel()
        assert failure is not None
        if isinstance(failure, DatabaseRefused):
            raise Problem(503, "journal-damaged", str(failure))
        if is_changed_page(failure):
            raise Problem(503, "journal-damaged", f"{self._store.path} is damaged: {CHANGED_PAGE}")
        if isinstance(failure, apsw.InterruptError):
            raise Problem(503, "backup-slow", f"the copy took more than {_COPY_S:g} s", hint="check the disk")
        raise no_room(failure) from failure


def _make_copy(host: Host, path: Path, to: Path, opened: Callable[[apsw.Connection], None]) -> tuple[int, bytes]:
    """Copies the database and checks the copy. Returns its size and digest. `opened` gets each connection, to interrupt
    it.

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
        return to.stat().st_size, hashlib.file_digest(file, "sha256").digest()


def _check_space(host: Host, directory: Path, size: int) -> None:
    if host.disk.free(directory) < size + _RESERVE_BYTES:
        raise Problem(
            503,
            "no-space",
            f"the disk that holds the daemon's state has no room for {size // 2**20 + 1} MiB more; "
            f"{_RESERVE_BYTES // 2**20} MiB stay free for changes",
            hint="free space on that disk, then retry",
        )


def _size(path: Path) -> int:
    wal = path.with_name(f"{path.name}-wal")
    return path.stat().st_size + (wal.stat().st_size if wal.exists() else 0)
