"""The daemon's directories, and the lock that excludes a second daemon."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from volant.host import Host, UnsafeDirectory, check_way_to, make_own_directory
from volant.model import first_few
from volant.vm import VmSettings, instance_of

from ._settings import Settings

_logger = logging.getLogger("volant.daemon")

_RAM_DISKS = (Path("/dev/shm"),)
_LOCK = "lock"
_SECRETS_KEY = "secrets.key"
EPHEMERAL = "ephemeral"
"""The file that marks directories created by an ephemeral daemon."""
_IN_STATE = (
    *(EPHEMERAL, _LOCK, "disks", "logs", "templates", "snapshots", "standby", "volumes", "tls.pem*"),
    # Files of SQLite and the journal beside a database begin with its name.
    *("volant.db", "volant.db[-.]*", "volant-*.db", "volant-*.db[-.]*"),
)
_IN_RUNTIME = (EPHEMERAL, _LOCK, "vms", "net", "standby", "templates", "memory", "registries", "directories")


class DirectoryError(Exception):
    """The daemon can't use a directory."""


def memory_dir(settings: Settings) -> Path:
    """Returns the directory of guest memory, in RAM if possible: elsewhere each page would be written to a disk."""
    for base in _RAM_DISKS:
        if base.is_dir() and os.access(base, os.W_OK):
            return base / f"volant-{instance_of(settings.state_dir)}"
    return settings.runtime_dir / "memory"


def disk_dir(settings: Settings) -> Path:
    """Returns the directory of VM disks. It must be as durable as the database."""
    return settings.state_dir / "disks"


def template_dir(settings: Settings) -> Path:
    """Returns the directory of templates."""
    return settings.state_dir / "templates"


def snapshot_dir(settings: Settings) -> Path:
    """Returns the directory of snapshots. It must be as durable as the database."""
    return settings.state_dir / "snapshots"


def volume_dir(settings: Settings) -> Path:
    """Returns the directory of volumes. It must be as durable as the database."""
    return settings.state_dir / "volumes"


def key_dir(settings: Settings) -> Path:
    """Returns the directory of the keys of secrets: next to the state directory, so that no copy of that contains
    them."""
    return settings.state_dir.with_name(f"{settings.state_dir.name}-keys")


def secrets_key_file(settings: Settings) -> Path:
    """Returns the file with the keys of secrets."""
    return settings.secrets_key_file or key_dir(settings) / _SECRETS_KEY


def vm_directories(settings: Settings) -> VmSettings:
    """Returns the settings of VMs with only the directories."""
    return VmSettings(
        state_dir=settings.state_dir,
        runtime_dir=settings.runtime_dir,
        cache_dir=settings.cache_dir,
        memory_dir=memory_dir(settings),
        disk_dir=disk_dir(settings),
        template_dir=template_dir(settings),
        snapshot_dir=snapshot_dir(settings),
        volume_dir=volume_dir(settings),
    )


def log_dir(settings: Settings) -> Path:
    """Returns the directory of VM logs."""
    return settings.state_dir / "logs"


def confine(host: Host, settings: Settings) -> None:
    """Restricts a host to removing files and signalling processes of the daemon with these settings."""
    own = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    host.confine(own, f"volant-{instance_of(settings.state_dir)}-")


@contextmanager
def claimed(settings: Settings) -> Iterator[None]:
    """Creates and locks the directories for the block. Only the cache may be shared with another daemon.

    At the end, removes the directory of guest memory if it is empty, as it takes up RAM of the host. `remove` removes
    an ephemeral daemon's.

    :raises DirectoryError: one can't be created, another user owns or can replace one, another daemon uses one, or an
        ephemeral daemon would delete files that it did not create.
    """
    for path in (settings.state_dir, settings.runtime_dir, settings.cache_dir):
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
                # From now on it contains what must survive.
                (path / EPHEMERAL).unlink(missing_ok=True)
        _put_aside(memory_dir(settings))
        for path in (memory_dir(settings), disk_dir(settings), log_dir(settings)):
            _claim(path)
        for path in (template_dir(settings), snapshot_dir(settings), volume_dir(settings), *_made_later(settings)):
            if os.path.lexists(path):
                _claim(path)
        try:
            yield
        finally:
            # After `remove` another daemon may have locked the directories, and have created this one for itself.
            if not settings.ephemeral:
                with suppress(OSError):
                    memory_dir(settings).rmdir()


@contextmanager
def _locked(directory: Path, option: str) -> Iterator[None]:
    """Locks a directory for the block. :raises DirectoryError: another daemon has locked it."""
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DirectoryError(f"{directory / _LOCK} can't be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Earlier versions wrote no process id.
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
            who = f"another volantd (process {pid})" if pid.isdecimal() else "another volantd"
            raise DirectoryError(f"{who} uses {directory}; stop it, or use another {option}") from None
        if not os.fstat(fd).st_nlink:
            raise DirectoryError(f"another volantd has just removed {directory}; start again")
        # The daemon also starts on a full disk.
        with suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _check_ephemeral(settings: Settings) -> None:
    """Checks an ephemeral daemon. :raises DirectoryError: it would delete files that none created."""
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
                f"{directory} contains {first_few(found)}, which no ephemeral daemon created, and --ephemeral deletes "
                f"the directory at the end; use another {option}, or omit --ephemeral"
            )


def _strange(directory: Path, settings: Settings) -> list[str]:
    """Returns the entries of a directory, without the lock and the daemon's other directories."""
    others = [each.resolve() for each in (settings.state_dir, settings.runtime_dir, settings.cache_dir)]
    found = []
    try:
        entries = list(directory.iterdir())
    except (FileNotFoundError, PermissionError):
        # For guest memory it is created later. `_claim` refuses a directory that others can list and the daemon can't.
        return []
    for entry in entries:
        path = directory.resolve() / entry.name
        if entry.name != _LOCK and not any(other.is_relative_to(path) for other in others):
            found.append(entry.name)
    return sorted(found)


def _made_later(settings: Settings) -> Iterator[Path]:
    """Yields directories that the daemon creates when it needs them."""
    yield settings.state_dir / "standby"
    for name in ("vms", "net", "standby", "templates", "registries"):
        yield settings.runtime_dir / name


def _put_aside(path: Path) -> None:
    """Renames, as root, another user's file in a directory where every user can create files, so that it can't prevent
    the daemon from starting."""
    try:
        owner = path.lstat().st_uid
        above = path.parent.stat()
        if os.geteuid() != 0 or owner == 0 or not above.st_mode & stat.S_ISVTX or above.st_uid != 0:
            return
        aside = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
        path.rename(aside)
    except OSError:
        return  # `_claim` says what is wrong.
    _logger.warning("%s belonged to the user %s, and is %s now; look at it and remove it", path, owner, aside.name)


def _claim(path: Path) -> None:
    """Creates a directory, or corrects its mode. :raises DirectoryError: when the daemon can't use it."""
    try:
        warnings = check_way_to(path)
        corrected = make_own_directory(path)
        # Another user may have created a missing parent meanwhile.
        warnings = list(dict.fromkeys([*warnings, *check_way_to(path)]))
        if corrected is not None:
            warnings.append(corrected)
    except UnsafeDirectory as error:
        raise DirectoryError(str(error)) from None
    except OSError as error:
        raise DirectoryError(f"{path} can't be created: {error.strerror}; choose another one, or run as root") from None
    for warning in warnings:
        _logger.warning("%s", warning)
    if not os.access(path, os.W_OK | os.X_OK):
        raise DirectoryError(f"{path} can't be written to; choose another one, or run as root")


def remove(settings: Settings) -> None:
    """Removes what an ephemeral daemon created, and its directories unless they contain other files. The cache
    stays."""
    shutil.rmtree(memory_dir(settings), ignore_errors=True)
    with suppress(OSError):
        # Its secrets go with its state.
        (key_dir(settings) / _SECRETS_KEY).unlink()
        key_dir(settings).rmdir()
    for directory, made in ((settings.runtime_dir, _IN_RUNTIME), (settings.state_dir, _IN_STATE)):
        # The marker goes last, so that the next ephemeral daemon removes what is left.
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
                _logger.warning(
                    "%s is kept, as it contains %s, which this daemon did not create", directory, first_few(left)
                )
