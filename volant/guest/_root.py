"""Where things act: the root filesystem that the VM was given, else the initramfs.

The agent lives in the initramfs and needs nothing of a root filesystem, which may have no shell, no Python and no
libraries that fit. What it does for others does act there: programs are started in it and files are found in it.

In Linux a root directory belongs to a thread as soon as that thread asks for it (`unshare(CLONE_FS)`). So `inside`
runs a call in a thread of its own whose `/` is the root filesystem: every path that the call opens, every symbolic link
that it follows and every program that it starts is found there, and nowhere else. Rejected: a function between fork
and exec (Python code in the child of a process with many threads), a `chroot` program in front of each command (nobody
could tell a program that is missing from one that ends with 127), and gluing paths together (a link in the root
filesystem would lead to the agent's own files).

A call that runs inside must import nothing: it would be looked for in there.

It is no wall. A workload is root in its VM, and the VM is the wall.
"""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import sys
import threading

from volant.model import agent

from ._http import Problem
from ._rootfs import ROOT, STATE_FILE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypedDict, TypeVar

    T = TypeVar("T")

    class Identity(TypedDict):
        """Whom a program runs as; keywords of `subprocess.Popen`."""

        user: int
        group: int
        extra_groups: list[int]


_MAX_TABLE = 4 * 1024 * 1024
_NO_ID = 2**32 - 1

_known: tuple[str, str] | None = None


class NoSuchUser(Exception):
    """The root has no user, or no group, of that name."""


def state() -> tuple[str, str]:
    """Return `none` (the initramfs is all there is), `pending`, `mounted` or `failed`, and why it failed."""
    global _known
    if _known is None:
        found, why = "none", ""
        if agent.ROOT_PARAMETER in _parameters():
            try:
                with open(STATE_FILE) as handle:
                    text = handle.read(4096)
            except OSError:
                # It will be there soon.
                return "pending", ""
            found, _, why = text.strip().partition(": ")
        _known = found, why
    return _known


def root() -> str:
    """Return the directory in which things act; :raises Problem: 503, it is not there (yet)."""
    found, why = state()
    if found == "pending":
        raise Problem(503, "the root filesystem is not mounted yet", headers=[("Retry-After", "1")])
    if found == "failed":
        raise Problem(503, f"the root filesystem can't be mounted: {why}")
    return ROOT if found == "mounted" else "/"


def figures() -> dict[str, int] | None:
    """Return how large the root filesystem is and what of it is free, in MiB; None without one."""
    if state()[0] != "mounted":
        return None
    found = os.statvfs(ROOT)
    return {
        "total_mb": found.f_blocks * found.f_frsize // 2**20,
        "available_mb": found.f_bavail * found.f_frsize // 2**20,
    }


def inside(call: Callable[[], T]) -> T:
    """Return what `call()` returns, with `root()` as its `/` and its working directory.

    :raises Problem: 503, the root filesystem is not there; else whatever the call raises
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
    """Return whom `NAME`, `UID`, `NAME:GROUP` or `UID:GID` means, by the root's own `/etc/passwd` and `/etc/group`.

    They are read here and not by the C library, which would load the root filesystem's own modules for that.

    :raises NoSuchUser: nobody
    :raises Problem: 503, the root filesystem is not there
    """
    users, groups = inside(lambda: (_table("/etc/passwd"), _table("/etc/group")))
    name, colon, group = user.partition(":")
    if name.isdecimal():
        entry = next((row for row in users if row[2:3] == [name]), None)
        uid = gid = int(name)
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
    return {"user": uid, "group": gid, "extra_groups": [] if colon else sorted(set(others))[:64]}


def _table(path: str) -> list[list[str]]:
    try:
        # A pipe in its place would be waited for.
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


def _parameters() -> list[str]:
    """Return the names of the kernel's parameters."""
    try:
        with open("/proc/cmdline") as handle:
            return [word.partition("=")[0] for word in handle.read(65536).split()]
    except OSError:
        return []
