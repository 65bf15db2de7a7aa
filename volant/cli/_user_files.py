"""JSON files of this user: replaced atomically, and changed by one process at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

LOCK_S = 45.0
"""How long to wait for another process, which may send two requests of up to 15 s to an issuer."""
_RETRY_S = 0.05


def replace_file(path: Path, content: object) -> None:
    """Replaces a file that only this user may read by JSON. :raises click.UsageError: it can't be written."""
    part = path.with_name(f"{path.name}.{os.urandom(6).hex()}.part")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
            opened.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise click.UsageError(f"{path} can't be written: {error.strerror}") from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a file against changes by other processes, for the block.

    :raises click.UsageError: the lock file can't be created.
    :raises click.ClickException: another process holds it for longer than `LOCK_S`.
    """
    lock = path.with_suffix(".lock")
    try:
        lock.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise click.UsageError(f"{lock} can't be written: {error.strerror}") from None
    try:
        _lock(lock, descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path, descriptor: int) -> None:
    end = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise click.ClickException(
                    f"another process has locked {path} for {LOCK_S:g} s; end that process (`fuser {path}` shows it)"
                ) from None
            time.sleep(_RETRY_S)
        except OSError as error:
            raise click.UsageError(f"{path} can't be locked: {error.strerror}") from None
        else:
            return
