"""Backups and restores of the database while the daemon runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import apsw
import msgspec
import trio

from actors import Ref
from volant.host import Host
from volant.model import Problem

from ._checksums import is_changed_page
from ._client import ask_journal
from ._copies import Copied, append, copy_path, make_copy, read, upload_path
from ._errors import DatabaseRefused, no_room
from ._journal import Journal
from ._merge import Evidence
from ._restore import examine
from ._schema import CHANGED_PAGE
from ._store import Store
from .messages import Restore

MAX_UPLOAD_BYTES = 8 * 2**30
"""The limit for an upload. A million events take less than one GiB."""
_COPY_S = 600.0
_EXAMINE_S = 600.0
_ASK_S = 60.0
_CLEAN_S = 10.0
_RESERVE_BYTES = 64 * 2**20
"""Space that copies and uploads leave free for commits."""
_SPACE_EVERY_BYTES = 16 * 2**20


class Backup:
    """A consistent copy of the database, to be read once."""

    def __init__(self, host: Host, copied: Copied, name: str) -> None:
        self._host = host
        self._copied = copied
        self._offset = 0
        self.size = copied.size
        self.sha256 = copied.sha256
        self.name = name
        """A name for the file."""

    async def read(self) -> bytes:
        """Returns the next piece, empty at the end. :raises OSError: the disk fails."""
        data = await self._host.threads.run(read, self._copied.path, self._offset)
        self._offset += len(data)
        return data


class Upload:
    """A database that a client sends."""

    def __init__(self, host: Host, path: Path) -> None:
        self._host = host
        self._unchecked = _SPACE_EVERY_BYTES
        self.path = path
        self.size = 0

    def expect(self, size: int) -> None:
        """Check a size that the client announces. :raises Problem: 413, 503."""
        if size > MAX_UPLOAD_BYTES:
            raise _too_large()
        _check_space(self._host, self.path.parent, size)

    async def write(self, data: bytes) -> None:
        """Write the next piece. :raises Problem: 413, 503."""
        self.size += len(data)
        self._unchecked += len(data)
        if self.size > MAX_UPLOAD_BYTES:
            raise _too_large()
        if self._unchecked >= _SPACE_EVERY_BYTES:
            self._unchecked = 0
            _check_space(self._host, self.path.parent, len(data))
        try:
            await self._host.threads.run(append, self.path, data)
        except OSError as error:
            raise no_room(error) from error


class Backups(msgspec.Struct):
    """Takes and restores backups, one at a time."""

    _host: Host
    _store: Store
    _journal: Ref[Journal]
    _evidence: Callable[[], Awaitable[Evidence]]
    """Scans the host for VMs that the database may not know."""
    _is_busy: bool = False

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Backup]:
        """Makes a backup, which exists for the length of the block. Commits and readers go on meanwhile.

        :raises Problem: 409 another backup is taken or restored; 503 the disk has no space.
        """
        with _Alone(self):
            host, store = self._host, self._store
            path = copy_path(store.path, host.random.new_id())
            name = f"volant-{store.events.newest}.db"
            try:
                _check_space(host, path.parent, await host.threads.run(_size, store.path))
                copied = await self._copy(path)
                yield Backup(host, copied, name)
            finally:
                await self._remove(path)

    async def _copy(self, path: Path) -> Copied:
        host = self._host
        connections: list[apsw.Connection] = []
        over = False

        def opened(connection: apsw.Connection) -> None:
            connections[:] = [connection]
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
                return await host.threads.run(make_copy, host, self._store.path, path, opened)
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

    @asynccontextmanager
    async def receiving(self) -> AsyncIterator[Upload]:
        """Receives a database. It is removed at the end of the block unless it is restored.

        :raises Problem: 409 another backup is taken or restored.
        """
        with _Alone(self):
            upload = Upload(self._host, upload_path(self._store.path, self._host.random.new_id()))
            try:
                yield upload
            finally:
                await self._remove(upload.path)

    async def restore(self, upload: Upload, *, replace: bool) -> str:
        """Has the daemon continue with an upload. Returns the new epoch of the events. The restore is decided then:
        even a daemon that is killed right after it starts with it.

        :param replace: VMs that the backup does not know may lose their rows
        :raises Problem: 400 it is no backup; 409 see `merge`; 503.
        """
        host = self._host
        if not upload.size:
            raise no_backup(DatabaseRefused("it is empty"))
        try:
            backup = await host.threads.run(examine, host, upload.path)
        except DatabaseRefused as refused:
            raise no_backup(refused) from None
        except (OSError, apsw.Error) as error:
            raise no_room(error) from error
        evidence = await self._evidence()
        return await ask_journal(self._journal, Restore(upload.path, backup, evidence, replace), _ASK_S)

    async def _remove(self, path: Path) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAN_S):
            for suffix in ("", "-journal"):
                await self._host.threads.run(self._host.files.unlink, path.with_name(path.name + suffix))


class _Alone:
    def __init__(self, backups: Backups) -> None:
        self._backups = backups

    def __enter__(self) -> None:
        if self._backups._is_busy:
            raise Problem(
                409, "backup-under-way", "another backup is being taken or restored", hint="retry when it is done"
            )
        self._backups._is_busy = True

    def __exit__(self, *exc: object) -> None:
        self._backups._is_busy = False


def no_backup(refused: DatabaseRefused) -> Problem:
    """Returns the 400 for an upload that can't be restored."""
    text = str(refused).partition("; it has not been touched")[0]
    return Problem(400, "no-backup", f"this can't be restored: {text}", hint="send a file from `volar system backup`")


def _too_large() -> Problem:
    return Problem(413, "body-too-large", f"a backup has at most {MAX_UPLOAD_BYTES // 2**20} MiB")


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
