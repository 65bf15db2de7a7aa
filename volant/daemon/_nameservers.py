"""Finds the host's DNS servers: those that guests can use, too, and those that the daemon can ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import ip_address
from pathlib import Path

from ._settings import MAX_NAMESERVERS, is_nameserver

_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
"""The second lists the servers of systemd-resolved, if the first only names systemd-resolved itself."""
_MAX_BYTES = 64 * 1024


def nameservers_of_host(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Returns the servers of the first file that lists some that guests can use. Blocks briefly."""
    return _first(files, is_nameserver)


def nameservers_of_daemon(files: Iterable[Path] = _FILES) -> tuple[str, ...]:
    """Returns the servers that the daemon itself can ask, which may be on loopback or have IPv6. Blocks briefly."""
    return _first(files, _is_address)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _first(files: Iterable[Path], is_usable: Callable[[str], bool]) -> tuple[str, ...]:
    for path in files:
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES).decode(errors="replace")
        except OSError:
            continue
        words = (line.split() for line in text.splitlines())
        found = [line[1] for line in words if len(line) > 1 and line[0] == "nameserver" and is_usable(line[1])]
        if found:
            return tuple(dict.fromkeys(found))[:MAX_NAMESERVERS]
    return ()
