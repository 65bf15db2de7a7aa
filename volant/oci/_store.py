"""Images and layers on the disk; `docs/explanation/oci.md` has the layout and the reasons.

All functions block, and all may be called at the same time, also by several daemons: named files are complete, and a
name is a digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from volant.host import as_user
from volant.model import DEFAULT_PROJECT
from volant.store import (
    Users,
    disk_errors,
    entries,
    held,
    lock_unless_held,
    read_record,
    sync_directory,
    write_atomically,
)

from ._config import ImageConfig
from ._errors import OciError
from ._join import DISK, descriptor
from ._reference import Reference

_LEAST_DIGITS = 6
"""Minimum digits of an abbreviated digest."""
_DIGITS = re.compile(rf"[0-9a-f]{{{_LEAST_DIGITS},64}}\Z")
_CORRECTING = "correcting.erofs"
"""The file of the correcting layer: `_join.py`."""
_PROGRAMS = (b"skopeo", b"volant.oci", b"mkfs.erofs")


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `image.json`."""

    version: int = 1
    digest: str
    config: ImageConfig
    sizes: tuple[int, ...]
    """The sizes of the layers' files, in bytes."""


class _Name(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a file in `names/`."""

    reference: str
    digest: str
    resolved_at: float
    """The time of the resolution, in seconds since 1970."""
    project: str = DEFAULT_PROJECT


class CachedImage(msgspec.Struct, frozen=True, kw_only=True):
    """A complete image in the cache."""

    digest: str
    """The digest of its manifest, as `sha256:…`."""
    config: ImageConfig
    metadata: Path
    """The layers as one EROFS file system; the layers are its devices, in order."""
    disk: Path
    """A disk of layers and metadata for a hypervisor: `_join.py`."""
    layers: tuple[Path, ...]
    """The EROFS file systems of its layers, lowest first."""
    names: tuple[str, ...]
    """References that last resolved to it, in the requested project or in all."""
    size_bytes: int
    """The size with all layers, including shared ones."""
    own_bytes: int
    """The bytes that its removal would free."""
    used_at: float
    """The time of its last use, in seconds since 1970."""
    layer_bytes: tuple[int, ...] = ()
    """The space on disk of each layer."""


class Work(msgspec.Struct, frozen=True):
    """The directory of a fetch in progress."""

    path: Path

    @property
    def scratch(self) -> Path:
        """The directory for temporary files of the programs."""
        return self.path / "scratch"

    @property
    def layout(self) -> Path:
        """The directory that skopeo writes."""
        return self.scratch / "layout"

    @property
    def image(self) -> Path:
        """The directory that becomes the image's directory."""
        return self.path / "image"

    @property
    def arrived(self) -> Path:
        """A file that exists once all layers are in the layout."""
        return self.path / "arrived"

    @property
    def metadata(self) -> Path:
        return self.image / "metadata.erofs"

    @property
    def correcting(self) -> Path:
        return self.image / _CORRECTING

    def layer(self, number: int) -> Path:
        return self.image / f"{number}.erofs"

    def done(self, number: int) -> Path:
        """Returns the path of a file that exists once the file of a layer is written."""
        return self.scratch / f"{number}.done"

    def blob(self, digest: str) -> Path:
        return self.layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def first_numbers(diff_ids: Sequence[str]) -> dict[str, int]:
    """Returns the first position of each layer in an image, which may contain a layer twice."""
    return {diff_id: number for number, diff_id in reversed(list(enumerate(diff_ids)))}


class Store:
    """The directory `oci` of a cache."""

    def __init__(self, directory: Path, user: int | None = None) -> None:
        """Creates it. `user` is the user of the programs that create files in working directories; None for the
        daemon's."""
        self._user = user
        self._layers = directory / "layers"
        self._images = directory / "images"
        self._names = directory / "names"
        self.work = directory / "work"
        self.users = Users(directory / "users")
        """By the digits of images' digests."""
        self.directory = directory

    # Fetching

    @contextlib.contextmanager
    def working(self) -> Iterator[Work]:
        """Creates a working directory for the block. :raises OciError: the cache can't be written."""
        with disk_errors(OciError):
            for directory in (self._layers, self._images, self._names, self.work):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.directory.chmod(0o700)
            work = Work(self.work / f"{secrets.token_hex(8)}.new")
            work.path.mkdir(mode=0o700)
        with contextlib.ExitStack() as stack:
            with disk_errors(OciError):
                # `sweep` may have removed it by now; then the fetch fails, and nothing is left.
                stack.enter_context(held(work.path / "lock"))
                stack.callback(self._remove_work, work.path)
                work.image.mkdir(mode=0o700)
                work.scratch.mkdir(mode=0o700)
            yield work

    def having(self, diff_ids: Sequence[str]) -> set[int]:
        """Returns the numbers of the layers that the cache has."""
        return {number for number, diff_id in enumerate(diff_ids) if self._layer(diff_id).exists()}

    def hold(self, work: Work, diff_ids: Sequence[str]) -> set[int]:
        """Links the layers that the cache has into a working directory, so that they can't be removed.

        Returns their numbers. :raises OciError: it failed.
        """
        held = set()
        with disk_errors(OciError):
            for number, diff_id in enumerate(diff_ids):
                try:
                    os.link(self._layer(diff_id), work.layer(number))
                except FileNotFoundError:
                    continue
                held.add(number)
        return held

    def begin(self, work: Work, numbers: Collection[int]) -> list[Path]:
        """Creates and returns empty files for layers, and for the join.

        They belong to the daemon, even if another user writes them.

        :raises OciError: it failed.
        """
        with disk_errors(OciError):
            files = [*map(work.layer, sorted(numbers)), work.correcting, work.metadata]
            for path in files:
                path.touch(mode=0o600, exist_ok=False)
            return files

    def commit(self, work: Work, digest: str, config: ImageConfig, made: Collection[Path]) -> None:
        """Adds an image whose files are complete and on the disk.

        :param made: the new files
        :raises OciError: it failed.
        """
        with disk_errors(OciError):
            sizes = []
            for path in made:
                _close(path)
            first = first_numbers(config.diff_ids)
            for number, diff_id in enumerate(config.diff_ids):
                # The same layer may be in an image twice.
                if not work.layer(number).exists():
                    os.link(work.layer(first[diff_id]), work.layer(number))
                _share(work.layer(number), self._layer(diff_id))
                sizes.append(work.layer(number).stat().st_size)
            sync_directory(self._layers)
            layers = [*(work.layer(number) for number in range(len(sizes))), work.correcting]
            write_atomically(work.image / DISK, descriptor(work.metadata, layers).encode())
            record = _Record(digest=digest, config=config, sizes=tuple(sizes))
            write_atomically(work.image / "image.json", _encoded(record))
            if self.find(digest) is None:
                # The existing image is damaged.
                self._remove_files(digest)
            try:
                work.image.rename(self._image(digest))
            except OSError as error:
                # Another fetch was faster.
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync_directory(self._images)

    def note(self, reference: Reference, digest: str) -> None:
        """Records the target of a reference. :raises OciError: it failed."""
        project = reference.project
        name = _Name(reference=str(reference), digest=digest, resolved_at=time.time(), project=project)
        with disk_errors(OciError):
            write_atomically(self._name(reference), _encoded(name))

    # Finding

    def resolve(self, reference: Reference) -> str | None:
        """Returns the digest to which a reference last resolved, if the cache has its image."""
        found = read_record(self._name(reference), _Name)
        return found.digest if found and self._image(found.digest).exists() else None

    def find(self, digest: str, *, project: str | None = None, use: bool = False) -> CachedImage | None:
        """Returns an image by its digest, or None. With `project` it has only the names of this project, with None all
        names. `use` records the time, for `prune`."""
        return self._find(digest, self._named(project), use=use)

    def use(self, digest: str) -> CachedImage | None:
        """Returns an image by its digest, without its names, or None, and records the time. Used by each boot, because
        reading the names takes longer than the rest."""
        return self._find(digest, {}, use=True)

    def digests(self, beginning: str) -> list[str]:
        """Returns the digests of images with a prefix, with or without `sha256:`. :raises OciError: it is too short, or
        no digest."""
        begin = beginning.removeprefix("sha256:")
        if not _DIGITS.match(begin):
            raise OciError(
                "bad_reference", f"{beginning[:100]!r} is not the beginning of a digest",
                f"write at least {_LEAST_DIGITS} hexadecimal digits",
            )  # fmt: skip
        return [f"sha256:{name}" for name in entries(self._images) if name.startswith(begin)]

    def all(self, project: str | None = None) -> list[CachedImage]:
        """Returns all images, with the names of a project; with None all names."""
        named = self._named(project)
        return [image for name in entries(self._images) if (image := self._find(f"sha256:{name}", named))]

    def used_bytes(self) -> int:
        """Returns the space that all layers and images take up. Shared layers count once."""
        own = [path for name in ("metadata.erofs", _CORRECTING) for path in self._images.glob(f"*/{name}")]
        return sum(_blocks(path) for path in (*self._layers.glob("*"), *own))

    def _find(self, digest: str, named: dict[str, set[str]], *, use: bool = False) -> CachedImage | None:
        directory = self._image(digest)
        record = read_record(directory / "image.json", _Record)
        if record is None or record.digest != digest:
            return None
        layers = tuple(directory / f"{number}.erofs" for number in range(len(record.config.diff_ids)))
        metadata = directory / "metadata.erofs"
        try:
            figures = [path.stat() for path in (*layers, metadata, directory / _CORRECTING)]
            (directory / DISK).stat()
            if use:
                os.utime(directory / "image.json")
            used_at = (directory / "image.json").stat().st_mtime
        except OSError:
            return None
        if tuple(each.st_size for each in figures[: len(layers)]) != record.sizes:
            return None
        # One link is that of `layers/`; the same layer may be in an image twice.
        times = {each.st_ino: sum(other.st_ino == each.st_ino for other in figures) for each in figures}
        by_file = {each.st_ino: each for each in figures}.values()
        return CachedImage(
            digest=digest,
            config=record.config,
            metadata=metadata,
            disk=directory / DISK,
            layers=layers,
            names=tuple(sorted(named.get(digest, ()))),
            size_bytes=sum(each.st_blocks * 512 for each in by_file),
            own_bytes=sum(each.st_blocks * 512 for each in by_file if each.st_nlink <= times[each.st_ino] + 1),
            used_at=used_at,
            layer_bytes=tuple(each.st_blocks * 512 for each in figures[: len(layers)]),
        )

    def _named(self, project: str | None = None) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for name in entries(self._names):
            record = read_record(self._names / name, _Name)
            if record is not None and project in (None, record.project):
                found.setdefault(record.digest, set()).add(record.reference)
        return found

    def note_user(self, digest: str, owner: Path) -> None:
        """Records that a daemon needs an image, for others that share the cache. :raises OciError: it failed."""
        if not self.users.is_noted(digits(digest), owner):
            with disk_errors(OciError):
                self.users.note(digits(digest), owner)

    # Removing

    def remove_name(self, reference: Reference) -> bool:
        """Removes a reference, not its image. Returns whether it existed. :raises OciError: it failed."""
        with disk_errors(OciError):
            try:
                self._name(reference).unlink()
            except FileNotFoundError:
                return False
            return True

    def remove_names(self, digest: str, project: str) -> bool:
        """Removes the names of an image in a project. Returns whether it has names in others.

        :raises OciError: it failed.
        """
        with disk_errors(OciError):
            others = False
            for name in entries(self._names):
                record = read_record(self._names / name, _Name)
                if record is not None and record.digest == digest:
                    if record.project == project:
                        (self._names / name).unlink(missing_ok=True)
                    else:
                        others = True
            return others

    def remove_project(self, project: str) -> None:
        """Removes all names of a project. :raises OciError: it failed."""
        with disk_errors(OciError):
            for name in entries(self._names):
                record = read_record(self._names / name, _Name)
                if record is not None and record.project == project:
                    (self._names / name).unlink(missing_ok=True)

    def remove(self, digest: str) -> bool:
        """Removes an image, its names, and the layers that no other image has. Returns whether it existed.

        :raises OciError: it failed.
        """
        with disk_errors(OciError):
            found = self._remove(digest)
            self._collect()
            return found

    def collect(self) -> None:
        """Removes the layers that no image and no fetch has. :raises OciError: it failed."""
        with disk_errors(OciError):
            self._collect()

    def sweep(self) -> None:
        """Removes the remains of killed fetches and removals. :raises OciError: it failed."""
        with disk_errors(OciError):
            for name in entries(self.work):
                self._remove_unlocked(self.work / name)
            for name in entries(self._images):
                if not (self._images / name / "image.json").exists():
                    shutil.rmtree(self._images / name, ignore_errors=True)
            for path in self._names.glob(".*.new"):
                path.unlink(missing_ok=True)
            for name in entries(self._names):
                found = read_record(self._names / name, _Name)
                if found is None or not self._image(found.digest).exists():
                    (self._names / name).unlink(missing_ok=True)
            self._collect()

    def _remove(self, digest: str) -> bool:
        for name in entries(self._names):
            if (record := read_record(self._names / name, _Name)) is not None and record.digest == digest:
                (self._names / name).unlink(missing_ok=True)
        return self._remove_files(digest)

    def _remove_files(self, digest: str) -> bool:
        directory = self._image(digest)
        try:
            # Without this file there is no image.
            (directory / "image.json").unlink()
            sync_directory(directory)
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return True

    def _remove_unlocked(self, work: Path) -> None:
        """Removes a working directory unless a fetch uses it."""
        with lock_unless_held(work / "lock") as locked:
            if locked:
                _end_programs(work)
                gone = work.with_suffix(".gone")
                work.rename(gone)
                self._remove_work(gone)

    def _remove_work(self, work: Path) -> None:
        scratch = work / "scratch"
        if self._user is not None:
            # Only their user may remove the files of the programs.
            with contextlib.suppress(OSError):
                as_user(self._user, lambda: shutil.rmtree(scratch, ignore_errors=True))
        shutil.rmtree(work, ignore_errors=True)

    def _collect(self) -> None:
        """Removes the layers that no image and no fetch has. A fetch that links one at the same time keeps it."""
        for name in entries(self._layers):
            path = self._layers / name
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_nlink == 1:
                    path.unlink()

    # Paths

    def _layer(self, diff_id: str) -> Path:
        return self._layers / f"{digits(diff_id)}.erofs"

    def _image(self, digest: str) -> Path:
        return self._images / digits(digest)

    def _name(self, reference: Reference) -> Path:
        # Names from before there were projects stay where they are.
        prefix = "" if reference.project == DEFAULT_PROJECT else f"{reference.project}\0"
        return self._names / f"{hashlib.sha256(f'{prefix}{reference}'.encode()).hexdigest()}.json"


def digits(digest: str) -> str:
    """Returns the 64 hexadecimal digits of a digest. :raises OciError: it is not a digest."""
    name = digest.removeprefix("sha256:")
    if len(name) != 64 or not set(name) <= set("0123456789abcdef"):
        raise OciError("bad_reference", f"{digest[:100]!r} is not a digest", "write sha256: and 64 hexadecimal digits")
    return name


def _close(path: Path) -> None:
    """Makes a file that a program has written read-only. :raises OciError: the program still has it open."""
    path.chmod(0o400)
    with path.open("rb") as file:
        try:
            # A lease for readers can't be had while somebody has the file open for writing.
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except BlockingIOError:
            raise OciError(
                "image_invalid", f"{path.name} is still being written to, by a program that should have ended",
                "report it with the name of the image",
            ) from None  # fmt: skip
        except OSError as error:
            # The file system has no leases.
            if error.errno not in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
                raise


def _share(made: Path, shared: Path) -> None:
    """Makes both names lead to one file: the one in `layers/` if another fetch was faster."""
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


def _end_programs(work: Path) -> None:
    """Ends the programs that a killed daemon has started for a fetch, such as skopeo waiting for a registry."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            process = os.pidfd_open(int(entry.name))
            try:
                # Read once it is open: so it is about this process, and not a later one with its number.
                where, command = Path(entry.path, "cwd").readlink(), Path(entry.path, "cmdline").read_bytes()
                if where.is_relative_to(work) and any(name in command for name in _PROGRAMS):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
            finally:
                os.close(process)


def _encoded(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record))


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0
