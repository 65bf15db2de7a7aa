"""Formats values and untrusted text for a terminal."""

from __future__ import annotations

import re
from datetime import datetime

# Control characters, and those that change the direction of text: a guest's log must not control the user's terminal.
_UNSAFE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: object) -> str:
    """Returns `text` with all characters escaped that a terminal could interpret as a command."""
    return _UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", str(text))


def span(seconds: float) -> str:
    """Returns a duration in at most two units, for people."""
    left = max(int(seconds), 0)
    for unit, size, smaller, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if left >= size:
            rest = left % size // small
            return f"{left // size}{unit}{rest}{smaller}" if rest else f"{left // size}{unit}"
    return f"{left}s"


def clock(moment: datetime) -> str:
    """Returns the local time of day."""
    return moment.astimezone().strftime("%H:%M:%S")


def size(count: float) -> str:
    """Returns a number of bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
