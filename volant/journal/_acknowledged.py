"""The file that says which changes were acknowledged, so that their loss is noticed.

A disk that lies about syncs, a copy that is put back, or a log that loses its end leave a database that is intact and
older than what was acknowledged. The journal writes this file after each transaction and before the replies. It is
written in place, which costs some microseconds, and synced at most once a second, so no commit waits for it. It may be
behind the database, and is ahead of it only if something was lost.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from volant.host import Host

_SLOT = 256
"""Bytes of each of two copies, written in turns: a torn write leaves the other copy."""


class Acknowledged(msgspec.Struct, frozen=True, array_like=True):
    """What a database contains, in numbers."""

    epoch: str
    seq: int
    """The number of the newest event."""
    changes: int
    """The number of transactions without an event."""
    last_vm_id: int

    def missing(self, found: Acknowledged) -> str | None:
        """Returns what a database of the same epoch lacks; None: nothing."""
        events, changes = self.seq - found.seq, self.changes - found.changes
        if events <= 0 and changes <= 0:
            return None
        said = [f"{events} events"] if events > 0 else []
        said += [f"{changes} changes without one"] if changes > 0 else []
        return " and ".join(said)


class AcknowledgedFile:
    """The file. All calls block on the disk, except that `write` only fills the page cache."""

    def __init__(self, host: Host, database: Path) -> None:
        self._host = host
        self.path = acknowledged_path(database)
        self._fd = -1
        self._writes = 0
        self.is_synced = True

    def open(self) -> Acknowledged | None:
        """Opens it and returns its content; None: it is new or damaged. :raises OSError: the disk fails."""
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
        self._writes += 1
        body = msgspec.json.encode((self._writes, acknowledged))
        line = b"%08x " % zlib.crc32(body) + body
        self._host.descriptors.write_at(self._fd, line.ljust(_SLOT - 1) + b"\n", self._writes % 2 * _SLOT)
        self.is_synced = False

    def sync(self) -> None:
        """Makes it durable. :raises OSError: the disk fails."""
        self.is_synced = True
        self._host.descriptors.sync(self._fd)

    def close(self) -> None:
        """Makes it durable and closes it. :raises OSError: the disk fails."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                if not self.is_synced:
                    self._host.descriptors.sync(fd)
            finally:
                self._host.descriptors.close(fd)


def acknowledged_path(database: Path) -> Path:
    return database.with_name(f"{database.name}-acknowledged")


def _read(slot: bytes) -> tuple[int, Acknowledged] | None:
    digest, _, body = slot.rstrip(b" \n\0").partition(b" ")
    try:
        if not body or int(digest, 16) != zlib.crc32(body):
            return None
        return msgspec.json.decode(body, type=tuple[int, Acknowledged])
    except (ValueError, msgspec.MsgspecError):
        return None
