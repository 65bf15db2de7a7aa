"""The root directory of commands, files and workloads: the VM's root filesystem, otherwise the initramfs.

The agent is in the initramfs and needs nothing from the root filesystem, which may lack a shell, Python and libraries.
Clients use the programs and files of the root filesystem.

In Linux a root directory belongs to a thread once that thread calls `unshare(CLONE_FS)`. So `inside` runs a call in a
separate thread whose `/` is the root filesystem: the kernel resolves every path, link and program there. Such a call
can't import anything, as Python would search there too. Rejected: code between fork and exec (unsafe in a process with
threads), a `chroot` program in front of each command (a missing program looks like exit code 127), and building paths
(a link could lead to the agent's own files).

This is no isolation: a workload is root in its VM, and the VM is the boundary.
"""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import sys
import threading

from volant.model import agent

from ._http import Problem
from ._rootfs import ROOT, STATE_FILE
from ._system import kernel_parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypedDict, TypeVar

    T = TypeVar("T")

    class Identity(TypedDict):
        """The user and groups of a program; keywords of `subprocess.Popen`."""

        user: int
        group: int
        extra_groups: list[int]


_MAX_TABLE = 4 * 1024 * 1024
_NO_ID = 2**32 - 1

_known: tuple[str, str] | None = None


class NoSuchUser(Exception):
    """The root filesystem has no user or no group with that name."""


def state() -> tuple[str, str]:
    """Returns `none` (there is only the initramfs), `pending`, `mounted` or `failed`, and the reason of the failure."""
    global _known
    if _known is None:
        found, why = "none", ""
        if any(word.startswith(agent.ROOT_PARAMETER + "=") for word in kernel_parameters()):
            try:
                with open(STATE_FILE) as handle:
                    text = handle.read(4096)
            except OSError:
                return "pending", ""
            found, _, why = text.strip().partition(": ")
        _known = found, why
    return _known


def root() -> str:
    """Returns the root directory. :raises Problem: 503, the root filesystem is not mounted, or not yet."""
    found, why = state()
    if found == "pending":
        raise Problem(503, "the root filesystem is not mounted yet", headers=[("Retry-After", "1")])
    if found == "failed":
        raise Problem(503, f"the root filesystem can't be mounted: {why}")
    return ROOT if found == "mounted" else "/"


def figures() -> dict[str, int] | None:
    """Returns size and free space of the root filesystem in MiB; None without one."""
    if state()[0] != "mounted":
        return None
    found = os.statvfs(ROOT)
    return {
        "total_mb": found.f_blocks * found.f_frsize // 2**20,
        "available_mb": found.f_bavail * found.f_frsize // 2**20,
    }


def inside(call: Callable[[], T]) -> T:
    """Returns the result of `call()`, run with `root()` as `/` and working directory. Raises the errors of the call.

    :raises Problem: 503, the root filesystem is not mounted
    """
    where = root()
    if where == "/":
        return call()
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _enter(where)
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="inside")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _enter(where: str) -> None:
    if sys.version_info >= (3, 12):
        os.unshare(os.CLONE_FS)
        os.chroot(where)
        os.chdir("/")
    else:
        raise OSError("this Python can't give a thread a root directory of its own")


def identity(user: str) -> Identity:
    """Returns only the identity of an `account`, and raises the same errors."""
    return account(user)[0]


def account(user: str) -> tuple[Identity, str]:
    """Looks up `NAME`, `UID`, `NAME:GROUP` or `UID:GID` in `/etc/passwd` and `/etc/group` of the root filesystem.

    Returns the identity and the home directory, which is `/` for a number without a user.

    It does not use the C library, which would load libraries of the root filesystem for that (NSS).

    :raises NoSuchUser: there is no such user or group
    :raises Problem: 503, the root filesystem is not mounted
    """
    users, groups = inside(lambda: (_table("/etc/passwd"), _table("/etc/group")))
    name, colon, group = user.partition(":")
    if name.isdecimal():
        entry = next((row for row in users if row[2:3] == [name]), None)
        # A number without an entry has the group 0, as in containers.
        uid, gid = int(name), 0
        login = entry[0] if entry else ""
    else:
        entry = next((row for row in users if row[0] == name), None)
        if entry is None:
            raise NoSuchUser(user)
        uid = gid = _number(entry, 2, user)
        login = name
    if entry is not None:
        gid = _number(entry, 3, user)
    if colon:
        if group.isdecimal():
            gid = int(group)
        else:
            found = next((row for row in groups if row[0] == group), None)
            if found is None:
                raise NoSuchUser(user)
            gid = _number(found, 2, user)
    if uid >= _NO_ID or gid >= _NO_ID:
        raise NoSuchUser(user)
    others = [_number(row, 2, user) for row in groups if login and len(row) > 3 and login in row[3].split(",")]
    home = entry[5] if entry is not None and len(entry) > 5 and entry[5].startswith("/") else "/"
    return {"user": uid, "group": gid, "extra_groups": [] if colon else sorted(set(others))[:64]}, home.replace(
        "\0", ""
    )


def _table(path: str) -> list[list[str]]:
    try:
        # O_NONBLOCK: a FIFO in its place must not block.
        with open(
            os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), encoding="utf-8", errors="replace"
        ) as handle:
            return [line.split(":") for line in handle.read(_MAX_TABLE).splitlines() if ":" in line]
    except OSError:
        return []


def _number(row: list[str], at: int, user: str) -> int:
    if len(row) <= at or not row[at].isdecimal() or len(row[at]) > 10:
        raise NoSuchUser(user)
    return int(row[at])
