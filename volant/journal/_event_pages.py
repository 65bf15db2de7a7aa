"""Reads events that are no longer in memory."""

from __future__ import annotations

from pathlib import Path

import apsw

from ._frames import EventFrame
from ._schema import open_reader


class EventPages:
    """Read-only connections. Safe for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[apsw.Connection] = []

    def read(self, epoch: str, after_seq: int, up_to_seq: int) -> list[EventFrame]:
        """Returns the stored events after one number and up to another.

        :raises apsw.Error: the disk fails.
        """
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = open_reader(self._path)
        try:
            found = connection.execute(
                "SELECT seq, frame FROM events WHERE seq > ? AND seq <= ? ORDER BY seq", (after_seq, up_to_seq)
            )
            frames = [EventFrame.read(epoch, seq, frame) for seq, frame in found]
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        return frames

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
