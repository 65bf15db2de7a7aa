"""Builds an image: unpacks Debian's packages, composes, and renames into place."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from volant.model import agent
from volant.store import sync_directory, write_atomically

from . import _compose, _cpio, _packages, _recipe, _store
from ._errors import ImageError
from ._mmdebstrap import Bootstrap
from ._packages import THIS_HOST, Archive, Package
from ._progress import WAITING, Progress, silent
from ._store import Image

_BOOTSTRAP = Bootstrap(
    variant="extract", include=(_recipe.KERNEL_METAPACKAGE, *_recipe.PACKAGES), without=_recipe.WITHOUT
)
_KERNEL = re.compile(r"linux-image-\d")


def build(cache_dir: Path, *, archive: Archive = THIS_HOST, progress: Callable[[Progress], None] = silent) -> Image:
    """Builds the image from the archive's packages of today, unless the cache has it; blocks for some seconds.

    If the mirror can't be reached, it takes the packages of the last build. Needs no root. Of several callers one
    builds, the others wait.

    :param cache_dir: the only folder that is written to
    :raises ImageError: the image can't be built
    """
    if platform.machine() != "x86_64":
        raise ImageError(
            "unsupported_machine",
            f"Images are for x86-64, and this machine is {platform.machine()}",
            "build the image on an x86-64 host",
        )
    cache_dir = cache_dir.absolute()
    with _store.building(cache_dir, lambda: progress(WAITING)) as scratch:
        return _build(cache_dir, scratch, progress, archive)


def _build(cache_dir: Path, scratch: Path, progress: Callable[[Progress], None], archive: Archive) -> Image:
    recipe = _recipe.recipe_digest()
    guest = _recipe.guest_sources()
    guest_digest = _recipe.sources_digest(guest)
    image = None
    if archive.offline:
        packages = _wanted(_packages.last(cache_dir).packages)
        image = _store.load(cache_dir, _store.image_digest(recipe, packages, guest_digest))
    if image is None:
        tree = scratch / "tree"
        packages = _wanted(_packages.make(_BOOTSTRAP, tree, cache_dir, scratch, archive, progress))
        digest = _store.image_digest(recipe, packages, guest_digest)
        image = _store.load(cache_dir, digest)
    if image is None:
        kernel, contents = _compose.compose(
            tree, guest, scratch, lambda phase, message: progress(Progress(phase, message))
        )
        progress(Progress("write", "Writing the image"))
        _place(cache_dir, scratch, digest, recipe, guest_digest, packages, kernel, contents)
        image = _store.load(cache_dir, digest)
        if image is None:
            raise ImageError(
                "io_error", "The image was written and can't be read back", "check the cache folder's disk"
            )
    _store.make_current(cache_dir, image.digest)
    progress(Progress("done", f"The image {image.digest[:12]} is ready"))
    return replace(image, current=True)


def _wanted(packages: list[Package]) -> list[Package]:
    """Returns the packages of the recipe, without those that only came along."""
    return [each for each in packages if each.name in _recipe.PACKAGES or _KERNEL.match(each.name)]


def _place(
    cache_dir: Path,
    scratch: Path,
    digest: str,
    recipe: str,
    guest_digest: str,
    packages: list[Package],
    kernel: bytes,
    tree: _cpio.Tree,
) -> None:
    made = scratch / "image"
    made.mkdir()
    record = {
        "digest": digest,
        "recipe": recipe,
        "guest": guest_digest,
        "protocol": agent.PROTOCOL_VERSION,
        "min_memory_mb": _recipe.MIN_MEMORY_MB,
        "kernel_parameters": list(_recipe.KERNEL_PARAMETERS),
        "kernel_version": next(item.version for item in packages if item.name.startswith("linux-image-")),
        "kernel": _write(made / "vmlinux", [kernel]),
        "initramfs": _write(made / "initramfs", _cpio.archive(tree)),
        "packages": msgspec.to_builtins(packages),
    }
    write_atomically(made / "image.json", json.dumps(record, indent=1, sort_keys=True).encode() + b"\n", mode=0o644)
    target = cache_dir / "images" / digest
    target.parent.mkdir(exist_ok=True)
    if target.exists():
        # It was incomplete, or it would have been used.
        shutil.rmtree(target)
    made.rename(target)
    sync_directory(target.parent)


def _write(path: Path, pieces: Iterable[bytes]) -> dict[str, object]:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as handle:
        for piece in pieces:
            handle.write(piece)
            digest.update(piece)
            size += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    path.chmod(0o644)
    return {"sha256": digest.hexdigest(), "size": size}
