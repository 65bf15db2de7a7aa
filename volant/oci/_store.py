"""Images and layers on the disk; `docs/explanation/oci.md` has the layout and the reasons.

All functions block, and all may be called at the same time, also by several daemons: what has a name is whole, and a
name is a digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from ._config import ImageConfig
from ._errors import OciError
from ._reference import Reference

T = TypeVar("T")

_MAX_RECORD = 16 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `image.json`."""

    version: int = 1
    digest: str
    config: ImageConfig
    sizes: tuple[int, ...]
    """Of the layers' files, in bytes."""


class _Name(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file in `names/`."""

    reference: str
    digest: str
    resolved_at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image that is whole in the cache."""

    digest: str
    """`sha256:…` of its manifest."""
    config: ImageConfig
    metadata: Path
    """The layers as one EROFS file system; the layers are its devices, in order."""
    layers: tuple[Path, ...]
    """One EROFS file system each, lowest first."""
    names: tuple[str, ...]
    """References that last resolved to it."""
    size_bytes: int
    """With all layers, also those that other images share."""
    own_bytes: int
    """What its removal would free."""
    used_at: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Work:
    """The directory of a fetch in progress."""

    path: Path

    @property
    def layout(self) -> Path:
        """What skopeo writes."""
        return self.path / "layout"

    @property
    def image(self) -> Path:
        """What becomes the image's directory."""
        return self.path / "image"

    @property
    def metadata(self) -> Path:
        return self.image / "metadata.erofs"

    def layer(self, number: int) -> Path:
        return self.image / f"{number}.erofs"

    def blob(self, digest: str) -> Path:
        return self.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


class Store:
    """The directory `oci` of a cache."""

    def __init__(self, directory: Path) -> None:
        self._layers = directory / "layers"
        self._images = directory / "images"
        self._names = directory / "names"
        self._work = directory / "work"
        self.directory = directory

    # Fetching

    @contextlib.contextmanager
    def working(self) -> Iterator[Work]:
        """Makes a working directory for a block. :raises OciError: the cache can't be written"""
        with disk_errors():
            for directory in (self._layers, self._images, self._names, self._work):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.directory.chmod(0o700)
            work = Work(self._work / f"{secrets.token_hex(8)}.new")
            work.path.mkdir(mode=0o700)
            lock = os.open(work.path / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # `sweep` may have removed it by now; then the fetch fails, and nothing is left.
            with disk_errors():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                work.image.mkdir()
            yield work
        finally:
            shutil.rmtree(work.path, ignore_errors=True)
            os.close(lock)

    def hold(self, work: Work, diff_ids: Sequence[str]) -> set[int]:
        """Links the layers that the cache has into a working directory, so that nobody can take them away any more.

        Returns their numbers. :raises OciError:
        """
        held = set()
        with disk_errors():
            for number, diff_id in enumerate(diff_ids):
                try:
                    os.link(self._layer(diff_id), work.layer(number))
                except FileNotFoundError:
                    continue
                held.add(number)
        return held

    def commit(self, work: Work, digest: str, config: ImageConfig) -> None:
        """Puts an image in place whose files are complete and on the disk. :raises OciError:"""
        with disk_errors():
            sizes = []
            for number, diff_id in enumerate(config.diff_ids):
                _share(work.layer(number), self._layer(diff_id))
                sizes.append(work.layer(number).stat().st_size)
            _sync(self._layers)
            _write(work.image / "image.json", _Record(digest=digest, config=config, sizes=tuple(sizes)))
            _sync(work.image)
            try:
                work.image.rename(self._image(digest))
            except OSError as error:
                # Another fetch was faster.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(self._images)

    def note(self, reference: Reference, digest: str) -> None:
        """Notes what a reference resolves to. :raises OciError:"""
        with disk_errors():
            path = self._name(str(reference))
            fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
            _write(fresh, _Name(reference=str(reference), digest=digest, resolved_at=time.time()))
            fresh.rename(path)
            _sync(self._names)

    # Finding

    def resolve(self, reference: Reference) -> str | None:
        """Returns the digest that a reference resolved to last, if the cache has its image."""
        found = _read(self._name(str(reference)), _Name)
        return found.digest if found and self._image(found.digest).exists() else None

    def find(self, digest: str, *, use: bool = False) -> CachedImage | None:
        """Returns an image by its digest, or None. `use`: notes the time, for `prune`."""
        return self._find(digest, self._named(), use=use)

    def all(self) -> list[CachedImage]:
        """Returns all images."""
        named = self._named()
        return [image for name in _entries(self._images) if (image := self._find(f"sha256:{name}", named))]

    def used_bytes(self) -> int:
        """Returns the space that all layers and images take. Shared layers count once."""
        files = [*self._layers.glob("*"), *self._images.glob("*/metadata.erofs")]
        return sum(_blocks(path) for path in files)

    def _find(self, digest: str, named: dict[str, list[str]], *, use: bool = False) -> CachedImage | None:
        directory = self._image(digest)
        record = _read(directory / "image.json", _Record)
        if record is None or record.digest != digest:
            return None
        layers = tuple(directory / f"{number}.erofs" for number in range(len(record.config.diff_ids)))
        metadata = directory / "metadata.erofs"
        try:
            figures = [path.stat() for path in (*layers, metadata)]
            if use:
                os.utime(directory / "image.json")
            used_at = (directory / "image.json").stat().st_mtime
        except OSError:
            return None
        if tuple(each.st_size for each in figures[:-1]) != record.sizes:
            return None
        # One link is that of `layers/`; the same layer may be in an image twice.
        times = {each.st_ino: sum(other.st_ino == each.st_ino for other in figures) for each in figures}
        by_file = {each.st_ino: each for each in figures}.values()
        return CachedImage(
            digest=digest,
            config=record.config,
            metadata=metadata,
            layers=layers,
            names=tuple(sorted(named.get(digest, ()))),
            size_bytes=sum(each.st_blocks * 512 for each in by_file),
            own_bytes=sum(each.st_blocks * 512 for each in by_file if each.st_nlink <= times[each.st_ino] + 1),
            used_at=used_at,
        )

    def _named(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in _entries(self._names):
            if (record := _read(self._names / name, _Name)) is not None:
                found.setdefault(record.digest, []).append(record.reference)
        return found

    # Removing

    def remove_name(self, reference: Reference) -> bool:
        """Removes a reference, not its image. Returns whether it was there. :raises OciError:"""
        with disk_errors():
            try:
                self._name(str(reference)).unlink()
            except FileNotFoundError:
                return False
            return True

    def remove(self, digest: str) -> bool:
        """Removes an image, its names, and the layers that no image has then. Returns whether it was there.

        :raises OciError:
        """
        with disk_errors():
            found = self._remove(digest)
            self._collect()
            return found

    def prune(self, max_bytes: int, in_use: Callable[[str], bool] = lambda digest: False) -> list[str]:
        """Removes the images that were not used longest, until the rest takes at most `max_bytes`. Returns which.

        :param in_use: whether an image, by its digest, has to stay
        :raises OciError:
        """
        gone = []
        with disk_errors():
            self._collect()
            for image in sorted(self.all(), key=lambda image: image.used_at):
                if self.used_bytes() <= max_bytes:
                    break
                if not in_use(image.digest) and self._remove(image.digest):
                    gone.append(image.digest)
                    self._collect()
        return gone

    def sweep(self) -> None:
        """Removes what killed fetches and removals left. :raises OciError:"""
        with disk_errors():
            for name in _entries(self._work):
                _remove_unlocked(self._work / name)
            for name in _entries(self._images):
                if not (self._images / name / "image.json").exists():
                    shutil.rmtree(self._images / name, ignore_errors=True)
            for path in self._names.glob(".*.new"):
                path.unlink(missing_ok=True)
            for name in _entries(self._names):
                found = _read(self._names / name, _Name)
                if found is None or not self._image(found.digest).exists():
                    (self._names / name).unlink(missing_ok=True)
            self._collect()

    def _remove(self, digest: str) -> bool:
        for name in _entries(self._names):
            if (record := _read(self._names / name, _Name)) is not None and record.digest == digest:
                (self._names / name).unlink(missing_ok=True)
        directory = self._image(digest)
        try:
            # Without this file there is no image.
            (directory / "image.json").unlink()
        except FileNotFoundError:
            return False
        _sync(directory)
        shutil.rmtree(directory, ignore_errors=True)
        return True

    def _collect(self) -> None:
        """Removes the layers that no image and no fetch has. One that links it meanwhile keeps it."""
        for name in _entries(self._layers):
            path = self._layers / name
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_nlink == 1:
                    path.unlink()

    # Paths

    def _layer(self, diff_id: str) -> Path:
        return self._layers / f"{_hex(diff_id)}.erofs"

    def _image(self, digest: str) -> Path:
        return self._images / _hex(digest)

    def _name(self, reference: str) -> Path:
        return self._names / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turns errors of the cache's disk in a block into OciError: `cache_full`, `cache_unwritable` or `io_error`."""
    try:
        yield
    except OSError as error:
        what = f"the cache can't be written: {error.strerror or error}"
        if error.errno in _FULL:
            raise OciError("cache_full", what, "make room on its file system") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OciError(
                "cache_unwritable", what, "check who owns its folder, or name another with VOLANT_CACHE_DIR"
            ) from error
        raise OciError("io_error", what, "check its disk") from error


def _hex(digest: str) -> str:
    name = digest.removeprefix("sha256:")
    if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise OciError("bad_reference", f"{digest[:100]!r} is not a digest", "write sha256: and 64 hexadecimal digits")
    return name


def _share(made: Path, shared: Path) -> None:
    """Makes both names lead to one file: to the one in `layers/` if another fetch was faster."""
    while True:
        try:
            os.link(made, shared)
            return
        except FileExistsError:
            pass
        with contextlib.suppress(FileNotFoundError):
            # It may be removed at any moment.
            if shared.samefile(made):
                return
            fresh = made.with_suffix(".shared")
            os.link(shared, fresh)
            fresh.replace(made)
            return


def _remove_unlocked(work: Path) -> None:
    """Removes a working directory unless a fetch uses it."""
    try:
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What a killed daemon has started runs on, and finds nothing to write to.
        gone = work.with_suffix(".gone")
        work.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _write(path: Path, record: msgspec.Struct) -> None:
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(msgspec.json.format(msgspec.json.encode(record)))
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_RECORD), type=kind)
    except (OSError, msgspec.MsgspecError):
        return None


def _entries(directory: Path) -> list[str]:
    """Returns the names in a directory without hidden ones; none if it is missing."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208
    except FileNotFoundError:
        return []


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
