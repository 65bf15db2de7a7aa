"""`If-None-Match` (RFC 9110, 13.1.2)."""

from __future__ import annotations

from collections.abc import Iterable


def has_etag(given: Iterable[str], etag: str) -> bool:
    """Returns whether the lines of `If-None-Match` have an `ETag`: the client has this version already."""
    return any(tag.strip().removeprefix("W/") in ("*", etag) for line in given for tag in line.split(","))
