"""The directories of the host that VMs may have: those in the settings, including their content.

A client is root in its VMs, and must not be root on the host. So by default there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from volant.model import DirectoryMount, Problem, is_short_path

SETTING = "VOLANT_HOST_DIRS"


class AllowedDirectory(msgspec.Struct, frozen=True):
    """A directory that VMs may have, with its content."""

    path: Path
    writable: bool = False

    def __str__(self) -> str:
        return f"{self.path}{':rw' if self.writable else ''}"


def parse_allowed(text: str) -> AllowedDirectory:
    """Parses `/path[:ro|:rw]`. :raises ValueError: it is malformed; the message has the reason."""
    path, colon, mode = text.partition(":")
    if (colon and mode not in ("ro", "rw")) or not is_short_path(path):
        raise ValueError(f"{text[:100]!r} is not /path or /path:rw, without '.' or '..' in it")
    return AllowedDirectory(Path(path), mode == "rw")


def check_allowed(
    mount: DirectoryMount, allowed: Sequence[AllowedDirectory], places: Sequence[Path] = ()
) -> AllowedDirectory:
    """Returns the innermost allowed directory around a mount.

    :param places: the daemon's own directories
    :raises Problem: 403, there is none, or only a read-only one, or the daemon has its own files there.
    """
    source = Path(mount.source)
    for place in places:
        if place.is_relative_to(source) or source.is_relative_to(place):
            raise Problem(
                403, "host-directory-denied", f"no VM may have the host's directory {source}: the daemon uses {place}",
                field="volumes", hint="name another directory",
            )  # fmt: skip
    around = [each for each in allowed if source.is_relative_to(each.path)]
    if not around:
        there = f"allowed are {', '.join(map(str, allowed))}" if allowed else "none is allowed"
        raise _denied(f"no VM may have the host's directory {source}: {there}", f"{SETTING}={source}")
    found = max(around, key=lambda each: len(each.path.parts))
    if not mount.read_only and not found.writable:
        raise _denied(f"VMs may only read the host's directory {source}", f"{SETTING}={found.path}:rw")
    return found


def _denied(detail: str, setting: str) -> Problem:
    return Problem(
        403, "host-directory-denied", detail, field="volumes",
        hint=f"the operator allows it by starting the daemon with {setting}",
    )  # fmt: skip
