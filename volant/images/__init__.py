"""The files that VMs boot: images built from Debian's packages, and artifacts of manifests, both in a cache folder.

`fetch_packages` is for scripts that make root filesystems, as `examples/browser` does."""

from ._apt import Package
from ._artifact_cache import ArtifactCache, Upload
from ._artifacts import CachedArtifact, artifact_path, list_artifacts, make_private, remove_artifact
from ._build import build
from ._ensure import ensure
from ._errors import ImageError
from ._fetch import fetch, local_path, shown
from ._obstacle import obstacle
from ._origins import ANYWHERE, PUBLIC, Origins, parse_networks
from ._packages import Progress, fetch_packages
from ._store import DIGEST, Image, find, list_images, load, prune
from ._users import forget_use, users

__all__ = [
    "ANYWHERE",
    "DIGEST",
    "PUBLIC",
    "ArtifactCache",
    "CachedArtifact",
    "Image",
    "ImageError",
    "Origins",
    "Package",
    "Progress",
    "Upload",
    "artifact_path",
    "build",
    "ensure",
    "fetch",
    "fetch_packages",
    "find",
    "forget_use",
    "list_artifacts",
    "list_images",
    "load",
    "local_path",
    "make_private",
    "obstacle",
    "parse_networks",
    "prune",
    "remove_artifact",
    "shown",
    "users",
]
