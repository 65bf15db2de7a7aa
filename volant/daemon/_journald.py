"""Logs to systemd's journal, with fields for `journalctl VM=demo` and `journalctl REQUEST_ID=…`.

The native protocol sends one datagram for each entry (systemd.io, "Native Journal Protocol"). The daemon uses it only
if standard error is the journal according to `JOURNAL_STREAM`. Rejected: bindings to libsystemd, which must be built on
each host, for forty lines of code.

**It never blocks**, as a stuck journal would stop the event loop. Entries that do not fit into the socket are dropped,
and the next entry has their number. An entry that is too long for a datagram is cut.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path

SOCKET = Path("/run/systemd/journal/socket")
FIELDS = ("vm", "event", "request_id", "caller", "address", "project", "operation", "target", "outcome")
"""Keys of `extra` in log calls. The journal's fields have their names in capitals."""

_MAX_BYTES = 48 * 1024
_SEND_BUFFER = 4 * 1024 * 1024
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def is_journal(fd: int, environ: Mapping[str, str]) -> bool:
    """Returns whether a descriptor is connected to the journal."""
    device, _, inode = environ.get("JOURNAL_STREAM", "").partition(":")
    if not (device.isdecimal() and inode.isdecimal()) or not SOCKET.exists():
        return False
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (int(device), int(inode))


class JournalHandler(logging.Handler):
    """Sends each record as an entry."""

    def __init__(self, identifier: str, path: Path = SOCKET) -> None:
        super().__init__()
        # Time, level and logger are fields.
        self.setFormatter(logging.Formatter("%(message)s"))
        self._identifier = identifier
        self._path = str(path)
        self._lost = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)

    def emit(self, record: logging.LogRecord) -> None:
        if self._lost:
            # Sent first, so that the gap is at its place.
            text = f"{self._lost} log entries were dropped, as the journal did not accept them"
            if not self._send(entry(self._identifier, logging.WARNING, text, {})):
                self._lost += 1
                return
            self._lost = 0
        try:
            text = self.format(record)
            fields = {"LOGGER": record.name, "CODE_FILE": record.pathname, "CODE_LINE": record.lineno}
            fields |= {name.upper(): value for name in FIELDS if (value := getattr(record, name, None)) is not None}
            data = entry(self._identifier, record.levelno, text, fields)
        except Exception:
            self.handleError(record)
            return
        if not self._send(data):
            self._lost += 1

    def _send(self, data: bytes) -> bool:
        try:
            self._sock.sendto(data, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._sock.close()
        super().close()


def entry(identifier: str, level: int, text: str, fields: Mapping[str, object]) -> bytes:
    """Returns an entry in the native protocol. Cuts a text of more than 48 KiB."""
    priority = next((number for least, number in _PRIORITIES if level >= least), 7)
    message = text.encode("utf-8", "replace")
    if len(message) > _MAX_BYTES:
        message = message[:_MAX_BYTES] + b" [cut]"
    facts = {"MESSAGE": message, "PRIORITY": priority, "SYSLOG_IDENTIFIER": identifier} | dict(fields)
    data = bytearray()
    for name, value in facts.items():
        encoded = value if isinstance(value, bytes) else str(value)[:1000].encode("utf-8", "replace")
        if b"\n" in encoded:
            data += name.encode() + b"\n" + len(encoded).to_bytes(8, "little") + encoded + b"\n"
        else:
            data += name.encode() + b"=" + encoded + b"\n"
    return bytes(data)
