"""Where the daemon keeps things: may it write there, and is there room."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from volant.model.doctor import Finding, Level

from .._directories import memory_dir
from ._given import Given, user

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs"})
_RAM = frozenset({"tmpfs", "ramfs"})
_GUEST_MB = 256
"""What the tutorial's VM has."""


@dataclass(frozen=True)
class Place:
    """A directory, or what there is of the way to it."""

    path: Path
    there: Path
    """The part of the path that exists."""
    writable: bool
    file_system: str
    free_mb: int


@dataclass(frozen=True)
class Wanted:
    """What one directory is for."""

    check: str
    setting: str
    least_mb: int
    """With less nothing works."""
    fair_mb: int
    holds: str
    lasts: bool
    """Whether what lies there must outlive the host's power."""


STATE = Wanted("state", "VOLANT_STATE_DIR", 64, 2048, "the database, logs and disks of VMs", True)
RUNTIME = Wanted("runtime", "VOLANT_RUNTIME_DIR", 4, 16, "sockets and consoles", False)
CACHE = Wanted("cache", "VOLANT_CACHE_DIR", 64, 1024, "boot images and artifacts", False)


def places(given: Given) -> Sequence[Finding]:
    """The daemon's three directories."""
    settings = given.settings
    wanted = ((STATE, settings.state_dir), (RUNTIME, settings.runtime_dir), (CACHE, settings.cache_dir))
    return [judge_place(what, look(path)) for what, path in wanted]


def memory(given: Given) -> Sequence[Finding]:
    """The memory of guests, which lies in files of a file system in RAM."""
    return [judge_memory(look(memory_dir(given.settings)), given.host.memory_available_mb())]


def look(path: Path) -> Place:
    """See how a place is. Nothing is made."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    room = os.statvfs(there)
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    return Place(
        path=path,
        there=there,
        writable=there.is_dir() and os.access(there, os.W_OK | os.X_OK),
        file_system=file_system_of(there.resolve(), mounts),
        free_mb=room.f_bavail * room.f_frsize // 2**20,
    )


def file_system_of(path: Path, mountinfo: str) -> str:
    """The kind of file system that a path lies on; empty where that can't be told. See proc_pid_mountinfo(5)."""
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = Path(fields[4].encode().decode("unicode_escape", "replace"))
        # Of two at one place the later one is seen.
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind


def judge_place(wanted: Wanted, place: Place) -> Finding:
    def finding(level: Level, found: str, means: str, advice: str) -> Finding:
        return Finding(check=wanted.check, level=level, found=f"{place.path}: {found}", means=means, advice=advice)

    elsewhere = f"name another place with {wanted.setting}"
    room = f"{place.free_mb} MiB free"
    if not place.writable:
        where = "" if place.there == place.path else f" in {place.there}"
        return finding(
            "fails", f"{user()} can't write{where}", f"volantd keeps {wanted.holds} there, and does not start",
            f"run volantd as root, or {elsewhere}",
        )  # fmt: skip
    if place.free_mb < wanted.least_mb:
        return finding("fails", room, f"there is no room for {wanted.holds}", f"make room, or {elsewhere}")
    if wanted.lasts and place.file_system in _RAM:
        return finding("less", f"lies in RAM ({place.file_system})", f"{wanted.holds} go with the power", elsewhere)
    if wanted.lasts and place.file_system in _NETWORK:
        return finding(
            "less", f"lies on a network ({place.file_system})",
            "what is acknowledged is only as safe as its locks and its fsync", elsewhere,
        )  # fmt: skip
    if place.free_mb < wanted.fair_mb:
        return finding("less", room, f"{wanted.holds} may fill it soon", f"make room, or {elsewhere}")
    return finding("ok", f"{room} ({place.file_system or 'of an unknown kind'})", "", "")


def judge_memory(place: Place, available_mb: int) -> Finding:
    free_mb = min(place.free_mb, available_mb)
    found = f"{place.there} takes {place.free_mb} MiB, and the host has {available_mb} MiB to spare"
    small = place.free_mb < available_mb
    room = f"enlarge it: `sudo mount -o remount,size=75% {place.there}`, or `--shm-size` of a container"
    if not place.writable:
        return Finding(
            check="memory", level="fails", found=f"{user()} can't write in {place.there}",
            means="guests' memory has no place", advice="run volantd as root, or mend the rights",
        )  # fmt: skip
    if place.file_system not in _RAM:
        return Finding(
            check="memory", level="less", found=f"guests' memory lies in {place.there}, on {place.file_system}",
            means="each page that a guest writes is written to a disk", advice="mount a tmpfs at /dev/shm",
        )  # fmt: skip
    if free_mb < _GUEST_MB:
        return Finding(
            check="memory", level="fails" if free_mb < 64 else "less", found=found,
            means=f"a VM of {_GUEST_MB} MiB does not fit", advice=room if small else "end something that takes memory",
        )  # fmt: skip
    if place.free_mb * 4 < available_mb:
        return Finding(
            check="memory", level="less", found=found, means="most of the host's memory can't be given to guests",
            advice=room,
        )  # fmt: skip
    return Finding(check="memory", level="ok", found=f"{found}: {free_mb // _GUEST_MB} guests of {_GUEST_MB} MiB")
