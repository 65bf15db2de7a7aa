"""What is this daemon's own: the one place that decides whether something may be removed or signalled."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")


def inside(directory: Path, name: str) -> Path:
    """The path of something in one of our directories. `name` may come from a row, a file or a command line.

    :raises OSError: it is no plain name, and would lead elsewhere.
    """
    if _COMPONENT.match(name) is None:
        raise OSError(errno.EPERM, f"{name[:80]!r} is no name of something in it", str(directory))
    return directory / name


def check_removable(path: Path, roots: Sequence[Path]) -> None:
    """:raises OSError: it does not lie below one of the directories `roots`."""
    if ".." in path.parts or not any(root in path.parents for root in roots):
        raise OSError(errno.EPERM, "is not below a directory of this daemon, and is not removed", os.fspath(path))
