"""Starts a process in a sandbox; see `docs/explanation/sandbox.md`.

On Linux credentials, capabilities, Landlock rules and seccomp filters belong to a thread, and a forked process inherits
them. So a thread of its own enters the sandbox, starts the process and ends; the other threads keep their rights. The C
library applies `setuid` and the like to all threads, so this module makes the system calls itself. Rejected: code of
ours between `fork` and `exec` (Python may not run there in a program with threads), and a launcher program (see the
document).

POSIX ACLs are written in the kernel's format, as Python has no call for them.
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
from typing import Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

READ, WRITE, EXECUTE = 4, 2, 1

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CLONE_FS = 0x200
_CAPABILITIES = 64
"""More than there are."""
NEEDED_CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_SYS_PTRACE": 19}
"""What it takes to give a process a user of its own, and to end it and look into it afterwards."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Machine(NamedTuple):
    """Numbers of system calls, and of the processor they are for."""

    audit: int
    connect: int
    setgroups: int
    setresuid: int
    setresgid: int
    rights: tuple[int, ...]
    """Change whose a file is and who may use it, which Landlock leaves to whoever has the same user: chmod, chown,
    setxattr, removexattr and the like."""


_IO_URING_SETUP, _FCHMODAT2 = 425, 452
"""The same everywhere. A ring does what the filter can't see."""
_MACHINES = {
    "x86_64": _Machine(
        0xC000003E, 42, 116, 117, 119, (90, 91, 268, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199, _FCHMODAT2)
    ),
    "aarch64": _Machine(0xC00000B7, 203, 159, 147, 149, (52, 53, 54, 55, 5, 6, 7, 14, 15, 16, _FCHMODAT2)),
}
_machine = _MACHINES.get(platform.machine())
_X32 = 0x40000000


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may, beside what every program must: run what is installed, and use its working directory, in
    which it can make sockets and use what there is."""

    user: int | None = None
    """Its user and its group; None: those of who starts it."""
    groups: tuple[int, ...] = ()
    """Others that it is in, if it has a user of its own."""
    landlock: bool = False
    """Whether it is kept to the files that are named here, from TCP, and from what runs outside."""
    read: tuple[Path, ...] = ()
    """Files, and directories with all in them."""
    write: tuple[Path, ...] = ()
    """Files that it may read and change; devices among them."""
    no_connect: bool = False
    """Whether it connects to nobody: others connect to it."""


class Grant(msgspec.Struct, frozen=True):
    """Who may use a file beside its owner; nobody else may from then on."""

    path: Path
    who: Literal["user", "group", "others"]
    id: int
    """Of the user or the group."""
    access: int
    """`READ`, `WRITE` and `EXECUTE`, added."""


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
"""Where programs and their libraries lie."""
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


def landlock_version() -> int:
    """Which Landlock the kernel has; 0: none."""
    version: int = _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    return max(0, version)


def can_have_users() -> bool:
    """Whether this kind of processor is known here."""
    return _machine is not None


def has_filter() -> bool:
    """Whether `no_connect` does something here."""
    return _machine is not None


def capabilities() -> int:
    """Those that this thread can use, a bit each."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def start(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    output: int,
    sandbox: Sandbox,
    descriptors: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a process in a sandbox, in a session of its own, without input or core dumps, and with `descriptors`.

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

        def start_sandboxed() -> subprocess.Popen[bytes]:
            _enter(sandbox, place, rules)
            popen = subprocess.Popen(
                argv, stdin=null, stdout=output, stderr=output, env=dict(env), close_fds=True,
                pass_fds=descriptors, start_new_session=True,
            )  # fmt: skip
            # From here, as it takes the same user. Without this bound all the others stand, and the process is there.
            with suppress(OSError):
                resource.prlimit(popen.pid, resource.RLIMIT_CORE, (0, 0))
            return popen

        return in_own_thread(start_sandboxed, "sandbox")


def in_own_thread(work: Callable[[], T], name: str) -> T:
    """Returns what `work` gives, done in a thread that ends with it: the rights that it gives up are nobody else's.

    Waits for it. Raises what `work` raises.
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
    """Let this thread use files as another user can, and no better, until it ends. Raises OSError."""
    if _machine is None:
        raise OSError(errno.ENOSYS, f"no other user can be acted for on {platform.machine()}")
    numbers = (ctypes.c_uint32 * len(groups))(*groups)
    _syscall(_machine.setgroups, len(groups), ctypes.byref(numbers))
    # Neither tells whether it was done (setfsuid(2)); asked for none that there can be, they tell what is so now.
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
        # What an ordinary user starts gets none of them anyway.
        if has and (os.geteuid() == 0 or capabilities() >> NEEDED_CAPABILITIES["CAP_SETPCAP"] & 1):
            _prctl(_PR_CAPBSET_DROP, capability)


def opened_ruleset(sandbox: Sandbox, place: int, open_files: ExitStack) -> int:
    """Landlock's rules for them, as a descriptor. Raises OSError."""
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
    """Let these system calls, and those of another kind of program, fail with EPERM from now on."""
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
    # The pointer lies where a C compiler puts it, after the number and a gap.
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


# Access lists: see acl(5), and posix_acl_xattr.h of the kernel

_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
_VERSION = 2
_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NOBODY = 0xFFFFFFFF
_STICKY = 0o1000


def grant(grants: Sequence[Grant], below: Sequence[Path]) -> None:
    """Let them use files; of the directories above a file those that lie in one of `below`, or are it, let everybody
    through. Follows no link. Raises OSError."""
    for each in grants:
        if each.who == "others":
            _add_mode(each.path, each.access)
        else:
            owner = os.lstat(each.path).st_mode >> 6 & 7
            entry = (_USER if each.who == "user" else _GROUP, each.id, each.access)
            _set(each.path, _ACCESS, owner, [entry], each.access)
        for parent in each.path.parents:
            if not any(parent.is_relative_to(place) for place in below):
                break
            _add_mode(parent, EXECUTE)


def lend_directory(path: Path, user: int) -> None:
    """Let a user make files in a directory of ours that we can use, too, and touch none of ours there."""
    path.chmod(_STICKY | 0o700)
    _set(path, _ACCESS, 7, [(_USER, user, 7)], 7)
    _set(path, _DEFAULT, 7, [(_USER, os.geteuid(), 7)], 7)


def takes_access_lists(directory: Path) -> bool:
    """Whether files there can have them, as far as that can be found out: not on a disk that is full."""
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


def way_to(path: Path) -> Path | None:
    """The first directory on the way to `path`, and not of it, through which not everybody comes; None: there is none.
    Raises OSError."""
    # By both names, as a link may lead on from somewhere else.
    for parent in dict.fromkeys([*reversed(path.parents), *reversed(path.resolve().parents)]):
        if not parent.stat().st_mode & EXECUTE:
            return parent
    return None
