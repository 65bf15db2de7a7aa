"""Counts the fields of an HTTP head before it is parsed: h11 takes some microseconds for each, on the event loop."""

from __future__ import annotations

import re

MAX_FIELDS = 100
"""Maximum fields in the head of a client or a guest. Other servers allow about as many: 100 (Apache, hyper)."""
_END = re.compile(rb"\n\r?\n")


def head_of(received: bytes | bytearray) -> tuple[int, int | None]:
    """Returns the number of fields that have begun, and the end of the head; None if the end has not arrived."""
    end = _END.search(received)
    if end is None:
        # Not the line before them.
        return max(0, received.count(b"\n") - 1), None
    return received.count(b"\n", 0, end.start()), end.end()
