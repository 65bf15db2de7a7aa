"""Finished images in a cache folder.

    images/<digest>/vmlinux, initramfs, image.json    never changed once they are there
    current.json                                      which image fits the present recipe and guest code
    packages/                                         the packages of the last build; see `_packages.py`
    artifacts/                                        artifacts of manifests; see `_artifacts.py`
    lock                                              held by the one builder
    build-*/                                          a build in progress, or the rest of a killed one

An image is named by the digest of its inputs: the recipe, the packages and our guest code. It is renamed into its place
once it is complete and on the disk, so it can be used without a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict, replace

from volant.store import Users, disk_errors, entries, held, read_record, write_atomically

from . import _recipe
from ._errors import ImageError

if TYPE_CHECKING:
    from ._packages import Package

DIGEST = re.compile(r"[0-9a-f]{64}")
"""A complete SHA-256 in hex."""


class JsonFields(msgspec.Struct, frozen=True):
    """The base of what is printed as JSON."""

    def as_json(self) -> dict[str, object]:
        """Returns the fields for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


class Image(JsonFields, frozen=True):
    """A kernel and an initramfs that a VM can boot."""

    digest: str
    """SHA-256 of its inputs, in hex."""
    kernel: Path
    """An uncompressed ELF kernel with a PVH entry point."""
    initramfs: Path
    min_memory_mb: int
    """The minimum memory of a guest."""
    kernel_parameters: tuple[str, ...]
    """Optional words for the kernel's command line that make the boot faster."""
    protocol: int
    """The newest version of the protocol that its agent speaks."""
    kernel_version: str
    """The version of Debian's kernel package."""
    size_bytes: int
    """Kernel and initramfs together."""
    current: bool
    """Whether new VMs boot it. False after `load`."""


def image_digest(recipe: str, packages: Iterable[Package], guest: str) -> str:
    """Returns the name of the image that this recipe makes of these packages and this guest code."""
    rows = [[item.name, item.version, item.sha256] for item in sorted(packages)]
    text = json.dumps({"recipe": recipe, "packages": rows, "guest": guest}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def find(cache_dir: Path) -> Image | None:
    """Returns the image of the present recipe and guest code, or None. Reads two small files."""
    digest = _current(cache_dir)
    image = load(cache_dir, digest) if digest else None
    return None if image is None else replace(image, current=True)


def list_images(cache_dir: Path) -> list[Image]:
    """Returns all complete images of a cache, the current one first."""
    folder = cache_dir / "images"
    current = _current(cache_dir)
    images = [replace(image, current=name == current) for name in entries(folder) if (image := load(cache_dir, name))]
    return sorted(images, key=lambda image: (not image.current, image.digest))


def load(cache_dir: Path, digest: str) -> Image | None:
    """Returns an image by its digest, or None if it is missing or incomplete.

    Each boot calls this several times. So it does not set `current`, which needs a digest of all guest code.
    """
    if not DIGEST.fullmatch(digest):
        return None
    folder = cache_dir / "images" / digest
    record = read_record(folder / "image.json", dict[str, Any])
    if record is None:
        return None
    try:
        image = Image(
            digest=digest,
            kernel=folder / "vmlinux",
            initramfs=folder / "initramfs",
            min_memory_mb=int(record["min_memory_mb"]),
            kernel_parameters=tuple(str(word) for word in record["kernel_parameters"]),
            protocol=int(record["protocol"]),
            kernel_version=str(record["kernel_version"]),
            size_bytes=int(record["kernel"]["size"]) + int(record["initramfs"]["size"]),
            current=False,
        )
        # Sizes suffice, as the rename was atomic; digests would be slow at each boot.
        whole = (
            image.kernel.stat().st_size == record["kernel"]["size"]
            and image.initramfs.stat().st_size == record["initramfs"]["size"]
        )
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return image if whole else None


def prune(cache_dir: Path, keep: Iterable[str]) -> list[str]:
    """Removes images that are neither current nor in `keep`, and the rest of killed builds; returns which images.

    :raises ImageError: the cache can't be written to; `cache_busy`: an image is being built
    """
    wanted = set(keep)

    def busy() -> None:
        raise ImageError("cache_busy", "an image is being built", "try again when that is done")

    with locked(cache_dir, busy):
        clean_up(cache_dir)
        gone = [image.digest for image in list_images(cache_dir) if not image.current and image.digest not in wanted]
        for digest in gone:
            doomed = cache_dir / f"build-{digest}"
            # Renamed first, so that nobody finds a half of it.
            (cache_dir / "images" / digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return gone


def _current(cache_dir: Path) -> str | None:
    index = read_record(cache_dir / "current.json", dict[str, Any])
    digest = index.get(_recipe.input_key()) if index else None
    return digest if isinstance(digest, str) else None


def make_current(cache_dir: Path, digest: str) -> None:
    """Makes this image the one that `find` returns. The caller holds the lock."""
    data = json.dumps({_recipe.input_key(): digest}).encode() + b"\n"
    write_atomically(cache_dir / "current.json", data, mode=0o644)


@contextlib.contextmanager
def locked(cache_dir: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the cache's lock.

    :param waiting: called once if another process has the lock
    :raises ImageError: the folder can't be written to
    """
    with contextlib.ExitStack() as stack:
        with disk_errors(ImageError):
            cache_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(cache_dir / "lock", waiting, mode=0o644))
        yield


@contextlib.contextmanager
def building(cache_dir: Path, waiting: Callable[[], None]) -> Iterator[Path]:
    """Holds the cache's lock, removes the rest of killed builds, and yields a folder that is removed at the end.

    :param waiting: called once if another process has the lock
    :raises ImageError: the folder can't be written to
    """
    with locked(cache_dir, waiting):
        clean_up(cache_dir)
        scratch = Path(tempfile.mkdtemp(dir=cache_dir, prefix="build-"))
        # Started by root, apt downloads as a user of its own, who has to reach the folders below.
        scratch.chmod(0o711)
        try:
            with disk_errors(ImageError):
                yield scratch
        finally:
            _remove(scratch)


def clean_up(cache_dir: Path) -> None:
    """Removes the rest of killed builds. The caller holds the lock, so no build is in progress."""
    for path in cache_dir.glob("build-*"):
        _remove(path)


def _remove(scratch: Path) -> None:
    """Removes the folder of a build, and the one that a killed build of this user used besides."""
    work = scratch / "work"
    # Not as root, who may clean the cache of another user: that one decides where the link leads.
    if work.is_symlink() and os.geteuid() != 0:
        from ._mmdebstrap import remove_tree

        remove_tree(work.resolve())
    shutil.rmtree(scratch, ignore_errors=True)


def users(cache_dir: Path) -> Users:
    """Returns the notes of which daemon uses which image or artifact of a cache."""
    return Users(cache_dir / "users")
