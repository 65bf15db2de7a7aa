"""Finished images in a cache folder.

    images/<digest>/vmlinux, initramfs, image.json    never changed once they are there
    current.json                                      which image fits the present recipe and guest code
    debs/, packages.json                              what the last build took: enough to build without a network
    apt/                                              the private apt's state
    media/                                            what manifests boot from; see `_artifacts.py`
    lock                                              held by the one builder
    build-*/                                          a build under way, or what one left that was killed

An image is named by what it is made of: the recipe, the resolved packages and our guest code. It is renamed into its
place when it is whole and on the disk, so whoever finds it may use it without a lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import _apt, _recipe
from ._errors import ImageError

DIGEST = re.compile(r"[0-9a-f]{64}")
"""A SHA-256 in hex, the whole of it."""
_MAX_JSON_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel and an initramfs that a VM can boot."""

    digest: str
    """SHA-256, in hex, of what it is made of."""
    kernel: Path
    """An uncompressed ELF kernel with a PVH entry point."""
    initramfs: Path
    min_memory_mb: int
    """With less memory a guest does not boot."""
    kernel_parameters: tuple[str, ...]
    """What the kernel's command line should have for a quick boot; a guest boots without it too."""
    protocol: int
    """The newest version of the agent's protocol that its agent speaks."""
    kernel_version: str
    """The version of Debian's kernel package."""
    size_bytes: int
    """Kernel and initramfs together."""
    current: bool
    """Whether it was looked up as the one that new VMs boot."""

    def as_json(self) -> dict[str, object]:
        """Return it as JSON can carry it."""
        return {
            "digest": self.digest,
            "kernel": str(self.kernel),
            "initramfs": str(self.initramfs),
            "min_memory_mb": self.min_memory_mb,
            "kernel_parameters": list(self.kernel_parameters),
            "protocol": self.protocol,
            "kernel_version": self.kernel_version,
            "size_bytes": self.size_bytes,
            "current": self.current,
        }


def image_digest(recipe: str, packages: Iterable[_apt.Package], guest: str) -> str:
    """Return the name of the image that this recipe makes of these packages and this guest code."""
    rows = [[item.name, item.version, item.sha256] for item in sorted(packages)]
    text = json.dumps({"recipe": recipe, "packages": rows, "guest": guest}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def find(cache_dir: Path) -> Image | None:
    """Return the image that fits the present recipe and guest code, or None when there is none yet.

    Reads two small files: no lock, no network, no digest over the image.
    """
    digest = _current(cache_dir)
    image = load(cache_dir, digest) if digest else None
    return None if image is None else replace(image, current=True)


def list_images(cache_dir: Path) -> list[Image]:
    """Return all whole images of a cache, the current one first."""
    folder = cache_dir / "images"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    current = _current(cache_dir)
    images = [replace(image, current=name == current) for name in names if (image := load(cache_dir, name))]
    return sorted(images, key=lambda image: (not image.current, image.digest))


def load(cache_dir: Path, digest: str) -> Image | None:
    """Return one image by its digest, or None when it is not there or not whole.

    A boot asks several times. So whether it is the `current` one is not looked at, as that reads all code of the guest.
    """
    if not DIGEST.fullmatch(digest):
        return None
    folder = cache_dir / "images" / digest
    record = read_json(folder / "image.json")
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
        # Sizes, not digests: this runs at each boot of a VM, and the rename was atomic.
        whole = (
            image.kernel.stat().st_size == record["kernel"]["size"]
            and image.initramfs.stat().st_size == record["initramfs"]["size"]
        )
    except (KeyError, TypeError, ValueError, OSError):
        return None
    return image if whole else None


def prune(cache_dir: Path, keep: Iterable[str]) -> list[str]:
    """Remove the images that are neither current nor in `keep` (those of VMs that may boot again), and what builds that
    were killed have left; return which images.

    :raises ImageError: the cache can't be written to; `cache_busy` when an image is being built
    """
    wanted = set(keep)

    def busy() -> None:
        raise ImageError("cache_busy", "an image is being built", "try again when that is done")

    with locked(cache_dir, busy):
        clean_up(cache_dir)
        gone = [image.digest for image in list_images(cache_dir) if not image.current and image.digest not in wanted]
        for digest in gone:
            doomed = cache_dir / f"build-{digest}"
            # First out of sight, so that nobody finds half of one.
            (cache_dir / "images" / digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return gone


def _current(cache_dir: Path) -> str | None:
    index = read_json(cache_dir / "current.json")
    digest = index.get(_recipe.input_key()) if index else None
    return digest if isinstance(digest, str) else None


def make_current(cache_dir: Path, digest: str) -> None:
    """Let `find` give this image from now on; the lock is held."""
    write_atomically(cache_dir / "current.json", json.dumps({_recipe.input_key(): digest}).encode() + b"\n")


@contextlib.contextmanager
def locked(cache_dir: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the cache's lock; `waiting` is called once when somebody else has it.

    :raises ImageError: the folder can't be written to
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ImageError(
            "cache_unwritable",
            f"The cache folder {cache_dir} can't be written to: {error.strerror}",
            "run it as the user who owns the folder, or name another with --cache or VOLANT_CACHE_DIR",
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            # Without a deadline: the owner has its own, and whoever started this process may end it.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def clean_up(cache_dir: Path) -> None:
    """Remove what builds left that did not end; the lock is held, so none is under way."""
    for path in cache_dir.glob("build-*"):
        shutil.rmtree(path, ignore_errors=True)


def write_atomically(path: Path, data: bytes, *, mode: int | None = None) -> None:
    """Put `data` in the place of `path`, on the disk, all or nothing. `mode`: of the file; None: what umask says."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as handle:
        if mode is not None:
            os.fchmod(handle.fileno(), mode)
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a small file of ours, or None when it has none."""
    try:
        with path.open("rb") as handle:
            value = json.loads(handle.read(_MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
