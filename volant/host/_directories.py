"""Directories that no other user of the host owns, can write in, or can replace.

Names such as `/dev/shm/volant-<id>` are predictable, and a user that creates such a directory first would own the files
that the daemon puts there: guests' memory, their sockets. So an existing directory is checked through a descriptor,
without following a link, before it is used. One check is enough: other users can't replace the daemon's entry in a
directory that only the daemon can write in, or in one with the sticky bit.
"""

from __future__ import annotations

import errno
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = 0
_WRITE_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ABOVE = 0o711
"""The mode of parent directories: hypervisors have their own users, which must pass through, but not list anything."""
_ACCESS_LIST = "system.posix_acl_access"


class UnsafeDirectory(PermissionError):
    """Another user owns a directory, can write in it, or can replace it. The text has the fix."""

    def __init__(self, text: str, path: Path) -> None:
        super().__init__(errno.EACCES, text, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def make_own_directory(path: Path, mode: int = 0o700) -> str | None:
    """Creates a directory with exactly this mode, or checks that an existing one belongs to the daemon.

    If other users could write in it, corrects its mode and returns a warning for the operator. Creates missing parents
    with mode 0711.

    Raises UnsafeDirectory, also if other users have put something into it; OSError if it can't be created.
    """
    for parent in reversed(path.parents):
        if not parent.is_dir():
            _make(parent, _ABOVE)
    if _make(path, mode):
        return None
    with _opened(path, os.O_NOFOLLOW) as fd:
        figures = os.fstat(fd)
        if not stat.S_ISLNK(figures.st_mode):
            return _check_ours(path, fd)
        if figures.st_uid not in (_ROOT, os.geteuid()):
            raise UnsafeDirectory(
                f"{path} is a symbolic link that the user {_name_of(figures.st_uid)} made; remove it", path
            )
    # The link is ours or the operator's, such as to another disk.
    with _opened(path) as fd:
        return _check_ours(path, fd)


def check_way_to(path: Path) -> list[str]:
    """Checks that no other user can replace `path`, which need not exist.

    Parents that belong to other users are the operator's choice; returns a warning for each.

    Raises UnsafeDirectory if every user can replace it. Raises OSError.
    """
    warnings: dict[str, None] = {}
    # By both names, as a link may lead on from somewhere else.
    for way in dict.fromkeys((path, path.parent.resolve() / path.name, path.resolve())):
        for above, entry in zip(way.parents, (way, *way.parents), strict=False):
            try:
                there = os.lstat(above)
            except FileNotFoundError:
                continue
            if there.st_mode & stat.S_IWOTH and not stat.S_ISLNK(there.st_mode):
                if not there.st_mode & stat.S_ISVTX:
                    raise UnsafeDirectory(
                        f"every user can write in {above}, and so replace {entry}; chmod o-w {above}, or choose "
                        "another directory",
                        above,
                    )
                _check_entry(entry)
            if there.st_uid not in (_ROOT, os.geteuid()):
                warnings[f"{above} belongs to the user {_name_of(there.st_uid)}, who can replace {entry}"] = None
    return list(warnings)


def _check_entry(entry: Path) -> None:
    """Checks an entry of a directory with the sticky bit, where all users can create entries, but only replace their
    own."""
    try:
        owner = os.lstat(entry).st_uid
    except FileNotFoundError:
        return
    if owner not in (_ROOT, os.geteuid()):
        raise _of_another_user(entry, owner)


def _make(path: Path, mode: int) -> bool:
    """Returns whether it was missing. Raises OSError."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        return False
    with _opened(path, os.O_NOFOLLOW | os.O_DIRECTORY) as fd:
        if os.fstat(fd).st_uid != os.geteuid():
            raise _of_another_user(path, os.fstat(fd).st_uid)
        # By the descriptor, as the owner of the parent directory can put a link in its place.
        Path(f"/proc/self/fd/{fd}").chmod(mode)
    return True


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_ours(path: Path, fd: int) -> str | None:
    figures = os.fstat(fd)
    if not stat.S_ISDIR(figures.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if figures.st_uid != os.geteuid():
        raise _of_another_user(path, figures.st_uid)
    # With an access list the group bits are its mask, and the list is ours.
    open_to_others = stat.S_IWOTH if _has_access_list(fd) else _WRITE_OF_OTHERS
    mode = stat.S_IMODE(figures.st_mode)
    if not mode & open_to_others:
        return None
    # By the descriptor, so that it is this directory whatever has its name now.
    held = Path(f"/proc/self/fd/{fd}")
    held.chmod(mode & ~open_to_others)
    for entry in held.iterdir():
        try:
            owner = entry.lstat().st_uid
        except FileNotFoundError:
            continue
        if owner not in (_ROOT, os.geteuid()):
            raise UnsafeDirectory(
                f"other users could write in {path} (mode {mode:04o}), and {entry.name} in it belongs to the user "
                f"{_name_of(owner)}; look at it and remove it",
                path,
            )
    return f"{path} could be written to by other users (mode {mode:04o}), and can't any more"


def _has_access_list(fd: int) -> bool:
    try:
        os.getxattr(f"/proc/self/fd/{fd}", _ACCESS_LIST)
    except OSError:
        return False
    return True


def _of_another_user(path: Path, owner: int) -> UnsafeDirectory:
    who, we = _name_of(owner), _name_of(os.geteuid())
    return UnsafeDirectory(
        f"{path} belongs to the user {who}, who could read and change what {we} keeps there; remove it (it is made "
        f"anew), or, if it is meant to be used, `chown -R {we} {path}`",
        path,
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
