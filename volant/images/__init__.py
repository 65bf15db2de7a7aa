"""The files that VMs boot: images built from Debian's packages, and artifacts of manifests, both in a cache folder.

`extract_packages` is for scripts that make root filesystems, as `examples/browser` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volant import lazy_exports

from ._artifact_cache import ArtifactCache, Upload
from ._artifacts import CachedArtifact, artifact_path, list_artifacts, remove_artifact
from ._ensure import ensure
from ._errors import ImageError
from ._origins import ANYWHERE, PUBLIC, Origins, local_path, parse_networks, shown
from ._progress import Progress
from ._store import DIGEST, Image, find, list_images, load, prune, users

if TYPE_CHECKING:
    from ._build import build
    from ._fetch import fetch
    from ._mmdebstrap import obstacle
    from ._packages import Archive, Package, extract_packages
    from ._stock import STOCK, BuiltStock, build_stock, build_stock_in_child
else:
    # The daemon leaves building and fetching to other processes, and its start need not import what they need.
    _MODULES = {
        "STOCK": "_stock",
        "Archive": "_packages",
        "BuiltStock": "_stock",
        "Package": "_packages",
        "build": "_build",
        "build_stock": "_stock",
        "build_stock_in_child": "_stock",
        "extract_packages": "_packages",
        "fetch": "_fetch",
        "obstacle": "_mmdebstrap",
    }

    __getattr__ = lazy_exports(__name__, _MODULES)


__all__ = [
    "ANYWHERE",
    "DIGEST",
    "PUBLIC",
    "STOCK",
    "Archive",
    "ArtifactCache",
    "BuiltStock",
    "CachedArtifact",
    "Image",
    "ImageError",
    "Origins",
    "Package",
    "Progress",
    "Upload",
    "artifact_path",
    "build",
    "build_stock",
    "build_stock_in_child",
    "ensure",
    "extract_packages",
    "fetch",
    "find",
    "list_artifacts",
    "list_images",
    "load",
    "local_path",
    "obstacle",
    "parse_networks",
    "prune",
    "remove_artifact",
    "shown",
    "users",
]
