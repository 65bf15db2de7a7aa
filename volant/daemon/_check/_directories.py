"""Checks the daemon's directories: whether it can write there, and how much space is free."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from volant.directories import find_program
from volant.model.doctor import Finding, Level

from .._directories import memory_dir
from .._settings import host_dirs_of
from ._context import Context, user

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs"})
_RAM = frozenset({"tmpfs", "ramfs"})
_GUEST_MB = 256
"""Memory of the tutorial's VM."""


@dataclass(frozen=True)
class Inspected:
    """The facts about a directory that may not exist yet."""

    path: Path
    existing: Path
    """The directory, or the nearest parent that exists."""
    writable: bool
    file_system: str
    free_mb: int


@dataclass(frozen=True)
class Purpose:
    """The purpose and the needs of a directory."""

    check: str
    setting: str
    least_mb: int
    """The minimum free space."""
    fair_mb: int
    """The free space below which it may fill up soon."""
    contents: str
    survives_reboot: bool


STATE = Purpose("state", "VOLANT_STATE_DIR", 64, 2048, "the database, logs and disks of VMs", True)
RUNTIME = Purpose("runtime", "VOLANT_RUNTIME_DIR", 4, 16, "sockets and consoles", False)
CACHE = Purpose("cache", "VOLANT_CACHE_DIR", 64, 1024, "boot images and artifacts", False)


def directories(context: Context) -> Sequence[Finding]:
    """Checks the daemon's three directories."""
    settings = context.settings
    checked = ((STATE, settings.state_dir), (RUNTIME, settings.runtime_dir), (CACHE, settings.cache_dir))
    return [judge_directory(purpose, inspect_directory(path)) for purpose, path in checked]


def virtiofsd(context: Context) -> Sequence[Finding]:
    """Checks the requirements for directories of the host in VMs."""
    allowed = [each.path for each in host_dirs_of(context.settings)]
    return [judge_virtiofsd(find_program(), [path for path in allowed if not path.is_dir()])]


def judge_virtiofsd(program: str | None, missing: Sequence[Path]) -> Finding:
    """Judges virtiofsd. `program` is None if it is not installed; `missing` has the allowed directories that don't
    exist."""
    if program is None:
        return Finding(
            check="virtiofsd", level="less", found="virtiofsd is not installed",
            means="VMs can't have directories of this host", advice="on Debian: `sudo apt install virtiofsd`",
        )  # fmt: skip
    if missing:
        return Finding(
            check="virtiofsd", level="less", found=f"{missing[0]} in VOLANT_HOST_DIRS is no directory",
            means="VMs can't have it", advice="make it, or change VOLANT_HOST_DIRS",
        )  # fmt: skip
    return Finding(check="virtiofsd", level="ok", found=f"{program} is installed")


def memory(context: Context) -> Sequence[Finding]:
    """Checks the file system in RAM for guest memory."""
    return [judge_memory(inspect_directory(memory_dir(context.settings)), context.host.machine.memory_available_mb())]


def inspect_directory(path: Path) -> Inspected:
    """Returns the facts about a directory. Creates nothing."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    room = os.statvfs(existing)
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    return Inspected(
        path=path,
        existing=existing,
        writable=existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        file_system=file_system_of(existing.resolve(), mounts),
        free_mb=room.f_bavail * room.f_frsize // 2**20,
    )


def file_system_of(path: Path, mountinfo: str) -> str:
    """Returns the type of the file system of a path, or an empty string if unknown. See proc_pid_mountinfo(5)."""
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(fields[4].encode().decode("unicode_escape", "replace"))
        # The last mount at a mount point hides the others.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def judge_directory(purpose: Purpose, directory: Inspected) -> Finding:
    def finding(level: Level, found: str, means: str, advice: str) -> Finding:
        found = f"{directory.path}: {found}"
        return Finding(check=purpose.check, level=level, found=found, means=means, advice=advice)

    elsewhere = f"choose another directory with {purpose.setting}"
    file_system, free = directory.file_system, f"{directory.free_mb} MiB free"
    if not directory.writable:
        where = "" if directory.existing == directory.path else f" in {directory.existing}"
        return finding(
            "fails", f"{user()} can't write{where}", f"volantd keeps {purpose.contents} there, and does not start",
            f"run volantd as root, or {elsewhere}",
        )  # fmt: skip
    if directory.free_mb < purpose.least_mb:
        return finding("fails", free, f"there is no space for {purpose.contents}", f"free some, or {elsewhere}")
    if purpose.survives_reboot and file_system in _RAM:
        return finding("less", f"is in RAM ({file_system})", f"{purpose.contents} are lost on a reboot", elsewhere)
    if purpose.survives_reboot and file_system in _NETWORK:
        return finding(
            "less", f"is on a network file system ({file_system})",
            "acknowledged changes are only as safe as its locks and its fsync", elsewhere,
        )  # fmt: skip
    if directory.free_mb < purpose.fair_mb:
        return finding("less", free, f"{purpose.contents} may fill it up soon", f"free some space, or {elsewhere}")
    return finding("ok", f"{free} ({file_system or 'unknown file system'})", "", "")


def judge_memory(directory: Inspected, available_mb: int) -> Finding:
    path, file_system = directory.existing, directory.file_system
    free_mb = min(directory.free_mb, available_mb)
    found = f"{path} has {directory.free_mb} MiB free, and the host {available_mb} MiB"
    small = directory.free_mb < available_mb
    room = f"enlarge it: `sudo mount -o remount,size=75% {path}`, or `--shm-size` of a container"
    if not directory.writable:
        return Finding(
            check="memory", level="fails", found=f"{user()} can't write in {path}",
            means="there is no place for guest memory", advice="run volantd as root, or correct the permissions",
        )  # fmt: skip
    if file_system not in _RAM:
        return Finding(
            check="memory", level="less", found=f"guest memory is in {path}, on {file_system}",
            means="each page that a guest writes is written to a disk", advice="mount a tmpfs at /dev/shm",
        )  # fmt: skip
    if free_mb < _GUEST_MB:
        return Finding(
            check="memory", level="fails" if free_mb < 64 else "less", found=found,
            means=f"a VM of {_GUEST_MB} MiB does not fit", advice=room if small else "stop programs that use memory",
        )  # fmt: skip
    if directory.free_mb * 4 < available_mb:
        return Finding(
            check="memory", level="less", found=found, means="guests can't use most of the host's memory",
            advice=room,
        )  # fmt: skip
    return Finding(check="memory", level="ok", found=f"{found}: {free_mb // _GUEST_MB} guests of {_GUEST_MB} MiB")
