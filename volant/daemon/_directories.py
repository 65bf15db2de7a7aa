"""The daemon's directories, and the lock that keeps a second daemon out of them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from volant._directories import UnsafeDirectory, check_way_to, make_own_directory
from volant.host import Host
from volant.vm import instance_of

from ._settings import Settings

_logger = logging.getLogger("volant.daemon")

_RAM_DISKS = (Path("/dev/shm"),)


class DirectoryError(Exception):
    """A directory that the daemon can't work in."""


def memory_dir(settings: Settings) -> Path:
    """Where guests' memory lies: on a file system in RAM, else every page of a guest would be written to a disk."""
    for base in _RAM_DISKS:
        if base.is_dir() and os.access(base, os.W_OK):
            return base / f"volant-{instance_of(settings.state_dir)}"
    return settings.runtime_dir / "memory"


def disk_dir(settings: Settings) -> Path:
    """Where VMs' disks lie: what is written to them must survive as what is written to the database."""
    return settings.state_dir / "disks"


def template_dir(settings: Settings) -> Path:
    """Where templates lie."""
    return settings.state_dir / "templates"


def snapshot_dir(settings: Settings) -> Path:
    """Where snapshots lie: what is said to be kept must survive as what is written to the database."""
    return settings.state_dir / "snapshots"


def log_dir(settings: Settings) -> Path:
    """Where the logs of VMs lie."""
    return settings.state_dir / "logs"


def confine(host: Host, settings: Settings) -> None:
    """Let a host remove and signal nothing but what is of the daemon with these settings."""
    own = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    host.confine(own, f"volant-{instance_of(settings.state_dir)}-")


@contextmanager
def claimed(settings: Settings) -> Iterator[None]:
    """The directories exist, are ours alone, and no other daemon uses them.

    :raises DirectoryError: one can't be made, another user owns or can replace one, or another daemon holds the state
        directory.
    """
    for path in (
        settings.state_dir,
        settings.runtime_dir,
        settings.cache_dir,
        memory_dir(settings),
        disk_dir(settings),
        log_dir(settings),
    ):
        _claim(path)
    for path in (template_dir(settings), snapshot_dir(settings), *_made_later(settings)):
        if os.path.lexists(path):
            _claim(path)
    lock = settings.state_dir / "lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryError(
                f"another volantd uses {settings.state_dir}; stop it, or use another --state-dir"
            ) from None
        yield
    finally:
        os.close(fd)


def _made_later(settings: Settings) -> Iterator[Path]:
    """Directories inside that are made when they are needed."""
    yield settings.state_dir / "standby"
    for name in ("vms", "net", "standby", "templates"):
        yield settings.runtime_dir / name


def _claim(path: Path) -> None:
    """:raises DirectoryError:"""
    try:
        warnings = check_way_to(path)
        if (corrected := make_own_directory(path)) is not None:
            warnings.append(corrected)
    except UnsafeDirectory as error:
        raise DirectoryError(str(error)) from None
    except OSError as error:
        raise DirectoryError(f"{path} can't be made: {error.strerror}; choose another one, or run as root") from None
    for warning in warnings:
        _logger.warning("%s", warning)
    if not os.access(path, os.W_OK | os.X_OK):
        raise DirectoryError(f"{path} can't be written to; choose another one, or run as root")


def remove(settings: Settings) -> None:
    """Remove what an ephemeral daemon leaves behind; the cache stays."""
    for path in (memory_dir(settings), settings.runtime_dir, settings.state_dir):
        shutil.rmtree(path, ignore_errors=True)
