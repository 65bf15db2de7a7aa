"""Reserved disk space for the next start.

SQLite keeps an index of its log in a file, and can't even read without it. So a file of some size lies beside the
database, and is removed when the database can't be opened for lack of space. While it is missing, the journal refuses
changes; it is created again as soon as there is space.
"""

from __future__ import annotations

from pathlib import Path

import apsw

from volant.host import Host

RESERVE_BYTES = 1024 * 1024
"""The index of a log of 32 MiB takes 64 KiB, and a migration some pages."""


class Reserve:
    """The reserve of one database. All calls block on the disk."""

    def __init__(self, host: Host, database: Path) -> None:
        self._host = host
        self.path = database.with_name(f"{database.name}-reserve")

    def lacks_space(self, error: apsw.Error) -> bool:
        """Returns whether the error means a full disk. SQLite does not always say so."""
        if isinstance(error, apsw.FullError):
            return True
        return isinstance(error, apsw.IOError | apsw.CantOpenError) and self._free() < RESERVE_BYTES

    def keep(self) -> bool:
        """Creates it if it is missing. Returns whether it is there. Some space must stay free besides."""
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
        """Removes it. Returns whether it was there."""
        was_there = self._host.files.exists(self.path)
        self._host.files.unlink(self.path)
        return was_there

    def _free(self) -> int:
        return self._host.disk.free(self.path.parent)
