"""Writes files for clients, and answers errors of the system; shared by single files and tars."""

from __future__ import annotations

import errno
import os

from ._http import Problem
from ._system import memory

_SPARE_MB = 12
"""Memory of the guest that stays free: a file system in RAM would use up the rest, and the kernel kill the agent."""
_SHOWN_PATH = 200
_STATUSES = {
    errno.ENOENT: (404, "there is no {}"),
    errno.ENOTDIR: (409, "something on the way to {} is not a directory"),
    errno.EISDIR: (409, "{} is a directory"),
    errno.EEXIST: (409, "{} is there already"),
    errno.ENOTEMPTY: (409, "the directory {} is not empty"),
    errno.EACCES: (403, "{} is not permitted"),
    errno.EPERM: (403, "{} is not permitted"),
    errno.EROFS: (409, "{} is on a file system that is read-only"),
    errno.EBUSY: (409, "{} is in use"),
    errno.ETXTBSY: (409, "{} is a program that runs"),
    errno.ENAMETOOLONG: (400, "the path {} is too long"),
    errno.ELOOP: (409, "there are too many symbolic links on the way to {}"),
    errno.ENOSPC: (507, "there is no space left for {}"),
    errno.EDQUOT: (507, "there is no space left for {}"),
    errno.EFBIG: (413, "{} is longer than the file system allows"),
}
_HINTS = {
    errno.ENOTEMPTY: "delete it with ?recursive=true",
    errno.ENOSPC: "files of a guest without a root filesystem are in its memory; delete some, or give the VM more",
}


def show(path: bytes) -> str:
    """Returns at most 200 characters of a path, for people."""
    text = path.decode(errors="backslashreplace")
    return text if len(text) <= _SHOWN_PATH else text[:_SHOWN_PATH] + "…"


def problem_of(error: OSError, path: bytes, *, reading: bool) -> Problem:
    """Returns the answer to a client for an error of the system."""
    status, text = _STATUSES.get(error.errno or 0, (500, f"the guest's file system fails at {{}}: {error.strerror}"))
    if reading and error.errno == errno.ENOTDIR:
        status, text = _STATUSES[errno.ENOENT]
    hint = _HINTS.get(error.errno or 0, "")
    return Problem(status, text.format(show(path)), field="path", hint=hint)


def temporary_name(name: bytes) -> bytes:
    """Returns a random name for the file that will be renamed to `name`."""
    return b"." + name[:200] + b".volant-" + os.urandom(6).hex().encode()


def write(fd: int, data: bytes) -> None:
    """Writes all of `data`.

    :raises OSError: the system refuses; ENOSPC also if less than 12 MiB of the guest's memory are free
    """
    left = memory()
    if left["total_mb"] and left["available_mb"] < _SPARE_MB:
        raise OSError(errno.ENOSPC, "the guest's memory is nearly used up")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def set_owner_and_mode(fd: int, mode: int, owner: tuple[int, int] | None) -> None:
    """Sets owner and mode of a new file. The owner is first: changing it clears bits of the mode."""
    if owner is not None:
        found = os.fstat(fd)
        if (found.st_uid, found.st_gid) != owner:
            os.fchown(fd, *owner)
    os.fchmod(fd, mode)
