"""The facet that gives sandboxed processes access to files, and reports which layers of a sandbox this host
supports."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from . import _access_lists, _procfs, _sandbox
from ._access_lists import Grant


class SandboxSupport(msgspec.Struct, frozen=True):
    """The layers of the sandbox that this host supports, and the reasons for missing ones."""

    landlock: int  #: its version; 0 for none
    no_connect: bool  #: whether a process can be prevented from connecting
    no_users: str | None  #: why processes can't have separate users; None if they can


class SandboxAccess(Protocol):
    """Access to files for sandboxes. All methods raise OSError."""

    def support(self, directories: Sequence[Path]) -> SandboxSupport | None:
        """Returns the layers that a sandbox can have, for processes that use files in these existing directories; None
        if a host needs no sandbox."""

    def group_of(self, device: Path) -> int | None:
        """Returns the group whose members may open a device; None if all users may. Raises PermissionError if only its
        owner may."""

    async def grant(self, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        """Lets users or groups use files; apart from them, only the owner may. Directories above the files that are one
        of `below`, or inside one, let all users pass through from then on, without listing their content."""

    async def lend_directory(self, path: Path, user: int, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        """Lets a user create files in a directory of the daemon that the daemon can use too, without removing or
        replacing the daemon's files. Then calls `grant`."""

    async def share_directory(self, path: Path, user: int, below: Sequence[Path]) -> None:
        """Lets a user create anything in an empty directory of the daemon, and lets the daemon use it; only that user
        can remove its files. For directories above it see `grant`."""


class LinuxSandboxAccess(SandboxAccess):
    def support(self, directories: Sequence[Path]) -> SandboxSupport | None:
        return SandboxSupport(_sandbox.landlock_version(), _sandbox.is_known_machine(), _why_no_users(directories))

    def group_of(self, device: Path) -> int | None:
        figures = device.stat()
        if figures.st_mode & 0o006 == 0o006:
            return None
        if figures.st_mode & 0o060 == 0o060 and figures.st_gid:
            return figures.st_gid
        raise PermissionError(errno.EACCES, f"no other user than {figures.st_uid} may open it", str(device))

    async def grant(self, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        await trio.to_thread.run_sync(_access_lists.grant, grants, below)

    async def lend_directory(self, path: Path, user: int, grants: Sequence[Grant], below: Sequence[Path]) -> None:
        def lend() -> None:
            _access_lists.lend_directory(path, user)
            _access_lists.grant(grants, below)

        await trio.to_thread.run_sync(lend)

    async def share_directory(self, path: Path, user: int, below: Sequence[Path]) -> None:
        def share() -> None:
            _access_lists.share_directory(path, user)
            _access_lists.open_ways([path], below)

        await trio.to_thread.run_sync(share)


def _why_no_users(directories: Sequence[Path]) -> str | None:
    if not _sandbox.is_known_machine():
        return "it is not known how, on this kind of processor"
    if os.geteuid() != 0:
        return "volantd does not run as root"
    has = _procfs.own_capabilities()
    lacking = [name for name, number in _sandbox.NEEDED_CAPABILITIES.items() if not has >> number & 1]
    if lacking:
        return f"volantd lacks {', '.join(lacking)}"
    for directory in directories:
        if (closed := _access_lists.closed_directory_above(directory)) is not None:
            return f"{closed} lets no other user through to {directory}: chmod o+x {closed}"
        if not _access_lists.are_supported(directory):
            return f"the file system of {directory} has no access lists (POSIX ACL)"
    return None
