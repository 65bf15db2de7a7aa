"""`Ownership`: the one place that decides whether the daemon may remove a file or signal a process."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from volant.model import ProcessIdentity

from ._procfs import ProcessGone

_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")


class Ownership:
    """The files and processes that belong to this daemon. Before `confine`, all do."""

    def __init__(self) -> None:
        self._directories: tuple[Path, ...] | None = None
        self._tag_prefix = ""

    def confine(self, directories: Sequence[Path], tag_prefix: str) -> None:
        """Restricts ownership: from now on, only files below one of these directories belong to the daemon, and only
        processes whose tag begins with `tag_prefix`."""
        self._directories, self._tag_prefix = tuple(directories), tag_prefix

    def owns(self, tag_prefix: str) -> bool:
        """Returns whether processes with such a tag belong to the daemon."""
        return tag_prefix.startswith(self._tag_prefix)

    def check_removable(self, path: Path) -> None:
        """Checks a file. :raises OSError: it is not below one of the daemon's directories."""
        if self._directories is not None and (
            ".." in path.parts or not any(directory in path.parents for directory in self._directories)
        ):
            raise OSError(errno.EPERM, "is not below a directory of this daemon, and is not removed", os.fspath(path))

    def check_process(self, identity: ProcessIdentity) -> None:
        """Checks a process. :raises ProcessGone: it does not belong to the daemon, so it is treated as missing."""
        if not self.owns(identity.tag):
            raise ProcessGone(f"process {identity.pid} belongs to another daemon: its tag is {identity.tag[:100]!r}")


def inside(directory: Path, name: str) -> Path:
    """Returns the path of an entry in one of the daemon's directories. `name` may come from a row, a file or a command
    line.

    :raises OSError: it is not a plain name, and would lead elsewhere.
    """
    if _COMPONENT.match(name) is None:
        raise OSError(errno.EPERM, f"{name[:80]!r} is not a plain file name", str(directory))
    return directory / name
