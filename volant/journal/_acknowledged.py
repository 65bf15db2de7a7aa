"""How far a database had come when somebody was last told of a change to it.

A disk that lies about syncs, a copy that is put back, or a log that loses its end leave a database that is sound and
older than what was acknowledged. So a small file beside it says how far it was: after each transaction, before anybody
is answered. It is written in place, which costs some microseconds, and synced at most once a second, so that no commit
waits for it: it survives the daemon at once, and a power cut up to its last second. It may be behind the database, and
is never ahead of it unless something was lost.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from volant.host import Host

_SLOT = 256
"""Two of them, written in turns: a write that is torn leaves the other."""


class Acknowledged(msgspec.Struct, frozen=True, array_like=True):
    """How far a database is."""

    epoch: str
    seq: int
    """Of the newest event."""
    changes: int
    """How many transactions had no event."""
    last_vm_id: int

    def missing(self, found: Acknowledged) -> str | None:
        """What of this a database of the same epoch lacks; None: nothing."""
        events, changes = self.seq - found.seq, self.changes - found.changes
        if events <= 0 and changes <= 0:
            return None
        said = [f"{events} events"] if events > 0 else []
        said += [f"{changes} changes without one"] if changes > 0 else []
        return " and ".join(said)


class AcknowledgedFile:
    """That file. Its calls block on the disk, but `write` on its cache alone."""

    def __init__(self, host: Host, database: Path) -> None:
        self._host = host
        self.path = acknowledged_path(database)
        self._fd = -1
        self._writes = 0
        self.is_synced = True

    def open(self) -> Acknowledged | None:
        """What it says; None: nothing that can be believed. Raises OSError."""
        is_new = not self._host.files.exists(self.path)
        self._fd = self._host.descriptors.open(self.path, os.O_RDWR | os.O_CREAT)
        if is_new:
            self._host.files.sync_directory(self.path.parent)
        data = self._host.descriptors.read_at(self._fd, 2 * _SLOT, 0)
        slots = [_read(data[:_SLOT]), _read(data[_SLOT:])]
        found = [slot for slot in slots if slot is not None]
        if not found:
            return None
        writes, newest = max(found, key=lambda slot: slot[0])
        self._writes = writes
        return newest

    def write(self, acknowledged: Acknowledged) -> None:
        """Say how far it is now. Raises OSError."""
        self._writes += 1
        body = msgspec.json.encode((self._writes, acknowledged))
        line = b"%08x " % zlib.crc32(body) + body
        self._host.descriptors.write_at(self._fd, line.ljust(_SLOT - 1) + b"\n", self._writes % 2 * _SLOT)
        self.is_synced = False

    def sync(self) -> None:
        """Have it on the disk. Raises OSError."""
        self.is_synced = True
        self._host.descriptors.sync(self._fd)

    def close(self) -> None:
        """The last word is on the disk then. Raises OSError."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                if not self.is_synced:
                    self._host.descriptors.sync(fd)
            finally:
                self._host.descriptors.close(fd)


def acknowledged_path(database: Path) -> Path:
    """Where it lies."""
    return database.with_name(f"{database.name}-acknowledged")


def _read(slot: bytes) -> tuple[int, Acknowledged] | None:
    digest, _, body = slot.rstrip(b" \n\0").partition(b" ")
    try:
        if not body or int(digest, 16) != zlib.crc32(body):
            return None
        return msgspec.json.decode(body, type=tuple[int, Acknowledged])
    except (ValueError, msgspec.MsgspecError):
        return None
