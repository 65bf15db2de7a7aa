"""Opens a path below a directory step by step, so that no link in it leads out.

Each step opens one name in an open directory, and follows no link by itself: a directory that is moved in the meantime
is still the same one. openat2(2) does this in one call, but does not exist under systemd's `RestrictSUIDSGID=`, which
the daemon's service has.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""O_NONBLOCK, as to open a pipe would wait for its writer."""
_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""Maximum links on a path, the same as in the kernel."""
_MAX_DEPTH = 256
"""Maximum depth. Each directory on the path is an open file of the daemon until the end."""


def open_path(path: Path, flags: int, *, within: Path, links: bool = True) -> int:
    """Opens an absolute path and returns its descriptor, which is not inherited.

    :param within: a directory that no link and no `..` may lead out of; the path is this directory or inside it
    :param links: whether links are followed at all, except those in `within` itself
    :raises OSError: see open(2); EXDEV for a path that leads out of `within`, ELOOP for links that are not followed,
        ENAMETOOLONG for more than 256 directories in one another
    """
    # Path drops no `..`.
    names = [*reversed(path.relative_to(within).parts)]
    stack = [os.open(within, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    followed = 0
    try:
        while names:
            name = names.pop()
            if name == "..":
                if len(stack) == 1:
                    raise _error(errno.EXDEV, path)
                os.close(stack.pop())
                continue
            fd = os.open(name, _STEP, dir_fd=stack[-1])
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                followed += 1
                try:
                    target = os.readlink("", dir_fd=fd)
                    if not links or followed > _MAX_LINKS:
                        raise _error(errno.ELOOP, path)
                finally:
                    os.close(fd)
                if target.startswith("/"):
                    raise _error(errno.EXDEV, path)
                names += [part for part in reversed(target.split("/")) if part not in ("", ".")]
            elif stat.S_ISDIR(mode):
                stack.append(fd)
                if len(stack) > _MAX_DEPTH:
                    raise _error(errno.ENAMETOOLONG, path)
            else:
                os.close(fd)
                if names:
                    raise _error(errno.ENOTDIR, path)
                return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=stack[-1])
        return os.open(".", flags | os.O_CLOEXEC, dir_fd=stack[-1])
    finally:
        for each in stack:
            os.close(each)


def open_below(directories: Iterable[Path], path: Path) -> int:
    """Opens a file that lies in one of the directories, and returns its descriptor. No link leads out of a directory.

    :raises OSError: there is none
    """
    for directory, inner in _below(directories, path):
        return open_path(directory / inner, _READ, within=directory)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def is_below(directories: Iterable[Path], path: Path) -> bool:
    """Returns whether a path lies in one of the directories by its text. Touches no file."""
    return any(True for _ in _below(directories, path))


def _below(directories: Iterable[Path], path: Path) -> Iterable[tuple[Path, Path]]:
    plain = Path(os.path.normpath(path))
    for directory in directories:
        if plain.is_relative_to(directory) and plain != directory:
            yield directory, plain.relative_to(directory)


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
