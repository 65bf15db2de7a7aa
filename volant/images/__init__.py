"""Boot images: kernel and initramfs, built from Debian's packages and cached by what they are made of.

`fetch_packages` is for those who make root file systems of their own, as `examples/browser` does."""

from ._apt import Package
from ._build import build
from ._ensure import ensure
from ._errors import ImageError
from ._packages import Progress, fetch_packages
from ._store import Image, find, list_images, load, prune

__all__ = [
    "Image",
    "ImageError",
    "Package",
    "Progress",
    "build",
    "ensure",
    "fetch_packages",
    "find",
    "list_images",
    "load",
    "prune",
]
