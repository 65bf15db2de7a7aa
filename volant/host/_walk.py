"""Opens a path step by step, so that links in it lead only where they may.

Each step opens one name in a directory that is open already, and follows no link by itself: a directory that is moved
meanwhile is still the same one. openat2(2) does this in one call, but does not exist under systemd's
`RestrictSUIDSGID=`, which the daemon's service has.

Links of /proc such as `/proc/self/fd/3` are never followed: they lead to what the daemon has open, whatever the rights
of the client that names them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path

_STEP = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_LINKS = 40
"""As the kernel's."""
_MAX_DEPTH = 256
"""Each directory on the way is an open file of the daemon until the end."""
_PROC = 0x9FA0
"""`PROC_SUPER_MAGIC`, the type of /proc; see statfs(2)."""
_STATFS_BYTES = 256

_libc = ctypes.CDLL(None, use_errno=True)


def open_path(path: Path, flags: int, *, within: Path | None = None, links: bool = True) -> int:
    """Opens an absolute path and returns its descriptor, which is not inherited.

    :param within: a directory that no link and no `..` may lead out of; the path lies in it, or is it
    :param links: whether links are followed at all, but for those in `within` itself
    :raises OSError: as open(2): EXDEV for what leads out of `within`, ELOOP for links that are not followed,
        ENAMETOOLONG for more than 256 directories in one another
    """
    top = Path("/") if within is None else within
    # Path drops no `..`.
    names = [*reversed((top / path).relative_to(top).parts)]
    followed = 0
    stack = [os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)]
    try:
        while names:
            name = names.pop()
            if name == "..":
                if len(stack) > 1:
                    os.close(stack.pop())
                elif within is not None:
                    raise _error(errno.EXDEV, path)
                continue
            fd = os.open(name, _STEP, dir_fd=stack[-1])
            mode = os.fstat(fd).st_mode
            if stat.S_ISLNK(mode):
                followed += 1
                try:
                    target = os.readlink("", dir_fd=fd)
                    if not links or followed > _MAX_LINKS or _is_on_proc(fd):
                        raise _error(errno.ELOOP, path)
                finally:
                    os.close(fd)
                if target.startswith("/"):
                    if within is not None:
                        raise _error(errno.EXDEV, path)
                    while len(stack) > 1:
                        os.close(stack.pop())
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


def _is_on_proc(fd: int) -> bool:
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, found) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    (kind,) = struct.unpack_from("@l", found)
    return bool(kind == _PROC)


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
