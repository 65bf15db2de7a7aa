"""OCI images: from a reference to read-only file systems in the cache and a typed configuration.

`docs/explanation/oci.md` has the design. This package does not depend on VMs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from volant import lazy_exports

from ._errors import OciError
from ._isolation import Isolation
from ._service import ImageLibrary, ImageService, ImageSettings, ImageSource, ImageUser

if TYPE_CHECKING:
    from ._auth import read_auth, read_auth_file
    from ._config import ImageConfig, ImageHealthCheck, Port, parse_config
    from ._distribution import RegistryAccess, Repository, open_repository
    from ._fetch import FetchLimits, Resolved
    from ._images import OciImages, Pruned, Pull, open_images
    from ._join import disk_path
    from ._manifest import AMD64, Descriptor, Index, IndexEntry, Manifest, Platform, digest_of, parse_manifest
    from ._proxy import Resolve
    from ._reference import DEFAULT_REGISTRY, Reference, parse_reference
    from ._report import PullEvent, Report
    from ._skopeo import Skopeo
    from ._store import CachedImage
    from ._upload import ArchiveUpload
else:
    # A daemon without such images imports none of it.
    _MODULES = {
        "read_auth": "_auth",
        "read_auth_file": "_auth",
        **dict.fromkeys(("ImageConfig", "ImageHealthCheck", "Port", "parse_config"), "_config"),
        **dict.fromkeys(("FetchLimits", "Resolved"), "_fetch"),
        "Resolve": "_proxy",
        **dict.fromkeys(("OciImages", "Pruned", "Pull", "open_images"), "_images"),
        **dict.fromkeys(("AMD64", "Descriptor", "Index", "IndexEntry", "Manifest", "Platform"), "_manifest"),
        **dict.fromkeys(("digest_of", "parse_manifest"), "_manifest"),
        **dict.fromkeys(("DEFAULT_REGISTRY", "Reference", "parse_reference"), "_reference"),
        **dict.fromkeys(("PullEvent", "Report"), "_report"),
        "Skopeo": "_skopeo",
        "CachedImage": "_store",
        "ArchiveUpload": "_upload",
        "disk_path": "_join",
        **dict.fromkeys(("RegistryAccess", "Repository", "open_repository"), "_distribution"),
    }

    __getattr__ = lazy_exports(__name__, _MODULES)


__all__ = [
    "AMD64",
    "DEFAULT_REGISTRY",
    "ArchiveUpload",
    "CachedImage",
    "Descriptor",
    "FetchLimits",
    "ImageConfig",
    "ImageHealthCheck",
    "ImageLibrary",
    "ImageService",
    "ImageSettings",
    "ImageSource",
    "ImageUser",
    "Index",
    "IndexEntry",
    "Isolation",
    "Manifest",
    "OciError",
    "OciImages",
    "Platform",
    "Port",
    "Pruned",
    "Pull",
    "PullEvent",
    "Reference",
    "RegistryAccess",
    "Report",
    "Repository",
    "Resolve",
    "Resolved",
    "Skopeo",
    "digest_of",
    "disk_path",
    "open_images",
    "open_repository",
    "parse_config",
    "parse_manifest",
    "parse_reference",
    "read_auth",
    "read_auth_file",
]
