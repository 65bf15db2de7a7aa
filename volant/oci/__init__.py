"""OCI images: from a reference to read-only file systems in the cache and a typed configuration.

`docs/explanation/oci.md` has the design. This package knows no VM.
"""

from ._config import ImageConfig, ImageHealthCheck, Port, parse_config
from ._errors import OciError
from ._fetch import FetchLimits, Report
from ._images import OciImages, open_images
from ._manifest import AMD64, Descriptor, Index, IndexEntry, Manifest, Platform, digest_of, parse_manifest
from ._reference import DEFAULT_REGISTRY, Reference, parse_reference
from ._skopeo import Skopeo
from ._store import CachedImage

__all__ = [
    "AMD64",
    "DEFAULT_REGISTRY",
    "CachedImage",
    "Descriptor",
    "FetchLimits",
    "ImageConfig",
    "ImageHealthCheck",
    "Index",
    "IndexEntry",
    "Manifest",
    "OciError",
    "OciImages",
    "Platform",
    "Port",
    "Reference",
    "Report",
    "Skopeo",
    "digest_of",
    "open_images",
    "parse_config",
    "parse_manifest",
    "parse_reference",
]
