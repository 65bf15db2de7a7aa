"""Real SQLite, on files that remember what was synced.

The files lie in a directory of the test, in RAM, and SQLite reads and writes them itself. A VFS in between copies the
bytes of a file at each sync, so that a power cut can restore them. `kill -9` needs nothing: the kernel has what a
process has written.
"""

from __future__ import annotations

import os
from pathlib import Path

import apsw

from actors.testing import allow_real

_NAME = "volant-simulated"


class Databases:
    """Makes SQLite use the VFS for the length of a block; use it around everything that opens a database."""

    def __init__(self) -> None:
        self._synced: dict[Path, bytearray] = {}
        self._written: dict[Path, list[tuple[int, int]]] = {}
        self._before = ""
        self._vfs: _Vfs | None = None

    def __enter__(self) -> Databases:
        self._before = apsw.vfs_names()[0]
        self._vfs = _Vfs(self, self._before)
        apsw.set_default_vfs(_NAME)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_all()
        apsw.set_default_vfs(self._before)
        assert self._vfs is not None
        self._vfs.unregister()
        self._vfs = None

    def written(self, path: Path, offset: int, size: int) -> None:
        """Notes that a piece of a file has changed."""
        self._written.setdefault(path, []).append((offset, size))

    def synced(self, path: Path) -> None:
        """Copies a file's bytes: they are on the disk."""
        pieces = self._written.pop(path, [])
        kept = self._synced.get(path)
        with allow_real("files"), path.open("rb") as file:
            if kept is None:
                self._synced[path] = bytearray(file.read())
                return
            # A log grows to megabytes, and a commit changes only some pages.
            size = file.seek(0, os.SEEK_END)
            kept += bytes(max(0, size - len(kept)))
            del kept[size:]
            for offset, length in pieces:
                file.seek(offset)
                data = file.read(length)
                kept[offset : offset + len(data)] = data

    def removed(self, path: Path) -> None:
        """Forgets a file that was removed."""
        self._synced.pop(path, None)
        self._written.pop(path, None)

    def rename(self, path: Path, to: Path) -> None:
        """Renames a file; the name survives a power cut."""
        with allow_real("files"):
            path.replace(to)
        self.removed(to)
        if path in self._synced:
            self._synced[to] = self._synced.pop(path)
            self._written[to] = self._written.pop(path, [])

    def unlink(self, path: Path) -> None:
        """Removes a file, if it exists."""
        with allow_real("files"):
            path.unlink(missing_ok=True)
        self.removed(path)

    def close_all(self) -> None:
        """Closes all connections, as their process has ended."""
        with allow_real("files"):
            for connection in apsw.connections():
                connection.close(force=True)

    def power_cut(self, directory: Path) -> None:
        """Restores what was synced. No connection may be open."""
        self._written.clear()
        with allow_real("files"):
            for path in directory.iterdir():
                if path.name.endswith(("-wal", "-shm", ".db", "-journal")):
                    path.unlink()
            for path, data in self._synced.items():
                if path.parent == directory:
                    path.write_bytes(data)


class _Vfs(apsw.VFS):
    def __init__(self, databases: Databases, base: str) -> None:
        self._databases = databases
        self._base = base
        super().__init__(_NAME, base=base)

    def xOpen(self, name: apsw.URIFilename | str | None, flags: list[int]) -> apsw.VFSFile:
        return _File(self._databases, self._base, name, flags)

    def xDelete(self, name: str, sync_directory: bool) -> None:
        super().xDelete(name, sync_directory)
        self._databases.removed(Path(name))


class _File(apsw.VFSFile):
    def __init__(self, databases: Databases, base: str, name: apsw.URIFilename | str | None, flags: list[int]) -> None:
        self._databases = databases
        text = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._path = Path(text) if text else None
        super().__init__(base, name, flags)
        self._is_read_only = bool(flags[0] & apsw.SQLITE_OPEN_READONLY)

    def xLock(self, level: int) -> None:
        # SQLite requests this lock when the last connection closes, and can do without it; super() would raise.
        if self._is_read_only and level == apsw.SQLITE_LOCK_EXCLUSIVE:
            raise apsw.BusyError
        super().xLock(level)

    def xWrite(self, data: bytes, offset: int) -> None:
        super().xWrite(data, offset)
        if self._path is not None:
            self._databases.written(self._path, offset, len(data))

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        if self._path is not None:
            self._databases.synced(self._path)
