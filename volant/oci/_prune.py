"""Decides which images to remove so that the rest fits a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ._store import CachedImage


def surplus(
    images: Iterable[CachedImage], max_bytes: int, may_go: Callable[[CachedImage], bool]
) -> tuple[list[CachedImage], int]:
    """Returns the images to remove, least recently used first, until all images take at most `max_bytes`; and the bytes
    that this frees. Layers of several images count once, and are removed with the last of them."""
    found = sorted(images, key=lambda image: (image.used_at, image.digest))
    sizes = {diff_id: size for image in found for diff_id, size in _layers(image).items()}
    users = Counter(diff_id for image in found for diff_id in _layers(image))
    total = sum(sizes.values()) + sum(map(_own, found))
    before, gone = total, []
    for image in found:
        if total <= max_bytes:
            break
        if not may_go(image):
            continue
        gone.append(image)
        users.subtract(_layers(image).keys())
        total -= _own(image) + sum(size for diff_id, size in _layers(image).items() if not users[diff_id])
    return gone, before - total


def _layers(image: CachedImage) -> dict[str, int]:
    """Returns the sizes of an image's layers. An image may contain a layer twice."""
    return dict(zip(image.config.diff_ids, image.layer_bytes, strict=True))


def _own(image: CachedImage) -> int:
    """Returns the size of the image's own files, without layers."""
    return image.size_bytes - sum(_layers(image).values())
