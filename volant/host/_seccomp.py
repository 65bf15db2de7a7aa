"""Builds the seccomp filter of a sandbox; see `docs/explanation/sandbox.md`.

A filter sees the number of a system call and its arguments, not the memory that they point to. Rules apply in order; a
call that matches none is allowed. Rejected: libseccomp, whose Python bindings Debian does not package for each Python
version, for a program of one loop.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's ids of processor types."""
_X32 = 0x40000000
"""On x86-64, system calls from this number on are variants of the same names."""
_NUMBERS = {
    "x86_64": {
        "open": 2, "connect": 42, "socket": 41, "socketpair": 53, "sendto": 44, "sendmsg": 46, "sendmmsg": 307,
        "mkdir": 83, "creat": 85, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "setgroups": 116,
        "setresuid": 117, "setresgid": 119, "mknod": 133, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
        "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "openat": 257, "mkdirat": 258, "mknodat": 259,
        "fchownat": 260, "fchmodat": 268, "fallocate": 285,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "mknodat": 33, "mkdirat": 34, "fallocate": 47, "fchmod": 52, "fchmodat": 53, "fchownat": 54, "fchown": 55,
        "openat": 56, "setresuid": 147, "setresgid": 149, "setgroups": 159, "socket": 198, "socketpair": 199,
        "connect": 203, "sendto": 206, "sendmsg": 211, "sendmmsg": 269,
    },
}  # fmt: skip
_EVERYWHERE = {"io_uring_setup": 425, "openat2": 437, "fchmodat2": 452}
_machine = platform.machine()
NUMBERS = _NUMBERS[_machine] | _EVERYWHERE if _machine in _NUMBERS else {}
"""The system calls of this processor type that a sandbox needs; empty if it is unknown."""

CHMOD = ("chmod", "fchmodat", "fchmodat2")
CHOWN = ("chown", "fchown", "lchown", "fchownat")
XATTR = ("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr")
"""System calls that change attributes of a file. Like those above and fchmod, Landlock allows them for processes of the
same user."""
MODES = {
    "chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "open": 2, "creat": 1, "openat": 3, "mkdir": 1,
    "mkdirat": 2, "mknod": 1, "mknodat": 2,
}  # fmt: skip
"""System calls that set the mode of a file or directory, with the number of the mode argument."""
MSG_FASTOPEN = 0x20000000
_SOCK_TYPE_MASK = 0xF
_PUNCH_HOLE = 0x02
_IP = (socket.AF_INET, socket.AF_INET6)
_ALL = 0xFFFFFFFF


class Condition(NamedTuple):
    """Compares the low half of an argument, with only the bits of `mask`."""

    argument: int
    mask: int
    value: int
    equal: bool = True


class Rule(NamedTuple):
    """The result of system calls whose arguments meet all conditions."""

    calls: Sequence[str]
    error: int = errno.EPERM
    """The error; with 0, the call has no effect, but reports success."""
    conditions: tuple[Condition, ...] = ()


SET_ID = [
    Rule((call,), conditions=(Condition(argument, stat.S_ISUID | stat.S_ISGID, 0, equal=False),))
    for call, argument in MODES.items()
]
"""Forbids set-user-id and set-group-id bits on files."""
NO_FAST_OPEN = [
    Rule(("sendto", "sendmmsg"), conditions=(Condition(3, MSG_FASTOPEN, MSG_FASTOPEN),)),
    Rule(("sendmsg",), conditions=(Condition(2, MSG_FASTOPEN, MSG_FASTOPEN),)),
]
"""Forbids sending that connects, about which Landlock is not asked (Linux 6.12)."""
_OTHER_TYPE = Condition(1, _SOCK_TYPE_MASK, socket.SOCK_STREAM, equal=False)
NO_CONNECT = [
    Rule(("connect",)),
    # Datagrams need no connection. A Unix socket of the type SOCK_RAW sends datagrams, too.
    Rule(("socket", "socketpair"), conditions=(Condition(0, _ALL, socket.AF_UNIX, equal=False),)),
    Rule(("socket", "socketpair"), conditions=(_OTHER_TYPE,)),
]
"""Allows only streams over Unix sockets to which others connect."""
_OTHER_PROTOCOL = tuple(Condition(2, _ALL, each, equal=False) for each in (0, socket.IPPROTO_TCP))
ONLY_TCP = [
    # Programs ask by netlink which addresses the host has.
    Rule(("socket",), conditions=tuple(Condition(0, _ALL, each, equal=False) for each in (*_IP, socket.AF_NETLINK))),
    *(Rule(("socket",), conditions=(Condition(0, _ALL, each), _OTHER_TYPE)) for each in _IP),
    *(Rule(("socket",), conditions=(Condition(0, _ALL, each), *_OTHER_PROTOCOL)) for each in _IP),
]
"""Forbids Unix sockets, datagrams, and other streams than TCP, as Landlock does not see those of Multipath TCP."""
NO_RESERVATION = [Rule(("fallocate",), errno.EOPNOTSUPP, (Condition(1, _PUNCH_HOLE, _PUNCH_HOLE, equal=False),))]
"""Forbids reserving space for files beyond their ends, where it is not visible, but allows punching holes. Programs
then write zeros instead."""


def install(rules: Sequence[Rule]) -> None:
    """Applies rules permanently to this thread and its children. Calls of another architecture fail with EPERM. Raises
    OSError."""
    program = b"".join(struct.pack("=HBBI", *each) for each in _assembled(rules))
    held = ctypes.create_string_buffer(program, len(program))
    # The pointer is aligned as a C compiler does it, after the number and a gap.
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), head, ctypes.c_ulong(0), ctypes.c_ulong(0)):
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def _assembled(rules: Sequence[Rule]) -> Iterator[tuple[int, int, int, int]]:
    """Yields the instructions: operation, jump if true, jump if false, operand."""
    load, mask, jump_equal, jump_at_least, give = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, fail = 0x7FFF0000, 0x00050000
    number, architecture, arguments = 0, 4, 16
    yield load, 0, 0, architecture
    yield jump_equal, 1, 0, _AUDIT[_machine]
    yield give, 0, 0, fail | errno.EPERM
    yield load, 0, 0, number
    yield jump_at_least, 0, 1, _X32
    yield give, 0, 0, fail | errno.EPERM
    for rule in rules:
        for call in filter(NUMBERS.__contains__, rule.calls):
            yield load, 0, 0, number
            yield jump_equal, 0, 3 * len(rule.conditions) + 1, NUMBERS[call]
            for left, condition in zip(range(len(rule.conditions), 0, -1), rule.conditions, strict=True):
                # To the next call.
                skip = 3 * left - 2
                yield load, 0, 0, arguments + 8 * condition.argument
                yield mask, 0, 0, condition.mask
                yield jump_equal, 0 if condition.equal else skip, skip if condition.equal else 0, condition.value
            yield give, 0, 0, fail | rule.error
    yield give, 0, 0, allow
