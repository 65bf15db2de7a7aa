"""The URLs of artifacts."""

from __future__ import annotations

import urllib.parse
from pathlib import Path


def local_path(url: str) -> Path | None:
    """Returns the path of a file of this host, or None for other URLs."""
    if url.startswith("/"):
        return Path(url)
    if url.startswith("file://"):
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    return None


def shown(url: str) -> str:
    """Returns a URL for people, without login and query, which may be secrets."""
    if local_path(url) is not None:
        return url
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "…" if parts.query else "", ""))
