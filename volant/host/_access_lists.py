"""POSIX access lists: the users that may use a file besides its owner; see acl(5).

They are written in the kernel's format (posix_acl_xattr.h), as Python has no call for them.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

READ, WRITE, EXECUTE = 4, 2, 1

_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
_VERSION = 2
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF
_STICKY = 0o1000


class Grant(msgspec.Struct, frozen=True):
    """Lets a user or a group use a file. Afterwards no other user may, except its owner."""

    path: Path
    who: Literal["user", "group", "others"]
    id: int
    """The id of the user or the group."""
    access: int
    """The sum of `READ`, `WRITE` and `EXECUTE`."""


def grant(grants: Sequence[Grant], below: Sequence[Path]) -> None:
    """Applies grants. Directories above the files that are one of `below`, or inside one, let all users pass through.
    Follows no link. Raises OSError."""
    for each in grants:
        if each.who == "others":
            _add_mode(each.path, each.access)
        else:
            owner = os.lstat(each.path).st_mode >> 6 & 7
            entry = (_USER if each.who == "user" else _GROUP, each.id, each.access)
            _set(each.path, _ACCESS, owner, [entry], each.access)
    open_ways([each.path for each in grants], below)


def open_ways(paths: Sequence[Path], below: Sequence[Path]) -> None:
    """Lets all users pass through to files, in directories that are one of `below` or inside one. Raises OSError."""
    for path in paths:
        for parent in path.parents:
            if not any(parent.is_relative_to(place) for place in below):
                break
            _add_mode(parent, EXECUTE)


def lend_directory(path: Path, user: int) -> None:
    """Lets a user create files in a directory of the daemon that the daemon can use too, without access to the daemon's
    files there."""
    path.chmod(_STICKY | 0o700)
    _set(path, _ACCESS, 7, [(_USER, user, 7)], 7)
    _set(path, _DEFAULT, 7, [(_USER, os.geteuid(), 7)], 7)


def share_directory(path: Path, user: int) -> None:
    """Lets a user and the daemon create files in a directory of the daemon, and use each other's files there, as far as
    the group's mode bits allow. Raises OSError."""
    path.chmod(0o700)
    _set(path, _ACCESS, 7, [(_USER, user, 7)], 7)
    _set(path, _DEFAULT, 7, sorted([(_USER, os.geteuid(), 7), (_USER, user, 7)]), 7)


def are_supported(directory: Path) -> bool:
    """Returns whether files in a directory can have access lists. True also if a full disk prevents the test."""
    trial = directory / f".access-list-{os.getpid()}"
    try:
        os.close(os.open(trial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _set(trial, _ACCESS, 6, [(_USER, 1, READ)], READ)
    except OSError as error:
        return error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS)
    finally:
        trial.unlink(missing_ok=True)
    return True


def _set(path: Path, name: str, owner: int, entries: Sequence[tuple[int, int, int]], mask: int) -> None:
    whole = [(_OWNER, _NOBODY, owner), *(e for e in entries if e[0] == _USER), (_OWNING_GROUP, _NOBODY, 0)]
    whole += [*(e for e in entries if e[0] == _GROUP), (_MASK, _NOBODY, mask), (_OTHERS, _NOBODY, 0)]
    data = struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", tag, access, of) for tag, of, access in whole)
    os.setxattr(path, name, data, follow_symlinks=False)


def _add_mode(path: Path, access: int) -> None:
    mode = os.lstat(path).st_mode
    if mode & access != access:
        path.chmod(mode & 0o7777 | access)


def closed_directory_above(path: Path) -> Path | None:
    """Returns the first directory above `path` that does not let all users pass through. Raises OSError."""
    # By both names, as a link may lead on from somewhere else.
    for parent in dict.fromkeys([*reversed(path.parents), *reversed(path.resolve().parents)]):
        if not parent.stat().st_mode & EXECUTE:
            return parent
    return None
