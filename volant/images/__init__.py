"""What VMs boot from: kernel and initramfs, built from Debian's packages and cached by what they are made of, and the
boot media of manifests, cached by their digests.

`fetch_packages` is for those who make root file systems of their own, as `examples/browser` does."""

from ._apt import Package
from ._build import build
from ._ensure import ensure
from ._errors import ImageError
from ._fetch import fetch, local_path, shown
from ._media import Medium, list_media, make_private, medium_path, remove_medium
from ._obstacle import obstacle
from ._obtain import BootMedia, Upload
from ._origins import ANYWHERE, PUBLIC, Origins, parse_networks
from ._packages import Progress, fetch_packages
from ._store import DIGEST, Image, find, list_images, load, prune
from ._users import forget_use, users

__all__ = [
    "ANYWHERE",
    "DIGEST",
    "PUBLIC",
    "BootMedia",
    "Image",
    "ImageError",
    "Medium",
    "Origins",
    "Package",
    "Progress",
    "Upload",
    "build",
    "ensure",
    "fetch",
    "fetch_packages",
    "find",
    "forget_use",
    "list_images",
    "list_media",
    "load",
    "local_path",
    "make_private",
    "medium_path",
    "obstacle",
    "parse_networks",
    "prune",
    "remove_medium",
    "shown",
    "users",
]
