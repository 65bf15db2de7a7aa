"""Starts a process in a sandbox; see `docs/explanation/sandbox.md`.

On Linux credentials, capabilities, Landlock rules and seccomp filters belong to a thread, and a forked process inherits
them. So a separate thread enters the sandbox, starts the process and ends; the other threads keep their rights. The C
library applies `setuid` and the like to all threads, so this module makes the system calls itself. Rejected: Python
code between `fork` and `exec`, which must not run there in a program with threads, and a launcher program (see the
document).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from . import _seccomp
from ._procfs import own_capabilities

T = TypeVar("T")

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CLONE_FS = 0x200
_CAPSET_VERSION = 0x20080522
_CAPABILITIES = 64
"""More than the number of the kernel's capabilities."""
NEEDED_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_SYS_PTRACE": 19}
"""Needed to run a process as a separate user, and to end and inspect it afterwards."""

_NOBODY = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """The rights of a process, besides installed programs and its working directory, where it can create sockets and
    use existing files."""

    user: int | None = None
    """Its user; None for the daemon's."""
    group: int | None = None
    """Its group, if it has a separate user; None for the group with the user's number."""
    groups: tuple[int, ...] = ()
    """Further groups, if it has a separate user."""
    landlock: bool = False
    """Whether Landlock restricts it to the files below, and blocks TCP and processes outside."""
    read: tuple[Path, ...] = ()
    """Files that it may read, and directories including their content."""
    write: tuple[Path, ...] = ()
    """Files and devices that it may read and change."""
    make: tuple[Path, ...] = ()
    """Directories in which it may create, change and remove regular files."""
    trees: tuple[Path, ...] = ()
    """Directories in which it may also create, move and remove directories. It may then change the mode of files that
    it has open."""
    shared: tuple[Path, ...] = ()
    """Directories in which it may do everything with files, directories, links and modes, except create devices and
    programs with set-user-id or set-group-id bits."""
    modes: bool = False
    """Whether it may change the mode of all files that its user owns. A change of owner then succeeds without effect:
    programs that unpack archives try to give directories to root."""
    tcp: tuple[int, ...] = ()
    """The ports to which it may connect by TCP; if there are any, it may use no other sockets."""
    no_connect: bool = False
    """Whether it may only use inherited sockets, and streams over Unix sockets to which others connect."""
    no_reservation: bool = False
    """Whether it may not reserve space for files, which could be beyond their ends."""


# Landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FS_REMOVE_DIR, _FS_REMOVE_FILE, _FS_MAKE_DIR, _FS_MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_FS_MAKE_SOCK, _FS_MAKE_FIFO, _FS_MAKE_SYM, _FS_REFER = 1 << 9, 1 << 10, 1 << 12, 1 << 13
_FS_TRUNCATE, _FS_IOCTL_DEV = 1 << 14, 1 << 15
TREES_SINCE = 2
"""The version of Landlock that allows moving files to another directory."""
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NOW = 16
_OF_FILES = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
_OF_PATH, _OF_PORT = 1, 2
_TCP, _TCP_CONNECT, _TCP_SINCE = 0b11, 0b10, 4
_SCOPED, _SCOPED_SINCE = 0b11, 6
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
"""Directories and files with installed programs and their libraries."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def landlock_version() -> int:
    """Returns the kernel's version of Landlock; 0 for none."""
    version: int = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def is_known_machine() -> bool:
    """Returns whether the system calls of this processor type are known, for `user` and `no_connect`."""
    return bool(_seccomp.NUMBERS)


def start_sandboxed(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    output: int,
    sandbox: Sandbox,
    descriptors: Sequence[int] = (),
    stdin: int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts a process in a sandbox, in its own session, without core dumps, and with `descriptors`. `stdin` is its
    input; None for none.

    :raises OSError: the sandbox can't be set up completely, or the program can't be started; no process is left.
    """
    if sandbox.user is not None and not _seccomp.NUMBERS:
        raise OSError(errno.ENOSYS, f"no users can be given on {platform.machine()}")
    with ExitStack() as open_files:

        def opened(path: Path | str, flags: int) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            open_files.callback(os.close, fd)
            return fd

        place = opened(cwd, os.O_PATH | os.O_DIRECTORY)
        null = opened("/dev/null", os.O_RDONLY)
        rules = opened_ruleset(sandbox, place, open_files) if sandbox.landlock else None

        def start() -> subprocess.Popen[bytes]:
            _enter(sandbox, place, rules)
            popen = subprocess.Popen(
                argv, stdin=null if stdin is None else stdin, stdout=output, stderr=output, env=dict(env),
                close_fds=True, pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
            # In this thread, as it takes the same user. The other limits of the sandbox hold without this one.
            with suppress(OSError):
                resource.prlimit(popen.pid, resource.RLIMIT_CORE, (0, 0))
            return popen

        return _in_own_thread(start, "sandbox")


def confine_self(sandbox: Sandbox, cwd: Path) -> None:
    """Confines the calling process permanently, which must have one thread, and enters a directory.

    :raises OSError: the sandbox can't be set up completely; a part of it may be
    """
    if sandbox.user is not None and not _seccomp.NUMBERS:
        raise OSError(errno.ENOSYS, f"no users can be given on {platform.machine()}")
    with ExitStack() as open_files:
        place = os.open(cwd, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        open_files.callback(os.close, place)
        rules = opened_ruleset(sandbox, place, open_files) if sandbox.landlock else None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _enter(sandbox, place, rules)
        # There is no exec that would take them away.
        _check(_libc.capset(struct.pack("=Ii", _CAPSET_VERSION, 0), bytes(24)), "capset")


def _in_own_thread(work: Callable[[], T], name: str) -> T:
    """Runs `work` in a separate thread, which gives up only its own rights, and waits for it.

    Raises the errors of `work`.
    """
    done: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return done[0]


def as_user(user: int | None, work: Callable[[], T]) -> T:
    """Returns the result of `work`, which uses files with the rights of a user and the group of that number; with None,
    of the daemon. Blocks. Raises OSError, and the errors of `work`."""
    if user is None:
        return work()

    def run() -> T:
        if not _seccomp.NUMBERS:
            raise OSError(errno.ENOSYS, f"no other user can be acted for on {platform.machine()}")
        _syscall(_seccomp.NUMBERS["setgroups"], 0, None)
        # Neither call reports failure (setfsuid(2)); asked for an impossible user, they return the current one.
        number, nobody = ctypes.c_uint32(user), ctypes.c_uint32(_NOBODY)
        _libc.setfsgid(number)
        _libc.setfsuid(number)
        if (_libc.setfsuid(nobody) & _NOBODY, _libc.setfsgid(nobody) & _NOBODY) != (user, user):
            raise OSError(errno.EPERM, f"user {user} can't be acted for")
        return work()

    return _in_own_thread(run, "as another user")


def _enter(sandbox: Sandbox, place: int, rules: int | None) -> None:
    """Drops, in this thread, all rights that are not in `sandbox`. The order matters: steps need rights that later ones
    drop."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # Working directory and umask are then this thread's alone.
    _check(_libc.unshare(_CLONE_FS), "unshare")
    os.fchdir(place)
    os.umask(0o007 if sandbox.user is not None else 0o077)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _drop_capabilities()
    if rules is not None:
        _syscall(_RESTRICT_SELF, rules, 0)
    if sandbox.user is not None:
        groups = (ctypes.c_uint32 * len(sandbox.groups))(*sandbox.groups)
        _syscall(_seccomp.NUMBERS["setgroups"], len(sandbox.groups), ctypes.byref(groups))
        _syscall(_seccomp.NUMBERS["setresgid"], *[sandbox.user if sandbox.group is None else sandbox.group] * 3)
        _syscall(_seccomp.NUMBERS["setresuid"], *[sandbox.user] * 3)
    if _seccomp.NUMBERS:
        _seccomp.install(_rules(sandbox))


def _rules(sandbox: Sandbox) -> list[_seccomp.Rule]:
    """Returns the system calls that a sandbox denies."""
    denied: list[str] = [*_seccomp.XATTR, "io_uring_setup"]
    rules: list[_seccomp.Rule] = []
    if sandbox.shared:
        # The filter can't see its mode.
        denied.append("openat2")
        rules += _seccomp.SET_ID
    elif not sandbox.modes:
        denied += _seccomp.CHMOD if sandbox.trees else (*_seccomp.CHMOD, "fchmod")
    if sandbox.modes:
        rules.append(_seccomp.Rule(_seccomp.CHOWN, 0))
    else:
        denied += _seccomp.CHOWN
    if sandbox.no_connect:
        rules += _seccomp.NO_CONNECT
    if sandbox.tcp:
        rules += _seccomp.ONLY_TCP
    rules += _seccomp.NO_FAST_OPEN
    if sandbox.no_reservation:
        rules += _seccomp.NO_RESERVATION
    return [_seccomp.Rule(denied), *rules]


def _drop_capabilities() -> None:
    for capability in range(_CAPABILITIES):
        has = _libc.prctl(_PR_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0)
        if has < 0:
            return
        # A process of an ordinary user gets none of them anyway.
        if has and (os.geteuid() == 0 or own_capabilities() >> NEEDED_CAPABILITIES["CAP_SETPCAP"] & 1):
            _prctl(_PR_CAPBSET_DROP, capability)


def opened_ruleset(sandbox: Sandbox, place: int, open_files: ExitStack) -> int:
    """Returns Landlock's rules for a sandbox, as a descriptor. Raises OSError."""
    version = landlock_version()
    if not version:
        raise OSError(errno.EOPNOTSUPP, "the kernel has no Landlock")
    known = (1 << _FS_BITS.get(version, _FS_BITS_NOW)) - 1
    attributes = struct.pack("=QQQ", known, _TCP, _SCOPED if version >= _SCOPED_SINCE else 0)
    attributes = attributes[: 24 if version >= _SCOPED_SINCE else 16 if version >= _TCP_SINCE else 8]
    rules = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    open_files.callback(os.close, rules)

    def allow(fd: int, rights: int) -> None:
        rule = struct.pack("=Qi", rights & known, fd)
        _syscall(_ADD_RULE, rules, _OF_PATH, rule, 0)

    def allow_path(path: Path | str, rights: int, *, must_be: bool) -> None:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            if must_be:
                raise
            return
        try:
            is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
            allow(fd, rights if is_directory else rights & _OF_FILES)
        finally:
            os.close(fd)

    use = _FS_READ_FILE | _FS_READ_DIR
    change = _FS_READ_FILE | _FS_WRITE_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
    make = use | change | _FS_MAKE_REG | _FS_REMOVE_FILE
    allow(place, use | _FS_WRITE_FILE | _FS_TRUNCATE | _FS_MAKE_SOCK)
    for system in _SYSTEM:
        allow_path(system, use | _FS_EXECUTE, must_be=False)
    for device in _DEVICES:
        allow_path(device, change, must_be=False)
    for path in sandbox.read:
        allow_path(path, use, must_be=True)
    for path in sandbox.write:
        allow_path(path, change, must_be=True)
    for path in sandbox.make:
        allow_path(path, make, must_be=True)
    for path in sandbox.trees:
        allow_path(path, make | _FS_MAKE_DIR | _FS_REMOVE_DIR | _FS_REFER, must_be=True)
    everything = make | _FS_MAKE_DIR | _FS_REMOVE_DIR | _FS_REFER | _FS_MAKE_SYM | _FS_MAKE_FIFO | _FS_MAKE_SOCK
    for path in sandbox.shared:
        allow_path(path, everything, must_be=True)
    if version >= _TCP_SINCE:
        for port in sandbox.tcp:
            _syscall(_ADD_RULE, rules, _OF_PORT, struct.pack("=QQ", _TCP_CONNECT, port), 0)
    return rules


def _prctl(option: int, value: int, more: int | bytes = 0) -> None:
    third = ctypes.c_char_p(more) if isinstance(more, bytes) else ctypes.c_ulong(more)
    _check(_libc.prctl(option, ctypes.c_ulong(value), third, ctypes.c_ulong(0), ctypes.c_ulong(0)), "prctl")


def _syscall(number: int, *arguments: object) -> int:
    as_they_are = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *as_they_are), f"system call {number}")


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
