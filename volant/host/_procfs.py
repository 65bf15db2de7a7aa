"""Reads `/proc/<pid>`. The functions raise OSError or ValueError if the process has ended."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple


class ProcessGone(Exception):
    """There is no process with this identity (any more)."""


PROC = Path("/proc")
_TOKENS = re.compile(rb"[\0,=]")
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None)


class Stat(NamedTuple):
    """Fields of /proc/<pid>/stat."""

    start_time: int
    """The start time in clock ticks since the boot."""
    session: int
    state: str

    @property
    def is_dead(self) -> bool:
        return self.state in "ZX"


def raise_shortage(error: OSError | ValueError) -> None:
    """Raises the error again if it only means that the host has no descriptor or memory left to inspect a process. A
    process that is mistaken for ended would be started a second time."""
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        raise error


@contextmanager
def as_user_of(pid: int) -> Iterator[None]:
    """Lets this thread open files with the rights of a process's user, if the daemon may act for that user. The block
    must not await anything."""
    figures = (PROC / str(pid)).stat()
    _libc.setfsgid(figures.st_gid)
    _libc.setfsuid(figures.st_uid)
    try:
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def pids() -> list[int]:
    """Returns the number of every process."""
    with os.scandir(PROC) as entries:
        return [int(entry.name) for entry in entries if entry.name.isdigit()]


def stat(pid: int) -> Stat:
    # The second field is the name in brackets, which may hold spaces and brackets itself.
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return Stat(int(fields[19]), int(fields[3]), fields[0])


def status(pid: int | str) -> dict[str, list[str]]:
    """Returns the values of /proc/<pid>/status by their names. `pid` may be `thread-self`."""
    lines = (PROC / str(pid) / "status").read_text().splitlines()
    fields = {name: text.split() for name, _, text in (line.partition(":") for line in lines)}
    if "Uid" not in fields:
        raise ValueError(f"the kernel says nothing about process {pid}")
    return fields


def own_capabilities() -> int:
    """Returns the effective capabilities of this thread, one bit each."""
    return int(status("thread-self")["CapEff"][0], 16)


def wakeups(pid: int) -> int:
    """Returns how often the threads of a process have waited for something and were woken."""
    total = 0
    for thread in (PROC / str(pid) / "task").iterdir():
        # A thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            total += int(status(f"{pid}/task/{thread.name}")["voluntary_ctxt_switches"][0])
    return total


class Usage(NamedTuple):
    """The resource use of a process since its start, and its resident memory."""

    cpu_s: float
    rss_kb: int
    read_bytes: int
    """Bytes read from disks, without reads from the page cache."""
    written_bytes: int


def usage(pid: int) -> Usage:
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    moved = dict(line.split(": ") for line in (PROC / str(pid) / "io").read_text().splitlines())
    return Usage(
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS,
        rss_kb=int(fields[21]) * _PAGE // 1024,
        read_bytes=int(moved["read_bytes"]),
        written_bytes=int(moved["write_bytes"]),
    )


def real_user(pid: int) -> int:
    """Returns the user that started a process. Its effective user proves nothing: any user can run a setuid program
    with arbitrary arguments."""
    return int(status(pid)["Uid"][0])


def command_line(pid: int) -> bytes:
    # A scan reads those of all processes, and making a Path takes longer than to read the file.
    with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:  # noqa: PTH123
        return file.read()


def tokens(command_line: bytes) -> list[str]:
    """Returns the arguments of a command line, and the pieces between `,` and `=` in them."""
    return [token.decode("utf-8", "surrogateescape") for token in _TOKENS.split(command_line) if token]
