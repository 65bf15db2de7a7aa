"""Files that a process locks while it makes something. The kernel gives the lock back when the process ends, so what a
killed one has left is what has no lock.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held(path: Path, waiting: Callable[[], None] = lambda: None, *, mode: int = 0o600) -> Iterator[int]:
    """Holds the lock of a file for a block, and yields its descriptor. Makes the file.

    Waits without a deadline: who has the lock has one, and this process can be killed.

    :param waiting: called once if another process has the lock
    :raises OSError: the disk fails
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The holder before may have renamed or removed the file.
            if is_named(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


@contextmanager
def lock_unless_held(path: Path) -> Iterator[bool]:
    """Locks a file for a block, and makes it. Yields whether that was possible: False if another process has the lock,
    or the directory is gone. :raises OSError: the disk fails"""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield is_named(descriptor, path)
    finally:
        os.close(descriptor)


def remove_unlocked(directory: Path, pattern: str) -> None:
    """Removes the files that killed processes have left."""
    for path in directory.glob(pattern):
        with suppress(OSError), lock_unless_held(path) as locked:
            if locked:
                path.unlink()


def is_named(descriptor: int, path: Path) -> bool:
    """Returns whether a name still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
