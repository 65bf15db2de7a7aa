"""Finds the host's DNS servers that guests can use, too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ._settings import MAX_NAMESERVERS, is_nameserver

_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second lists the servers of systemd-resolved, if the first only names systemd-resolved itself."""
_MAX_BYTES = 64 * 1024


def nameservers_of_host(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Returns the servers of the first file that lists usable ones. Blocks briefly."""
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES).decode(errors="replace")
        except OSError:
            continue
        words = (line.split() for line in text.splitlines())
        found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and is_nameserver(line[1])]
        if found:
            return tuple(dict.fromkeys(found))[:MAX_NAMESERVERS]
    return ()
