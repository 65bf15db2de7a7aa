"""Room on the disk for the next start.

A database can't even be read without some room: SQLite keeps an index of its log in a file. So a file of some size lies
beside the database, and is given up when the database can't be opened for lack of space. While it is not there, the
journal takes no change; it is made again as soon as there is space.
"""

from __future__ import annotations

from pathlib import Path

import apsw

from volant.host import Host

RESERVE_BYTES = 1024 * 1024
"""The index of a log of 32 MiB takes 64 KiB, and a migration some pages."""


class Reserve:
    """That of one database. Its calls block on the disk."""

    def __init__(self, host: Host, database: Path) -> None:
        self._host = host
        self.path = database.with_name(f"{database.name}-reserve")

    def lacks_space(self, error: apsw.Error) -> bool:
        """Whether that happened as the disk is full: SQLite does not always say so."""
        if isinstance(error, apsw.FullError):
            return True
        return isinstance(error, apsw.IOError | apsw.CantOpenError) and self._free() < RESERVE_BYTES

    def keep(self) -> bool:
        """Have it there; whether it is. Some space must be left beside it, else it would come and go."""
        if self._host.files.exists(self.path):
            return True
        try:
            if self._free() < 2 * RESERVE_BYTES:
                return False
            self._host.disk.reserve(self.path, RESERVE_BYTES)
        except OSError:
            return False
        return True

    def release(self) -> bool:
        """Give it up; whether it was there."""
        was_there = self._host.files.exists(self.path)
        self._host.files.unlink(self.path)
        return was_there

    def _free(self) -> int:
        return self._host.disk.free(self.path.parent)
