"""Artifacts of manifests in the cache: kernels, initramfs and root filesystems, named by their SHA-256.

    artifacts/<sha256>         the file; never written to under that name
    artifacts/<sha256>.json    its origin, and inode, size and time when it was verified
    artifacts/<sha256>.part    a fetch in progress; locked by the process that fetches
    artifacts/<random>.part    an upload in progress; locked by the daemon

All files are for the daemon's user alone (0400, 0600). Hypervisors with users of their own are granted what they boot.

A file gets its name once it is on the disk and its digest was verified. VMs that need the same artifact share one
fetch: the second one waits for the lock and finds the file. A killed fetch leaves an unlocked part, which the next
fetch removes.

A file that was touched is verified again before a VM gets it, and fetched again if its digest has changed: the layers
of VMs' disks are valid only over the root filesystem that they were made on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from volant.store import (
    disk_errors,
    fingerprint,
    held,
    is_named,
    read_record,
    remove_unlocked,
    sync_directory,
    write_atomically,
)

from ._errors import ImageError
from ._store import JsonFields, users

_F_OFD_GETLK = 36


class _Record(msgspec.Struct, frozen=True):
    url: str
    stat: str


class CachedArtifact(JsonFields, frozen=True):
    """A verified file in the cache that VMs boot from."""

    digest: str
    """Its SHA-256, in hex."""
    path: Path
    url: str
    """Where it came from."""
    size_bytes: int
    disk_bytes: int
    """Its space on the disk, without holes."""


def artifact_path(cache_dir: Path, digest: str) -> Path:
    """Returns the path of an artifact, whether it is there or not."""
    return cache_dir / "artifacts" / digest


def find_artifact(cache_dir: Path, digest: str) -> CachedArtifact | None:
    """Returns an artifact, or None if it is missing or was touched since it was verified; reads one small file."""
    path = artifact_path(cache_dir, digest)
    record = read_record(_record_path(path), _Record)
    try:
        if record is None or record.stat != fingerprint(path):
            return None
        figures = path.stat()
    except OSError:
        return None
    return CachedArtifact(digest, path, record.url, figures.st_size, figures.st_blocks * 512)


def list_artifacts(cache_dir: Path) -> list[CachedArtifact]:
    """Returns all artifacts that `find_artifact` finds."""
    folder = cache_dir / "artifacts"
    names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
    return [artifact for name in names if (artifact := find_artifact(cache_dir, name))]


def use_artifact(cache_dir: Path, digest: str, owner: Path) -> CachedArtifact | None:
    """Finds an artifact, and keeps other daemons than that of the state directory `owner` from removing it."""
    notes = users(cache_dir)
    if not notes.is_noted(digest, owner):
        # Nobody removes anything from a cache that can't be written to.
        with contextlib.suppress(ImageError, OSError):
            if not artifact_path(cache_dir, digest).exists():
                # A fetch may hold the lock for long.
                notes.note(digest, owner)
                return None
            # `remove_artifact` holds the lock while it reads the notes and removes.
            with locked_part(cache_dir, digest):
                notes.note(digest, owner)
    return find_artifact(cache_dir, digest)


def remove_artifact(cache_dir: Path, digest: str, owner: Path | None = None) -> bool:
    """Removes an artifact, unless a hypervisor has it open; returns whether it was removed.

    :param owner: the state directory of the daemon that removes it; then artifacts of other daemons stay, too
    :raises ImageError: it can't be removed
    """
    path = artifact_path(cache_dir, digest)
    with locked_part(cache_dir, digest), disk_errors(ImageError):
        if owner is not None:
            notes = users(cache_dir)
            notes.forget(digest, owner)
            if notes.of(digest):
                return False
        if _is_locked(path):
            return False
        _record_path(path).unlink(missing_ok=True)
        was_there = path.exists()
        path.unlink(missing_ok=True)
        if was_there:
            sync_directory(path.parent)
    return was_there


def reverify(cache_dir: Path, digest: str, url: str) -> CachedArtifact | None:
    """Verifies a touched artifact, or one without a record, again; returns None if its digest is wrong."""
    path = artifact_path(cache_dir, digest)
    try:
        before = fingerprint(path)
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest or fingerprint(path) != before:
                return None
        # Not by a fixed mode: groups of hypervisors may have been granted access.
        _remove_others(path)
    except OSError:
        return None
    _record(path, url)
    return find_artifact(cache_dir, digest)


@contextlib.contextmanager
def locked_part(cache_dir: Path, digest: str) -> Iterator[Path]:
    """Holds the lock of a digest; yields the path of its empty part, which is removed at the end unless it was renamed.

    Waits without a deadline: the process that has the lock has one, and this process can be killed.

    :raises ImageError: the cache can't be written to
    """
    with _part(cache_dir / "artifacts" / f"{digest}.part") as path:
        yield path


@contextlib.contextmanager
def new_part(cache_dir: Path) -> Iterator[Path]:
    """Yields the path of an empty part for an upload, which is removed at the end unless it was renamed.

    :raises ImageError: the cache can't be written to
    """
    with _part(cache_dir / "artifacts" / f"{secrets.token_hex(16)}.part") as path:
        yield path


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        with disk_errors(ImageError):
            path.parent.parent.mkdir(parents=True, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = stack.enter_context(held(path))
            os.ftruncate(descriptor, 0)
        try:
            yield path
        finally:
            if is_named(descriptor, path):
                path.unlink(missing_ok=True)


def _remove_others(path: Path) -> None:
    """Removes the permissions of other users. Keeps those that groups of hypervisors were granted, and search
    permission on directories."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    kept = mode & ~0o066 if path.is_dir() else mode & ~0o007
    if path.suffix == ".json":
        kept &= ~0o077
    if kept != mode:
        path.chmod(kept)


def place_received(cache_dir: Path, part: Path, digest: str) -> CachedArtifact:
    """Gives an uploaded part with this digest its name. :raises ImageError: the cache can't be written to."""
    with locked_part(cache_dir, digest):
        found = find_artifact(cache_dir, digest)
        if found is not None:
            return found
        with disk_errors(ImageError):
            return place(cache_dir, part, digest, "an upload")


def sweep(cache_dir: Path) -> None:
    """Removes the parts of killed fetches."""
    remove_unlocked(cache_dir / "artifacts", "*.part")


def place(cache_dir: Path, part: Path, digest: str, url: str) -> CachedArtifact:
    """Gives a verified part its name. The caller holds the lock. :raises OSError: the disk fails."""
    path = artifact_path(cache_dir, digest)
    part.chmod(0o400)
    # Else the record of an earlier file would belong to this one for a moment.
    _record_path(path).unlink(missing_ok=True)
    part.rename(path)
    _record(path, url)
    found = find_artifact(cache_dir, digest)
    if found is None:
        raise ImageError("io_error", f"{path} was written and can't be read back", "check the cache folder's disk")
    return found


def _is_locked(path: Path) -> bool:
    """Returns whether a process holds a lock on a file, as QEMU does on the images of its disks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # struct flock: any lock would conflict with an exclusive one on the whole file.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(descriptor, _F_OFD_GETLK, asked)
    finally:
        os.close(descriptor)
    return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _record(path: Path, url: str) -> None:
    record = msgspec.json.encode(_Record(url, fingerprint(path)))
    write_atomically(_record_path(path), record)
