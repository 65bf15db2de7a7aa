"""Whom the host asks for names, as far as guests can ask them too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ._settings import MAX_NAMESERVERS, is_nameserver

_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second is what systemd-resolved asks, where the first says that it is to be asked itself."""
_MAX_BYTES = 64 * 1024


def nameservers_of_host(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Those of the first file that names some; none where there are none. Blocks for moments."""
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
