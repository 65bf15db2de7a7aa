"""Boot artifacts of manifests in the cache: kernels, initramfs and root filesystems, each known by its digest.

    media/<sha256>         the file; never written to once it has that name
    media/<sha256>.json    where it came from, and what `stat` said of it when it was verified
    media/<sha256>.part    one that is on its way; locked by the process that fetches it
    media/<random>.part    one that a client sends; locked by the daemon

All of it is for the user of the daemon alone (0400, 0600), as what a manifest names may be nobody else's business.
Hypervisors with users of their own are granted what they boot from.

A file gets its name when it is whole, on the disk, and has been read once to the end and had that digest. So ten VMs of
one plugin fetch once: the second one waits for the lock and finds the file. What a fetch that was killed has left is
unlocked, and goes with the next fetch.

Local files are copied too (shared extents where the file system can do that, holes stay holes). A hard link would cost
nothing, and then whoever writes to the original would write to the disks of all VMs on it.

A layer over a root filesystem means nothing over another one. So when `stat` tells that somebody has touched a file
here, it is read again before a VM gets it, and fetched again when it is no longer what it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import _store
from ._errors import ImageError
from ._users import forget_use, is_noted, note_use, users

_BLOCK = 64 * 1024
_READ = 1024 * 1024
_FICLONE = 0x40049409
_F_OFD_GETLK = 36
_ZEROS = bytes(_BLOCK)
_RESERVE_BYTES = 256 * 1024 * 1024
"""What a fetch leaves free on the cache's file system, which is often that of the database too."""
_CHECK_SPACE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CachedArtifact:
    """A file that VMs boot from."""

    digest: str
    """Its SHA-256, in hex."""
    path: Path
    url: str
    """Where it came from."""
    size_bytes: int
    disk_bytes: int
    """What it takes on the disk; less than its size where it has holes."""

    def as_json(self) -> dict[str, object]:
        """Return it as JSON can carry it."""
        return {
            "digest": self.digest,
            "path": str(self.path),
            "url": self.url,
            "size_bytes": self.size_bytes,
            "disk_bytes": self.disk_bytes,
        }


def artifact_path(cache_dir: Path, digest: str) -> Path:
    """Return where an artifact lies, or would."""
    return cache_dir / "media" / digest


def find_artifact(cache_dir: Path, digest: str) -> CachedArtifact | None:
    """Return an artifact that is there and that nobody has touched since it was verified; reads one small file."""
    path = artifact_path(cache_dir, digest)
    record = _store.read_json(_record_path(path))
    try:
        if record is None or record.get("stat") != _fingerprint(path):
            return None
        figures = path.stat()
    except OSError:
        return None
    return CachedArtifact(digest, path, str(record.get("url", "")), figures.st_size, figures.st_blocks * 512)


def list_artifacts(cache_dir: Path) -> list[CachedArtifact]:
    """Return all artifacts of a cache that are whole."""
    folder = cache_dir / "media"
    names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
    return [artifact for name in names if (artifact := find_artifact(cache_dir, name))]


def use_artifact(cache_dir: Path, digest: str, owner: Path) -> CachedArtifact | None:
    """As `find_artifact`, and no other daemon than that of the state directory `owner` removes it from now on."""
    if not is_noted(cache_dir, digest, owner):
        # A cache that can't be written to is one of which nobody removes anything.
        with contextlib.suppress(ImageError, OSError):
            if not artifact_path(cache_dir, digest).exists():
                # The lock may be held for as long as somebody fetches it.
                note_use(cache_dir, digest, owner)
                return None
            # Who removes it has the lock from its look at the users on.
            with locked_part(cache_dir, digest):
                note_use(cache_dir, digest, owner)
    return find_artifact(cache_dir, digest)


def remove_artifact(cache_dir: Path, digest: str, owner: Path | None = None) -> bool:
    """Remove an artifact; return whether that was done. A VM that needs it fetches it again when it boots next.

    One that a hypervisor has open stays, and for the daemon with the state directory `owner` one that another daemon
    uses.

    :raises ImageError: it can't be removed
    """
    path = artifact_path(cache_dir, digest)
    try:
        with locked_part(cache_dir, digest):
            if owner is not None:
                forget_use(cache_dir, digest, owner)
                if users(cache_dir, digest):
                    return False
            if _is_locked(path):
                return False
            _record_path(path).unlink(missing_ok=True)
            was_there = path.exists()
            path.unlink(missing_ok=True)
            if was_there:
                _store.sync_folder(path.parent)
    except OSError as error:
        raise _unwritable(cache_dir, error) from None
    return was_there


def reverify(cache_dir: Path, digest: str, url: str) -> CachedArtifact | None:
    """Verifies a touched artifact, or one without a record, again; returns None if its digest is wrong."""
    path = artifact_path(cache_dir, digest)
    try:
        before = _fingerprint(path)
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest or _fingerprint(path) != before:
                return None
        # Not as mode: hypervisors may have been granted it.
        _take_from_others(path)
    except OSError:
        return None
    _record(path, url)
    return find_artifact(cache_dir, digest)


@contextlib.contextmanager
def locked_part(cache_dir: Path, digest: str) -> Iterator[Path]:
    """Hold the lock of a digest; gives the path of its part, an empty file. What is left of it goes at the end.

    Waits for whoever has it, without a deadline: that one has its own, and whoever started this process may end it.

    :raises ImageError: the cache can't be written to
    """
    folder = cache_dir / "media"
    path = folder / f"{digest}.part"
    try:
        _make_folder(folder)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_named(descriptor, path):
                break
            # The one that had it before has given the file its name, or removed it.
            os.close(descriptor)
        os.ftruncate(descriptor, 0)
    except OSError as error:
        raise _unwritable(cache_dir, error) from None
    try:
        yield path
    finally:
        if _is_named(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def make_private(cache_dir: Path) -> None:
    """Take from other users what earlier versions have let all read, as far as it is ours. VMs that run go on."""
    folder = cache_dir / "media"
    if not folder.is_dir():
        return
    for path in (folder, *folder.iterdir()):
        with contextlib.suppress(OSError):
            _take_from_others(path)


def _take_from_others(path: Path) -> None:
    """Whoever was granted it keeps it, and a directory stays one that hypervisors walk through."""
    mode = stat.S_IMODE(path.lstat().st_mode)
    kept = mode & ~0o066 if path.is_dir() else mode & ~0o007
    if path.suffix == ".json":
        kept &= ~0o077
    if kept != mode:
        path.chmod(kept)


def _make_folder(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def new_part(cache_dir: Path) -> Iterator[Path]:
    """A part whose digest is not known yet: no fetch waits for it. What is left of it goes at the end.

    :raises ImageError: the cache can't be written to
    """
    path = cache_dir / "media" / f"{secrets.token_hex(16)}.part"
    try:
        _make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(cache_dir, error) from None
    try:
        # A sweep that comes between these two removes it, and its place says so.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield path
    finally:
        if _is_named(descriptor, path):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def place_received(cache_dir: Path, part: Path, digest: str) -> CachedArtifact:
    """Give a part that a client has sent, and that has this digest, its name.

    :raises ImageError: the cache can't be written to
    """
    with locked_part(cache_dir, digest):
        found = find_artifact(cache_dir, digest)
        if found is not None:
            return found
        try:
            return place(cache_dir, part, digest, "an upload")
        except OSError as error:
            raise _unwritable(cache_dir, error) from None


def sweep(cache_dir: Path) -> None:
    """Remove the parts that killed fetches have left."""
    for path in (cache_dir / "media").glob("*.part"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_named(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)


class Part:
    """Writes the bytes of an artifact in order: counts and hashes them, and leaves holes where they are zero."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._handle = path.open("r+b", buffering=0)
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self._checked = -_CHECK_SPACE_BYTES
        self.size = 0
        self.path = path

    def close(self) -> None:
        self._handle.close()

    def expect(self, size: int) -> None:
        """Say how much it will be in all; :raises ImageError: `media_too_large`."""
        if size > self._max_bytes:
            raise too_large(self._max_bytes)

    def write(self, data: bytes) -> None:
        """Take the next bytes; :raises ImageError: `media_too_large`; :raises OSError: the disk is full, or broken."""
        self.size += len(data)
        if self.size > self._max_bytes:
            raise too_large(self._max_bytes)
        if self.size - self._checked >= _CHECK_SPACE_BYTES:
            self._checked = self.size
            check_space(self.path, 0)
        self._hash.update(data)
        self._pending += data
        whole = len(self._pending) - len(self._pending) % _BLOCK
        self._put(self._pending[:whole])
        del self._pending[:whole]

    def clone(self, source: int) -> bool:
        """Take a whole local file by sharing its extents; return whether the file system can do that."""
        try:
            fcntl.ioctl(self._handle.fileno(), _FICLONE, source)
        except OSError:
            return False
        # What was cloned is what is hashed, whatever happens to the original meanwhile.
        with self.path.open("rb") as handle:
            while data := handle.read(_READ):
                self.size += len(data)
                if self.size > self._max_bytes:
                    raise too_large(self._max_bytes)
                self._hash.update(data)
        self._handle.seek(0, os.SEEK_END)
        return True

    def finish(self) -> str:
        """Put everything on the disk and return the digest; :raises OSError: the disk is full, or broken."""
        self._put(self._pending)
        self._pending.clear()
        self._handle.truncate(self.size)
        os.fsync(self._handle.fileno())
        return self._hash.hexdigest()

    def _put(self, data: bytes | bytearray) -> None:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            if block == _ZEROS[: len(block)]:
                self._handle.seek(len(block), os.SEEK_CUR)
                continue
            while block:
                block = block[self._handle.write(block) :]


def place(cache_dir: Path, part: Path, digest: str, url: str) -> CachedArtifact:
    """Give a verified part its name; the lock is held. :raises OSError: it can't be."""
    path = artifact_path(cache_dir, digest)
    part.chmod(0o400)
    # The record of an earlier file of that name would be wrong for a moment.
    _record_path(path).unlink(missing_ok=True)
    part.rename(path)
    _record(path, url)
    found = find_artifact(cache_dir, digest)
    if found is None:
        raise ImageError("io_error", f"{path} was written and can't be read back", "check the cache folder's disk")
    return found


def check_space(path: Path, needed: int) -> None:
    """:raises ImageError: `cache_full`, the file system of `path` has no room for so many bytes more."""
    figures = os.statvfs(path)
    free = figures.f_bavail * figures.f_frsize
    if free < needed + _RESERVE_BYTES:
        raise ImageError(
            "cache_full",
            f"the cache has {free // 2**20} MiB free, {-(-needed // 2**20)} are needed and "
            f"{_RESERVE_BYTES // 2**20} must stay",
            "make room on its file system, or name another folder with VOLANT_CACHE_DIR",
        )


def too_large(max_bytes: int) -> ImageError:
    """What is said of an artifact with more bytes than allowed."""
    return ImageError(
        "media_too_large",
        f"it has more than {max_bytes // 2**20} MiB",
        "raise VOLANT_ARTIFACT_MAX_MB if it should have",
    )


def _is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on it, as QEMU does on the images of its disks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # struct flock: any lock of anybody would be in the way of an exclusive one on all of it.
        asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        found = fcntl.fcntl(descriptor, _F_OFD_GETLK, asked)
    finally:
        os.close(descriptor)
    return bool(struct.unpack("hhqqi4x", found)[0] != fcntl.F_UNLCK)


def _unwritable(cache_dir: Path, error: OSError) -> ImageError:
    return ImageError(
        "cache_unwritable",
        f"The cache folder {cache_dir} can't be written to: {error.strerror}",
        "run it as the user who owns the folder, or name another with --cache or VOLANT_CACHE_DIR",
    )


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _fingerprint(path: Path) -> list[int]:
    """What changes when somebody writes to a file, or puts another in its place. :raises OSError: there is none."""
    figures = path.lstat()
    return [figures.st_ino, figures.st_size, figures.st_mtime_ns]


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _record(path: Path, url: str) -> None:
    record = {"url": url, "stat": _fingerprint(path)}
    _store.write_atomically(_record_path(path), json.dumps(record).encode() + b"\n", mode=0o600)
