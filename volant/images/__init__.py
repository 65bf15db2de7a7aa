"""Boot images: kernel and initramfs, built from Debian's packages and cached by what they are made of."""

from ._build import Progress, build
from ._ensure import ensure
from ._errors import ImageError
from ._store import Image, find, list_images, load, prune

__all__ = ["Image", "ImageError", "Progress", "build", "ensure", "find", "list_images", "load", "prune"]
