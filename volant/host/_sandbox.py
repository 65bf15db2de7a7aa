"""Starts a process in a sandbox; see `docs/explanation/sandbox.md`.

On Linux credentials, capabilities, Landlock rules and seccomp filters belong to a thread, and a forked process inherits
them. So a thread of its own enters the sandbox, starts the process and ends; the other threads keep their rights. The C
library applies `setuid` and the like to all threads, so this module makes the system calls itself. Rejected: code of
ours between `fork` and `exec` (Python may not run there in a program with threads), and a launcher program (see the
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from ._procfs import own_capabilities

T = TypeVar("T")

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CLONE_FS = 0x200
_CAPABILITIES = 64
"""More than the kernel has."""
NEEDED_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_SYS_PTRACE": 19}
"""Needed to give a process a user of its own, and to end and inspect it afterwards."""

_NOBODY = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)


class _Machine(NamedTuple):
    """Numbers of system calls of one kind of processor, and its audit architecture."""

    audit: int
    connect: int
    setgroups: int
    setresuid: int
    setresgid: int
    rights: tuple[int, ...]
    """Change owner and mode of a file, which Landlock leaves to processes of the same user: chmod, chown, setxattr,
    removexattr and the like."""


_IO_URING_SETUP, _FCHMODAT2 = 425, 452
"""The same on all processors. The filter can't see what io_uring does."""
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E, 42, 116, 117, 119, (90, 91, 268, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, _FCHMODAT2)
    ),
    "aarch64": _Machine(0xC00000B7, 203, 159, 147, 149, (52, 53, 54, 55, 5, 6, 7, 14, 15, 16, _FCHMODAT2)),
}
_machine = _MACHINES.get(platform.machine())
_X32 = 0x40000000


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may use, beside installed programs and its working directory, where it can make sockets and use
    existing files."""

    user: int | None = None
    """Its user and its group; None: the daemon's."""
    groups: tuple[int, ...] = ()
    """Further groups, if it has a user of its own."""
    landlock: bool = False
    """Whether Landlock restricts it to the files named here, and keeps it from TCP and from processes outside."""
    read: tuple[Path, ...] = ()
    """Files that it may read, and directories with all in them."""
    write: tuple[Path, ...] = ()
    """Files and devices that it may read and change."""
    no_connect: bool = False
    """Whether it may not connect to sockets; others connect to it."""


# Landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_FS_MAKE_SOCK, _FS_TRUNCATE, _FS_IOCTL_DEV = 1 << 9, 1 << 14, 1 << 15
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15}
_FS_BITS_NOW = 16
_OF_FILES = _FS_EXECUTE | _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE | _FS_IOCTL_DEV
_NO_TCP, _TCP_SINCE = 0b11, 4
_SCOPED, _SCOPED_SINCE = 0b11, 6
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/gnu/store", "/etc/ld.so.cache")
"""Installed programs and their libraries."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def landlock_version() -> int:
    """Returns the kernel's version of Landlock; 0: none."""
    version: int = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def is_known_machine() -> bool:
    """Whether the system calls of this kind of processor are known, for `user` and `no_connect`."""
    return _machine is not None


def start_sandboxed(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    output: int,
    sandbox: Sandbox,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Starts a process in a sandbox, in a session of its own, without input or core dumps, and with `descriptors`.

    :raises OSError: when the sandbox can't be set up completely, or the program can't be started; no process is left.
    """
    if sandbox.user is not None and _machine is None:
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
                argv, stdin=null, stdout=output, stderr=output, env=dict(env), close_fds=True,
                pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
            # In this thread, as it takes the same user. The other limits of the sandbox hold without this one.
            with suppress(OSError):
                resource.prlimit(popen.pid, resource.RLIMIT_CORE, (0, 0))
            return popen

        return in_own_thread(start, "sandbox")


def in_own_thread(work: Callable[[], T], name: str) -> T:
    """Runs `work` in a thread of its own, which gives up its rights for itself alone, and waits for it.

    Raises what `work` raises.
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


def act_for(user: int, group: int, groups: Sequence[int]) -> None:
    """Lets this thread use files with the rights of another user until it ends. Raises OSError."""
    if _machine is None:
        raise OSError(errno.ENOSYS, f"no other user can be acted for on {platform.machine()}")
    numbers = (ctypes.c_uint32 * len(groups))(*groups)
    _syscall(_machine.setgroups, len(groups), ctypes.byref(numbers))
    # Neither call reports failure (setfsuid(2)); asked for an impossible user, they return the current one.
    _libc.setfsgid(ctypes.c_uint32(group))
    _libc.setfsuid(ctypes.c_uint32(user))
    nobody = ctypes.c_uint32(_NOBODY)
    if (_libc.setfsuid(nobody) & _NOBODY, _libc.setfsgid(nobody) & _NOBODY) != (user, group):
        raise OSError(errno.EPERM, f"user {user} can't be acted for")


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
        assert _machine is not None
        groups = (ctypes.c_uint32 * len(sandbox.groups))(*sandbox.groups)
        _syscall(_machine.setgroups, len(sandbox.groups), ctypes.byref(groups))
        _syscall(_machine.setresgid, *[sandbox.user] * 3)
        _syscall(_machine.setresuid, *[sandbox.user] * 3)
    if _machine is not None:
        _forbid(_machine, (*_machine.rights, _IO_URING_SETUP, *([_machine.connect] if sandbox.no_connect else [])))


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
    attributes = struct.pack(
        "=QQQ", known, _NO_TCP if version >= _TCP_SINCE else 0, _SCOPED if version >= _SCOPED_SINCE else 0
    )[: 24 if version >= _SCOPED_SINCE else 16 if version >= _TCP_SINCE else 8]
    rules = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    open_files.callback(os.close, rules)

    def allow(fd: int, rights: int) -> None:
        rule = struct.pack("=Qi", rights & known, fd)
        _syscall(_ADD_RULE, rules, 1, rule, 0)

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
    allow(place, use | _FS_WRITE_FILE | _FS_TRUNCATE | _FS_MAKE_SOCK)
    for system in _SYSTEM:
        allow_path(system, use | _FS_EXECUTE, must_be=False)
    for device in _DEVICES:
        allow_path(device, change, must_be=False)
    for path in sandbox.read:
        allow_path(path, use, must_be=True)
    for path in sandbox.write:
        allow_path(path, change, must_be=True)
    return rules


def _forbid(machine: _Machine, calls: Iterable[int]) -> None:
    """From now on, these system calls, and all of another architecture, fail with EPERM."""
    load, jump_equal, jump_at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    numbers = tuple(calls)
    body = [
        (load, 0, 0, 4),
        (jump_equal, 0, len(numbers) + 3, machine.audit),
        (load, 0, 0, 0),
        (jump_at_least, len(numbers) + 1, 0, _X32),
        *((jump_equal, len(numbers) - at, 0, number) for at, number in enumerate(numbers)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    program = b"".join(struct.pack("=HBBI", *each) for each in body)
    held = ctypes.create_string_buffer(program, len(program))
    # The pointer is aligned as a C compiler does it, after the number and a gap.
    head = struct.pack("@HP", len(body), ctypes.addressof(held))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, head)


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
