"""The daemon's directories, and the lock that keeps a second daemon out of them."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from volant.host import Host, UnsafeDirectory, check_way_to, make_own_directory
from volant.vm import instance_of

from ._settings import Settings

_logger = logging.getLogger("volant.daemon")

_RAM_DISKS = (Path("/dev/shm"),)
_LOCK = "lock"
EPHEMERAL = "ephemeral"
"""Marks directories in which an ephemeral daemon has made everything."""
_IN_STATE = (
    *(EPHEMERAL, _LOCK, "disks", "logs", "templates", "snapshots", "standby"),
    # What SQLite and the journal keep beside a database begins with its name.
    *("volant.db", "volant.db[-.]*", "volant-*.db", "volant-*.db[-.]*"),
)
_IN_RUNTIME = (EPHEMERAL, _LOCK, "vms", "net", "standby", "templates", "memory")


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
    """The directories exist, are ours alone, and no other daemon uses them; only the cache may be shared.

    :raises DirectoryError: one can't be made, another user owns or can replace one, another daemon uses one, or an
        ephemeral daemon would delete in the end what it has not made.
    """
    for path in (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings)):
        _claim(path)
    if settings.ephemeral:
        _check_ephemeral(settings)
    with ExitStack() as stack:
        stack.enter_context(_locked(settings.state_dir, "--state-dir"))
        if not _same(settings.state_dir, settings.runtime_dir):
            stack.enter_context(_locked(settings.runtime_dir, "--runtime-dir"))
        for path in (settings.state_dir, settings.runtime_dir):
            if settings.ephemeral:
                (path / EPHEMERAL).touch(0o600)
            else:
                # From now on it holds what must survive.
                (path / EPHEMERAL).unlink(missing_ok=True)
        for path in (disk_dir(settings), log_dir(settings)):
            _claim(path)
        for path in (template_dir(settings), snapshot_dir(settings), *_made_later(settings)):
            if os.path.lexists(path):
                _claim(path)
        yield


@contextmanager
def _locked(directory: Path, option: str) -> Iterator[None]:
    """Nobody else has the directory for the length of the block. :raises DirectoryError: somebody has."""
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DirectoryError(f"{directory / _LOCK} can't be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Versions before this one wrote no number.
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            who = f"another volantd (process {pid})" if pid.isdecimal() else "another volantd"
            raise DirectoryError(f"{who} uses {directory}; stop it, or use another {option}") from None
        # A disk that is full is no reason not to start.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _check_ephemeral(settings: Settings) -> None:
    """:raises DirectoryError: there is something that an ephemeral daemon has not made, and would delete."""
    memory = memory_dir(settings)
    marked = (settings.state_dir / EPHEMERAL).exists()
    for directory, option, is_ours in (
        (settings.state_dir, "--state-dir", marked),
        (settings.runtime_dir, "--runtime-dir", (settings.runtime_dir / EPHEMERAL).exists()),
        (memory, "--state-dir", marked),
    ):
        found = [] if is_ours else _strange(directory, settings)
        if found:
            raise DirectoryError(
                f"{directory} holds {_some(found)}, which no ephemeral daemon has made, and --ephemeral deletes the "
                f"directory in the end; use another {option}, or leave --ephemeral out"
            )


def _strange(directory: Path, settings: Settings) -> list[str]:
    """What lies in a directory beside another one of the daemon's."""
    others = [each.resolve() for each in (settings.state_dir, settings.runtime_dir, settings.cache_dir)]
    found = []
    for entry in directory.iterdir():
        path = directory.resolve() / entry.name
        if entry.name != _LOCK and not any(other.is_relative_to(path) for other in others):
            found.append(entry.name)
    return sorted(found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _made_later(settings: Settings) -> Iterator[Path]:
    """Directories inside that are made when they are needed."""
    yield settings.state_dir / "standby"
    for name in ("vms", "net", "standby", "templates"):
        yield settings.runtime_dir / name


def _claim(path: Path) -> None:
    """:raises DirectoryError:"""
    try:
        warnings = check_way_to(path)
        corrected = make_own_directory(path)
        # Another user may have made a directory above that was not there a moment ago.
        warnings = list(dict.fromkeys([*warnings, *check_way_to(path)]))
        if corrected is not None:
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
    """Remove what an ephemeral daemon has made, and the directories unless something else is in them; the cache
    stays."""
    shutil.rmtree(memory_dir(settings), ignore_errors=True)
    for directory, made in ((settings.runtime_dir, _IN_RUNTIME), (settings.state_dir, _IN_STATE)):
        # The marker last: what is left of this one is removed by the next.
        for path in sorted(directory.iterdir(), key=lambda each: each.name in (EPHEMERAL, _LOCK)):
            if any(path.match(pattern) for pattern in made):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()
        try:
            directory.rmdir()
        except OSError:
            if directory.is_dir() and (left := _strange(directory, settings)):
                _logger.warning("%s is kept, as it holds %s, which this daemon has not made", directory, _some(left))
