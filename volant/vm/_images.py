"""Which OCI images VMs and snapshots need."""

from __future__ import annotations

from volant.journal import Projection
from volant.oci import ImageUser


def image_users(projection: Projection) -> dict[str, list[ImageUser]]:
    """Returns who needs which image, by its digest."""
    found: dict[str, list[ImageUser]] = {}
    named = [
        *((ImageUser(row.project, f"VM {row.name}"), row.manifest) for row in projection.rows()),
        *((ImageUser(one.project, f"snapshot {one.name}"), one.vm.manifest) for one in projection.snapshots.values()),
    ]
    for user, manifest in named:
        if manifest.image is not None:
            found.setdefault(manifest.image.digest, []).append(user)
    return found
